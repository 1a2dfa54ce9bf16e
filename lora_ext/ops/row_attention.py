"""Attention and functions of one number whose results do not depend on the rest of the batch.

A library cuts attention into blocks that follow from the number of queries and of keys, and its
sums with them: the same row comes out with other bits in another batch. :func:`row_attention` has
one order of sums per row. torch computes functions such as SiLU with other instructions at the end
of a thread's share; :func:`pointwise` uses the same instructions for every number.

Letters: ``B`` sequences, ``H`` heads, ``G`` of them with keys of their own, ``T`` queries, ``L``
keys, ``D`` features of queries and keys, ``E`` of values.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lora_ext._checks import FLOATS, require, require_dim, require_dtype, require_tensor
from lora_ext._torch import refuse_tangents
from lora_ext.reference import seen_keys

from ._registration import backward, fake

_c = torch.ops.lora_ext


def row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    causal: bool = False,
    spans: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention with one query row at a time over the keys that it sees.

    ``y[b, h, t] = sum_j p_j v[b, g, j]`` with ``p = softmax_j(scale q[b, h, t] . k[b, g, j])`` over
    the keys ``j`` that row ``(b, t)`` sees, and ``g = h // (H / G)``. A row that sees none gives
    zeros.

    A row's bits depend on its query and on the keys and values that it sees, in their order, alone:
    not on other rows, on keys that it does not see, wherever they stand and whatever they hold, on
    ``B``, ``T``, ``L`` or threads. Scores and sums are in float32 (float64 stays), rounded once.
    Devices, and machines with other instruction sets, may round differently.

    Differentiable once in q, k and v. The gradient is that of torch's attention of all rows at
    once, and has its bits.

    Args:
        q: ``(B, H, T, D)`` float32, float16, bfloat16, or float64 on the CPU. Of q, k and v any
            strides are read as they are, as long as the last axis is contiguous.
        k: ``(B, G, L, D)``, dtype of ``q``; ``G`` divides ``H``.
        v: ``(B, G, L, E)``, likewise.
        scale: of the scores; None: ``1 / sqrt(D)``.
        causal: row ``t`` sees keys up to ``t + L - T``: the last row all of them.
        spans: ``(B or 1, T, 2)`` int64: a row sees keys ``[first, end)``; what lies outside
            ``[0, L)`` is no key.
        mask: ``(B or 1, T, L)`` bool: True where a row sees a key. Of causal, spans and mask all
            that are given must hold.

    Returns:
        ``(B, H, T, E)``, dtype of ``q``, a view of a tensor ``(B, T, H, E)``, so that heads join
        without a copy.

    Raises:
        ValueError: if a shape, dtype or device disagrees, naming the argument.
        NotImplementedError: if q, k or v has a tangent of forward mode.
    """
    require_dim("row_attention", "q", q, "(B, H, T, D)")
    refuse_tangents("row_attention", q, k, v)
    if scale is None:
        scale = max(q.shape[3], 1) ** -0.5
    return _c.row_attention.default(q, k, v, scale, causal, spans, mask)


def pointwise(x: Tensor, function: str) -> Tensor:
    """Compute ``y[i] = function(x[i])`` with bits that depend only on ``x[i]``.

    The result is computed in float32 (sine and cosine in float64) and rounded once. Processors with
    other instruction sets may round differently. The op is not differentiable and ignores autocast.

    Args:
        x: float32 or bfloat16 on the CPU, of any shape and strides.
        function: ``"cos"`` or ``"sin"`` (NaN above ``2**24`` in magnitude), ``"gelu"``,
            ``"gelu_tanh"`` (its approximation by tanh), ``"rsqrt"``, ``"sigmoid"``, ``"silu"``,
            ``"softplus"`` or ``"tanh"``.

    Returns:
        ``function(x)`` in the shape and dtype of ``x``.

    Raises:
        ValueError: If the dtype, the device or the name is not one of these.
        RuntimeError: If a gradient is requested.
    """
    return _c.pointwise.default(x, function)


@fake("pointwise")
def _fake_pointwise(x: Tensor, function: str) -> Tensor:
    require_dtype("pointwise", "x", x, torch.float32, torch.bfloat16)
    dense = torch.ops.aten.is_non_overlapping_and_dense.default(x)
    return torch.empty_like(x if dense else x.contiguous())


@fake("row_attention")
def _fake_row_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, *limits: Tensor | None
) -> Tensor:
    op = "row_attention"
    require_tensor(op, "q", q, "(B, H, T, D)", None, *FLOATS)
    require_dim(op, "k", k, "(B, G, L, D)")
    require_dim(op, "v", v, "(B, G, L, E)")
    batch, heads, rows, width = q.shape
    groups, keys = k.shape[1:3]
    require_tensor(op, "k", k, "(B, G, L, D)", (batch, groups, keys, width), q.dtype)
    require_tensor(op, "v", v, "(B, G, L, E)", (batch, groups, keys, v.shape[3]), q.dtype)
    divides = heads % groups == 0 if groups else heads == 0
    require(divides, op, "k", f"heads that divide those of q, {heads}", groups)
    spans, mask = limits
    if spans is not None:
        shape = (1 if spans.shape[0] == 1 else batch, rows, 2)
        require_tensor(op, "spans", spans, "(B or 1, T, 2)", shape, torch.int64)
    if mask is not None:
        shape = (1 if mask.shape[0] == 1 else batch, rows, keys)
        require_tensor(op, "mask", mask, "(B or 1, T, L)", shape, torch.bool)
    return q.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.scale, ctx.causal, spans, mask = inputs
    ctx.save_for_backward(q, k, v, spans, mask)


@backward("row_attention", save=_save)
def _row_attention_backward(_: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, spans, mask = ctx.saved_tensors
    once = "the gradient of row_attention is not itself differentiable"
    require(not torch.is_grad_enabled(), "row_attention", "gradient", "no graph of it", once)
    rows, keys = q.shape[2], k.shape[2]
    plain = spans is None and mask is None and (not ctx.causal or bool(rows == keys))
    how: dict[str, Any] = {"scale": ctx.scale, "is_causal": ctx.causal and plain}
    if not plain:
        how["attn_mask"] = seen_keys(rows, keys, ctx.causal, spans, mask, q.device)[:, None]
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        wide = [t.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1) for t in leaves[1:]]
        y = scaled_dot_product_attention(leaves[0], *wide, **how)
        return (*torch.autograd.grad(y, leaves, grad), *(None,) * 4)
