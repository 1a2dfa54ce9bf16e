"""Attention and elementwise functions whose results do not depend on the rest of the batch.

Libraries divide attention into blocks, depending on the numbers of queries and keys. The order of a
row's sums, and so its bits, change with the batch. :func:`row_attention` adds the terms of a row in
one fixed order. For functions such as SiLU, torch computes the last elements of each thread with
instructions that differ from those for the rest. :func:`pointwise` uses the same instructions for
all elements.

Letters: ``B`` sequences, ``H`` query heads, ``G`` key heads, ``T`` queries, ``L`` keys, ``D``
features of queries and keys, ``E`` features of values.
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
    """Compute attention for each query row separately, over the keys that the row may attend to.

    ``y[b, h, t] = sum_j p_j v[b, g, j]`` with ``p = softmax_j(scale q[b, h, t] . k[b, g, j])`` over
    the keys ``j`` that ``causal``, ``spans`` and ``mask`` all allow for row ``(b, t)``, and
    ``g = h // (H / G)``. A row without allowed keys is zero.

    A row's bits depend only on its query and on the sequence of allowed keys and values. They do
    not depend on the positions of these keys, on other keys, on other rows, on ``B``, ``T``, ``L``
    or the number of threads. Scores and sums are float32 (float64 for float64), rounded once.
    Devices, and machines with other instruction sets, may round differently.

    Differentiable once in q, k and v. The gradient is computed by torch's attention for all rows at
    once, so its bits may depend on the batch.

    Args:
        q: Queries ``(B, H, T, D)`` float32, float16, bfloat16, or float64 on the CPU. q, k and v
            may have any strides, and are copied only if the last axis is not contiguous.
        k: Keys ``(B, G, L, D)``, dtype of ``q``; ``G`` divides ``H``.
        v: Values ``(B, G, L, E)``, dtype of ``q``.
        scale: Factor of the scores, or None for ``1 / sqrt(D)``.
        causal: Whether row ``t`` may only attend to keys up to ``t + L - T``, so that the last row
            may attend to all keys.
        spans: Range ``[first, end)`` of allowed keys of each row, ``(B or 1, T, 2)`` int64, clipped
            to ``[0, L)``; None for all keys.
        mask: Allowed keys of each row, ``(B or 1, T, L)`` bool; None for all keys.

    Returns:
        ``(B, H, T, E)``, dtype of ``q``. It is a view of a tensor ``(B, T, H, E)``, so that heads
        can be merged without a copy.

    Raises:
        ValueError: If a shape, dtype or device is wrong.
        NotImplementedError: If q, k or v has a forward-mode tangent.
    """
    require_dim("row_attention", "q", q, "(B, H, T, D)")
    refuse_tangents("row_attention", q, k, v)
    if scale is None:
        scale = max(q.shape[3], 1) ** -0.5
    return _c.row_attention.default(q, k, v, scale, causal, spans, mask)


def pointwise(x: Tensor, function: str) -> Tensor:
    """Apply ``function`` elementwise, with bits that do not depend on position or shape.

    The result is computed in float32 (sine and cosine in float64) and rounded once. Processors with
    other instruction sets may round differently. The op is not differentiable and ignores autocast.

    Args:
        x: Tensor of float32 or bfloat16 on the CPU, of any shape and strides.
        function: Name of the function: ``"cos"`` or ``"sin"`` (NaN if ``x`` is above ``2**24`` in
            magnitude), ``"gelu"``, ``"gelu_tanh"`` (GELU approximated by tanh), ``"rsqrt"``,
            ``"sigmoid"``, ``"silu"``, ``"softplus"`` or ``"tanh"``.

    Returns:
        ``function(x)`` in the shape and dtype of ``x``.

    Raises:
        ValueError: If the dtype, the device or the function is not supported.
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
    require(divides, op, "k", f"a number of heads that divides that of q, {heads}", groups)
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
    once = "True: the gradient of row_attention is not itself differentiable"
    require(not torch.is_grad_enabled(), "row_attention", "create_graph", "False", once)
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
