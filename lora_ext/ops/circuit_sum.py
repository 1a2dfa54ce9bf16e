"""Sum layers of probabilistic circuits: logarithms of sums of products, exact at ``-inf``.

Letters: ``B`` rows, ``I`` terms, ``O`` sums, ``G`` groups.

Sources: expected flows as gradients, Darwiche 2003; log-einsum-exp, Peharz et al. 2020.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from lora_ext import reference
from lora_ext._checks import choice, require, require_tensor
from lora_ext._torch import refuse_tangents
from lora_ext.reference import NORMS, LogMax, accumulator, log_weights

from ._registration import backward, fake

_c = torch.ops.lora_ext


class ScaledWeights(NamedTuple):
    """Weights scaled for a product: ``W[o, i] = weight[o, i] * exp(shift[o])``.

    Attributes:
        weight: Scaled weights in the shape of ``w``, float32 (float64 for float64). The maximum of
            each row is 1, or 0 if the row is zero.
        shift: Logarithm of each row's scale, ``-inf`` if the row is zero.
    """

    weight: Tensor
    shift: Tensor


@torch.no_grad()
def log_einsum_weights(w: Tensor, norm: str = "logits") -> ScaledWeights:
    """Scale weights once for several calls of :func:`log_einsum_exp` with the same ``w``.

    Args:
        w: Weights ``(O, I)`` or ``(G, O, I)``, see :func:`log_einsum_exp`.
        norm: Meaning of ``w``, see :func:`log_einsum_exp`.

    Raises:
        ValueError: If a shape, dtype or norm is wrong.
    """
    return ScaledWeights(*_c.log_einsum_weights.default(w, norm))


@fake("log_einsum_weights")
def _fake_weights(w: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    weight = w.new_empty(w.shape, dtype=accumulator(w.dtype))
    return weight, weight.new_empty(w.shape[:-1])


@overload
def log_einsum_exp(
    w: Tensor,
    values: Tensor,
    norm: str = "logits",
    semiring: Literal["sum"] = "sum",
    precision: str = "fp32",
    scaled: ScaledWeights | None = None,
) -> Tensor: ...
@overload
def log_einsum_exp(
    w: Tensor,
    values: Tensor,
    norm: str,
    semiring: Literal["max"],
    precision: str = "fp32",
    scaled: ScaledWeights | None = None,
) -> LogMax: ...
def log_einsum_exp(
    w: Tensor,
    values: Tensor,
    norm: str = "logits",
    semiring: str = "sum",
    precision: str = "fp32",
    scaled: ScaledWeights | None = None,
) -> Tensor | LogMax:
    """Compute ``out[b, o] = log sum_i W[o, i] exp(values[b, i])``, a sum layer.

    If all terms of a sum are ``-inf``, the sum is ``-inf`` with gradient zero. ``+inf`` and NaN
    give NaN. If a product would underflow, forward and backward recompute it from shifted terms.
    For example, a term of probability ``e^-1000`` is not lost if a much larger value has weight
    zero.

    Differentiable in ``w`` and ``values``: any number of times for the sum, once for the max
    (through the largest term). A row's bits depend neither on its batch nor on the number of
    threads, except for shared weights on CUDA, which use the library's GEMM.

    Args:
        w: Weights: one matrix ``(O, I)`` for all rows, with ``values (B, I)``; one matrix per group
            ``(G, O, I)``, with ``(G, B, I)``; or one matrix per row ``(B, O, I)``, with ``(B, I)``.
            A matrix that is expanded over the rows is used as one matrix for all rows. float32,
            float16, bfloat16, or float64 on the CPU.
        values: Log-values, float32 (float64 for float64 weights).
        norm: Meaning of ``w``. ``"logits"``: it is log-softmaxed over ``I``. ``"logprobs"``: it
            contains normalised log-weights. ``"none"``: it contains other log-weights. ``"probs"``:
            it contains weights, and a weight of zero or less makes its term impossible.
        semiring: ``"sum"``, or ``"max"`` for the largest term.
        precision: Precision of products on CUDA with up to 256 sums and 256 terms, if all rows of
            a group share a matrix. ``"high"`` splits both operands into two bfloat16 and keeps 16
            bits. ``"fp16s"`` scales both operands to float16 and keeps 11 bits. ``"fp32"`` uses the
            library's float32. Everything else, including gradients and the CPU, uses float32.
            docs/circuit_engine.md, "Precision", lists the errors.
        scaled: Result of :func:`log_einsum_weights` for the same ``w`` and ``norm``, to scale the
            weights only once for several calls; or None.

    Returns:
        ``(B, O)`` or ``(G, B, O)`` in the dtype of ``values``. For ``"max"``, a :class:`LogMax`,
        which also contains the lowest index of the largest term, int64.

    Raises:
        ValueError: If a shape, dtype, device or option is wrong.
        NotImplementedError: If an argument has a forward-mode tangent.

    Source: log-einsum-exp, Peharz et al. 2020, section 3.2.
    """
    choice("log_einsum_exp", "norm", norm, NORMS)
    choice("log_einsum_exp", "semiring", semiring, ("sum", "max"))
    refuse_tangents("log_einsum_exp", w, values)
    # Autograd leaves are not narrowed to w[0], since a leaf's gradient must have its full shape.
    leaf = w.requires_grad and w.is_leaf
    if w.dim() == 3 and values.dim() == 2 and len(w) > 1 and w.stride(0) == 0 and not leaf:
        found = f"{tuple(w.shape)} and {tuple(values.shape)}"
        same = len(w) == len(values)
        require(same, "log_einsum_exp", "w and values", "the same number of rows", found)
        w = w[0]
    if semiring == "sum":
        return _c.log_einsum_exp.default(w, values, norm, precision, *(scaled or (None, None)))
    with torch.no_grad():
        best, indices = _c.log_einsum_max.default(w, values, norm)
    indices = indices.long()
    if torch.is_grad_enabled() and (w.requires_grad or values.requires_grad):
        best = _attained(w, values, norm, best, indices)
    return LogMax(best, indices)


@fake("log_einsum_exp")
def _fake_exp(w: Tensor, values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(*values.shape[:-1], w.shape[-2])


def _save_exp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    w, values, ctx.norm, _, *scaled = inputs
    ctx.save_for_backward(w, values, output, *scaled)


@backward("log_einsum_exp", save=_save_exp)
def _exp_backward(library: Any, ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    w, values, out, *scaled = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    grads = library.log_einsum_exp_backward(dout, w, values, out, ctx.norm, *needs, *scaled)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 4


@fake("log_einsum_max")
def _fake_max(w: Tensor, values: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    out = values.new_empty(*values.shape[:-1], w.shape[-2])
    return out, out.new_empty(out.shape, dtype=torch.int32)


def _attained(w: Tensor, values: Tensor, norm: str, best: Tensor, indices: Tensor) -> Tensor:
    """Return ``best``, the terms at ``indices``, as a differentiable function of w and values."""
    log_w = log_weights(w, norm)
    if w.dim() == 2 or values.dim() == 3:
        log_w = log_w[..., None, :, :].expand(*indices.shape, w.shape[-1])
    term = log_w.gather(-1, indices[..., None]).squeeze(-1) + values.gather(-1, indices)
    return torch.where(best == -torch.inf, best, term)


def log_einsum_exp_backward(
    dout: Tensor,
    w: Tensor,
    values: Tensor,
    out: Tensor,
    norm: str = "logits",
    scaled: ScaledWeights | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients ``(dw, dvalues)`` of :func:`log_einsum_exp` from its result.

    Call this function if there is no autograd graph. With log-weights and ``dout`` 1 at a root, the
    gradients are the flows of a circuit: the expected numbers of uses of units and weights.

    Args:
        dout: Gradient of ``out``, in its shape.
        w: Weights of :func:`log_einsum_exp`. Unlike in that function, a matrix that is expanded
            over the rows is used as one matrix per row.
        values: Log-values, see :func:`log_einsum_exp`.
        out: Result of :func:`log_einsum_exp`.
        norm: Meaning of ``w``, see :func:`log_einsum_exp`.
        scaled: Scaled weights, see :func:`log_einsum_exp`.

    Raises:
        ValueError: If a shape, dtype or device is wrong.

    Source: Darwiche 2003, section 3.
    """
    return _c.log_einsum_exp_backward.default(
        dout, w, values, out, norm, True, True, *(scaled or (None, None))
    )


