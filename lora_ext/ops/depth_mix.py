"""Mixture of the normalised hidden states of several layers, in a single pass.

The hidden states are separate tensors and are never stacked. Statistics and sums are float32
(float64 for float64), and every result is rounded once. Results and gradients have the same bits
for any number of threads. Autocast does not affect the ops.

Letters: ``k`` hidden states of a position, 1 to 8; ``d`` features of a hidden state; ``...`` any
shape of positions.

Source: mixture-of-depths ensembles (arXiv 2410.13077). With a linear head, mixing hidden states
equals mixing logits if the weights sum to 1 or the head has no bias.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import FLOATS, choice, number, require, require_dtype, require_shape
from lora_ext.reference import accumulator

from ._registration import fake

_c = torch.ops.lora_ext

MAX_DEPTHS = 8


def depth_mix(
    hiddens: Sequence[Tensor],
    gammas: Tensor | Sequence[Tensor],
    weights: Tensor,
    eps: float,
    betas: Tensor | Sequence[Tensor] | None = None,
    norm: str = "rms",
) -> Tensor:
    """Normalise k hidden states per position and compute their weighted sum.

    ``u = sum_e weights[..., e] * n_e`` with
    ``n_e = gammas[e] * h_e / sqrt(mean(h_e^2) + eps) + betas[e]``; ``norm="layer"`` first subtracts
    the mean of each ``h_e``. Unlike the result of a separate norm, ``n_e`` is not rounded.

    Differentiable once in ``hiddens``, ``gammas``, ``betas`` and ``weights``; each gradient has the
    dtype of its argument. A weight of zero does not mask a NaN. If ``h_e`` is zero, ``n_e`` is
    ``betas[e]``, with finite gradients if ``eps > 0``.

    Args:
        hiddens: k hidden states ``(..., d)`` float16, bfloat16, float32, or float64 on the CPU, of
            one shape, dtype and device. They may have any strides, and are copied only if the
            elements of a row are not contiguous or the rows have no common stride.
        gammas: Scales of the norms, ``(k, d)`` or k tensors ``(d,)``, in any dtype that float32
            (float64 for float64 hiddens) represents exactly: float32 norms work with 16-bit
            hiddens. If dtypes differ among gammas and betas, they are copied to float32.
        weights: Weights of the hidden states, ``(..., k)``, in any dtype allowed for ``gammas``.
        eps: Number added to the mean square, at least 0.
        betas: Shifts of the norms, as ``gammas``, or None for 0.
        norm: Norm, "rms" or "layer".

    Returns:
        ``(..., d)`` in the dtype of the hiddens.

    Raises:
        ValueError: If k is not in 1 to 8, or a shape, dtype or device is wrong.
        RuntimeError: On double backward.

    Source: arXiv 2410.13077, the ensemble of late layers, mixed before the head.
    """
    scales = _rows(gammas), _rows(betas)
    return _c.depth_mix_forward.default(hiddens, *scales, weights, None, None, eps, norm)[0]


def depth_mix_routed(
    hiddens: Sequence[Tensor],
    gammas: Tensor | Sequence[Tensor],
    router: Tensor,
    bias: Tensor,
    eps: float,
    betas: Tensor | Sequence[Tensor] | None = None,
    norm: str = "rms",
) -> tuple[Tensor, Tensor]:
    """Mix as :func:`depth_mix` does, with weights computed from the last hidden state.

    ``weights = softmax(router @ n_k + bias)`` of each position, where ``n_k`` is the last hidden
    state, normalised and not rounded. Differentiable once in all tensors and through both results;
    the gradient of ``n_k`` includes the part through the router.

    Args:
        hiddens: Hidden states, see :func:`depth_mix`.
        gammas: Scales of the norms, see :func:`depth_mix`.
        router: Weight of the router, ``(k, d)``, in any dtype allowed for ``gammas``.
        bias: Bias of the router, ``(k,)``, in any dtype allowed for ``gammas``.
        eps: Number added to the mean square, at least 0.
        betas: Shifts of the norms, see :func:`depth_mix`.
        norm: Norm, "rms" or "layer".

    Returns:
        The mix ``(..., d)`` in the dtype of the hiddens, and the weights ``(..., k)`` in float32
        (float64 for float64).

    Raises:
        ValueError: As for :func:`depth_mix`.
        RuntimeError: On double backward.
    """
    scales = _rows(gammas), _rows(betas)
    return _c.depth_mix_forward.default(hiddens, *scales, None, router, bias, eps, norm)[:2]


def _rows(vectors: Tensor | Sequence[Tensor] | None) -> Sequence[Tensor]:
    if vectors is None:
        return []
    if isinstance(vectors, Tensor):
        return vectors.unbind(0) if vectors.dim() else [vectors]
    return vectors


@fake("depth_mix_forward")
def _fake_mix(
    hiddens: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    weights: Tensor | None,
    router: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "depth_mix" if router is None else "depth_mix_routed"
    count = len(hiddens)
    require(1 <= count <= MAX_DEPTHS, op, "hiddens", f"1 to {MAX_DEPTHS} tensors", count)
    h = hiddens[0]
    fits = h.dim() >= 1 and h.shape[-1] >= 1
    require(fits, op, "hiddens[0]", "shape (..., d) with d >= 1", list(h.shape))
    require_dtype(op, "hiddens[0]", h, *FLOATS)
    width, sums = h.shape[-1:], accumulator(h.dtype)

    def check_place(name: str, t: Tensor, letters: str, shape: Sequence[int]) -> None:
        require_shape(op, name, t, letters, shape)
        require(t.device == h.device, op, name, f"a tensor on {h.device}", t.device)

    def check_like(name: str, t: Tensor, letters: str, shape: Sequence[int]) -> None:
        check_place(name, t, letters, shape)
        exact = t.dtype.is_floating_point and torch.promote_types(t.dtype, sums) == sums
        require(exact, op, name, f"a dtype that {sums} holds exactly", t.dtype)

    for e, other in enumerate(hiddens[1:], 1):
        check_place(f"hiddens[{e}]", other, "of hiddens[0]", h.shape)
        known = f"the dtype of hiddens[0], {h.dtype}"
        require(other.dtype == h.dtype, op, f"hiddens[{e}]", known, other.dtype)
    for name, scales in (("gammas", gammas), ("betas", betas)):
        if name == "gammas" or scales:
            require(len(scales) == count, op, name, f"{count} tensors, as hiddens", len(scales))
        for e, t in enumerate(scales):
            check_like(f"{name}[{e}]", t, "(d,)", width)
    number(op, "eps", eps, 0, math.inf, expected="at least 0")
    choice(op, "norm", norm, ("rms", "layer"), expected="'rms' or 'layer'")
    each = (*h.shape[:-1], count)
    one = (weights is None) != (router is None) and (router is None) == (bias is None)
    require(one, op, "weights", "weights, or a router and its bias", "neither or both")
    if weights is not None:
        check_like("weights", weights, "(..., k)", each)
    if router is not None and bias is not None:
        check_like("router", router, "(k, d)", (count, *width))
        check_like("bias", bias, "(k,)", (count,))
    rows = math.prod(h.shape[:-1])
    return (
        h.new_empty(h.shape),
        h.new_empty(0 if router is None else each, dtype=sums),
        h.new_empty((rows, count), dtype=sums),
        h.new_empty((rows, count) if norm == "layer" else 0, dtype=sums),
    )


@fake("depth_mix_backward")
def _fake_mix_backward(
    dmixed: Tensor, dweights: Any, hiddens: list[Tensor], gammas: Any, betas: Any, *rest: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    h, count = hiddens[0], len(hiddens)
    _, router, rinv, _, need_hiddens = rest
    vectors = count + len(betas) + (0 if router is None else count)
    size = vectors * h.shape[-1] + (0 if router is None else count)
    dhiddens = [t.new_empty(t.shape) for t in hiddens] if need_hiddens else []
    sums = rinv.new_empty(size)
    return dhiddens, sums, rinv.new_empty((*h.shape[:-1], count))
