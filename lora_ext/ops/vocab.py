"""Losses over a vocabulary that never store all logits at once.

The logits are computed in chunks of columns (tokens of the vocabulary). Each chunk updates running
maxima and sums, and is discarded. If the output layer is frozen (and :func:`chunked_kl` has no
softcap), the forward also adds the chunk's share to the gradient of the hidden states, as
FlashAttention accumulates its output. Forward and backward of cross entropy then take two products
with the weight in total. Otherwise the backward recomputes the logits. docs/chunked_loss.md lists
the formulas, docs/notes/chunked_loss.md the measurements.

Letters: ``N`` rows, ``d`` features, ``V`` vocabulary, ``k`` hidden states per row.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import FLOATS, integer, number, require, require_dim, require_tensor
from lora_ext._torch import AUTOCASTS, refuse_tangents
from lora_ext.reference import accumulator

from ._registration import backward, fake

_c = torch.ops.lora_ext


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chunk: int = 8192,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> Tensor:
    """Compute the mean cross entropy of an output layer from ``chunk`` columns of logits at a time.

    The loss is ``mean_n (log sum_v exp z[n, v] - z[n, y_n])`` with ``z = hidden @ weight^T + bias``
    and labels ``y``. With softcap, ``softcap * tanh(z / softcap)`` replaces ``z``. The mean is over
    the rows that are not ignored; if all rows are ignored, the loss and its gradients are 0.

    Neither forward nor backward allocates a tensor of ``N x V`` numbers if ``chunk < V``. In
    addition to arguments and gradients, ``N * chunk`` logits and a few ``N * d`` sums are in
    memory. Differentiable once in hidden, weight and bias. The bits of lora_ext's kernels do not
    depend on the number of threads; the bits of torch's products with the weight and of its mean
    may.

    Args:
        hidden: Hidden states ``(N, d)``, float32, float16, bfloat16, or float64 on the CPU.
        weight: Weight ``(V, d)`` of the output layer, dtypes as for ``hidden``. Products use the
            wider of the two dtypes, or autocast's dtype; float16 is multiplied as float32 on the
            CPU.
        bias: Bias ``(V,)`` of the output layer, or None.
        labels: Labels ``(N,)`` int64 in ``[0, V)``, or ``ignore_index``. On a GPU, their range is
            not checked; a label out of range makes the loss NaN.
        chunk: Number of columns of logits in memory at a time.
        ignore_index: Label of ignored rows.
        softcap: Bound of the absolute values of the logits, or None.

    Returns:
        Scalar, float32, or float64 if ``hidden`` or ``weight`` is float64.

    Raises:
        ValueError: If a shape, dtype, device or number is wrong.
        NotImplementedError: If an argument has a forward-mode tangent.

    Source: online softmax, Milakov and Gimelshein 2018; the gradient in the forward,
    FlashAttention, Dao et al. 2022, with the output layer as keys and values.
    """
    op = "chunked_cross_entropy"
    require_tensor(op, "hidden", hidden, "(N, d)", None, *FLOATS)
    _check_output_layer(op, hidden, weight, bias, chunk, softcap)
    require_tensor(op, "labels", labels, "(N,)", hidden.shape[:1], torch.int64)
    refuse_tangents(op, hidden, weight, bias)
    dtype, early = _product_dtype(hidden, weight), _gradient_in_forward(hidden, weight, bias)
    rest = chunk, ignore_index, softcap or 0.0, dtype, early
    rows: Tensor = _c.vocab_cross_entropy.default(hidden, weight, bias, labels, *rest)[0]
    return rows.sum() / (labels != ignore_index).sum().clamp(min=1)


def chunked_kl(
    hiddens: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    tau: float = 1.0,
    chunk: int = 8192,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute the mean KL divergence of students from a teacher that share one output layer.

    The students are the first ``k - 1`` hidden states of a row, and the teacher is the last one.
    The loss is ``tau^2 mean_{e < k, n} KL(softmax(z_k[n] / tau) || softmax(z_e[n] / tau))`` with
    ``z_e = hiddens[e] @ weight^T + bias``, soft-capped as in :func:`chunked_cross_entropy`. The
    mean is over the rows that the mask selects. If it selects no row, or if there is no student,
    the loss and its gradients are 0. The gradient of the teacher is zero, and the output layer
    receives gradients only through the students.

    Memory, derivatives, dtypes and reproducibility are as in :func:`chunked_cross_entropy`, with
    ``k N`` instead of ``N`` rows. Equal logits give exactly 0.

    Args:
        hiddens: ``k`` tensors ``(N, d)`` of normalised hidden states in one dtype, the teacher
            last.
        weight: Weight ``(V, d)`` of the output layer.
        bias: Bias ``(V,)`` of the output layer, or None.
        tau: Temperature.
        chunk: Number of columns of logits in memory at a time.
        mask: Rows to average, ``(N,)`` bool, or None for all.
        softcap: Bound of the absolute values of the logits, or None.

    Returns:
        Scalar, float32, or float64 if a hidden state or ``weight`` is float64.

    Raises:
        ValueError: If a shape, dtype, device or number is wrong.
        NotImplementedError: If an argument has a forward-mode tangent.
    """
    op = "chunked_kl"
    require(len(hiddens) > 0, op, "hiddens", "at least the teacher's hidden state", "no tensor")
    number(op, "tau", tau, above=0)
    first = hiddens[0]
    require_tensor(op, "hiddens[0]", first, "(N, d)", None, *FLOATS)
    for e, h in enumerate(hiddens[1:], 1):
        name, device = f"hiddens[{e}]", first.device
        require_tensor(op, name, h, "(N, d)", first.shape, first.dtype)
        require(h.device == device, op, name, f"a tensor on {device}", h.device)
    _check_output_layer(op, first, weight, bias, chunk, softcap)
    if mask is not None:
        require_tensor(op, "mask", mask, "(N,)", first.shape[:1], torch.bool)
    refuse_tangents(op, *hiddens, weight, bias)
    together = torch.stack(list(hiddens))  # (k, N, d)
    early = softcap is None and _gradient_in_forward(together, weight, bias)
    rest = tau, chunk, softcap or 0.0, _product_dtype(together, weight), early
    rows: Tensor = _c.vocab_kl.default(together, weight, bias, mask, *rest)[0]
    count = rows.numel() if mask is None else mask.sum()
    return rows.sum() / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    kind, common = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
    if kind in AUTOCASTS and torch.is_autocast_enabled(kind) and common != torch.float64:
        return torch.get_autocast_dtype(kind)
    return common