@fake("log_einsum_exp_backward")
def _fake_exp_backward(
    dout: Tensor, w: Tensor, values: Tensor, out: Tensor, norm: str, *rest: Any
) -> tuple[Tensor, Tensor]:
    need_dw, need_dvalues = rest[:2]
    dw = w.new_empty(w.shape if need_dw else 0)
    return dw, values.new_empty(values.shape if need_dvalues else 0)


def _save_exp_backward(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    dout, w, values, _, ctx.norm, *_ = inputs
    ctx.save_for_backward(dout, w, values)
    ctx.set_materialize_grads(False)


@backward("log_einsum_exp_backward", save=_save_exp_backward)
def _exp_double_backward(
    library: Any, ctx: Any, ddw: Tensor | None, ddvalues: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Differentiate the reference implementation with torch.

    This is slow and stores all terms, which is acceptable because second derivatives are rare.
    """
    again = torch.is_grad_enabled()  # The caller may compute a third derivative.
    with torch.enable_grad():
        # The gradients are with respect to views, so that they do not include a dependence of dout
        # on w or values.
        leaves = [
            t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in ctx.saved_tensors
        ]
        dout, w, values = leaves
        out = reference.log_einsum_exp(w, values, ctx.norm)
        first = torch.autograd.grad(out, (w, values), dout, create_graph=True)
        given = zip(first, (ddw, ddvalues), strict=True)
        pairs = [(g, d) for g, d in given if d is not None and d.numel()]
        outputs, ahead = [g for g, _ in pairs], [d for _, d in pairs]
        grads = torch.autograd.grad(outputs, leaves, ahead, create_graph=again, allow_unused=True)
    # `out` gets no gradient, since it depends on w and values, whose gradients include its share.
    return *grads, *(None,) * 6


def log_bmm(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``out[m, n] = log sum_k exp(a[m, k] + b[k, n])`` of each pair of matrices in a batch.

    This is :func:`log_einsum_exp` with log-weights ``b``: exact at ``-inf``, twice differentiable.

    Args:
        a: ``(B, M, K)`` float32, or float64 on the CPU.
        b: ``(B, K, N)``, dtype and device of ``a``.

    Returns:
        ``(B, M, N)`` in the dtype of ``a``.

    Raises:
        ValueError: If a shape, dtype or device is wrong.
    """
    floats = torch.float32, torch.float64
    require_tensor("log_bmm", "a", a, "(B, M, K)", None, *floats)
    require_tensor("log_bmm", "b", b, "(B, K, N)", None, *floats)
    fits = a.dtype == b.dtype and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1]
    wanted = "shapes (B, M, K) and (B, K, N) of one dtype"
    found = " and ".join(f"{t.dtype} of shape {tuple(t.shape)}" for t in (a, b))
    require(fits, "log_bmm", "a and b", wanted, found)
    refuse_tangents("log_bmm", a, b)
    return _c.log_einsum_exp.default(b.transpose(1, 2), a, "none", "fp32")