def _gradient_in_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return torch.is_grad_enabled() and hidden.requires_grad and frozen


def _check_output_layer(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: int, softcap: float | None
) -> None:
    # These arguments are checked here, because the compiled op receives the tensors after a cast,
    # and 0 instead of None for the softcap.
    require_dim(op, "weight", weight, "(V, d)")
    require_tensor(op, "weight", weight, "(V, d)", (weight.shape[0], hidden.shape[1]), *FLOATS)
    if bias is not None:
        require_tensor(op, "bias", bias, "(V,)", weight.shape[:1], *FLOATS)
    integer(op, "chunk", chunk, 1, expected="at least 1")
    if softcap is not None:
        number(op, "softcap", softcap, above=0, expected="None or a number above 0")


@fake("vocab_cross_entropy")
def _fake_cross_entropy(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, with_gradient = rest[-2:]
    loss = hidden.new_empty(hidden.shape[:1], dtype=accumulator(dtype))
    dhidden = hidden.new_empty(hidden.shape if with_gradient else 0)
    return loss, torch.empty_like(loss), dhidden


@fake("vocab_kl")
def _fake_kl(hiddens: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, with_gradient = rest[-2:]
    k, n, d = hiddens.shape
    loss = hiddens.new_empty(n, dtype=accumulator(dtype))
    return loss, loss.new_empty(k, n), hiddens.new_empty((k - 1, n, d) if with_gradient else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the hidden states, weight, bias, labels or mask, and settings of either loss."""
    ctx.settings = inputs[4:-1]
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(
    op: str, library: Any, ctx: Any, dloss: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the hidden states, weight and bias, and None for the other inputs."""
    needs = ctx.needs_input_grad[:3]
    grads = getattr(library, op)(dloss, *ctx.saved_tensors, *ctx.settings, *needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 6


for _op in ("vocab_cross_entropy", "vocab_kl"):
    backward(_op, save=_save)(functools.partial(_backward, f"{_op}_backward"))


@fake("vocab_cross_entropy_backward")
@fake("vocab_kl_backward")
def _fake_backward(
    dloss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_dhidden, need_dweight, need_dbias = rest[-3:]
    dbias = weight.new_empty(0) if bias is None or not need_dbias else torch.empty_like(bias)
    dhidden = hidden.new_empty(hidden.shape if need_dhidden else 0)
    return dhidden, weight.new_empty(weight.shape if need_dweight else 0), dbias
