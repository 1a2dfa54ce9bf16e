"""Mixtures of normalised hidden states of several layers, one formula per function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._lora import accumulator


def depth_norm(
    hidden: Tensor, gamma: Tensor, eps: float, beta: Tensor | None = None, norm: str = "rms"
) -> Tensor:
    """Compute ``gamma * h / sqrt(mean(h^2) + eps) + beta`` of each hidden state.

    ``norm="layer"`` first subtracts the mean of ``h``. The result is float32 (float64 for float64),
    not rounded to the dtype of ``hidden``.
    """
    wide = accumulator(hidden.dtype)
    h = hidden.to(wide)
    if norm == "layer":
        h = h - h.mean(-1, keepdim=True)
    n = gamma.to(wide) * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps))
    return n if beta is None else n + beta.to(wide)


def depth_mix(
    hiddens: Sequence[Tensor],
    gammas: Tensor | Sequence[Tensor],
    weights: Tensor,
    eps: float,
    betas: Tensor | Sequence[Tensor] | None = None,
    norm: str = "rms",
) -> Tensor:
    """Compute ``u[t] = sum_e weights[t, e] * depth_norm(hiddens[e])[t]``, rounded once."""
    mixed = _mix(_norms(hiddens, gammas, eps, betas, norm), weights)
    return mixed.to(hiddens[0].dtype)


def depth_mix_routed(
    hiddens: Sequence[Tensor],
    gammas: Tensor | Sequence[Tensor],
    router: Tensor,
    bias: Tensor,
    eps: float,
    betas: Tensor | Sequence[Tensor] | None = None,
    norm: str = "rms",
) -> tuple[Tensor, Tensor]:
    """Compute the mix with ``weights = softmax(router @ n_k + bias)``; return it and the weights.

    ``n_k`` is the last hidden state, normalised and not rounded.
    """
    norms = _norms(hiddens, gammas, eps, betas, norm)
    wide = norms[-1].dtype
    logits = norms[-1] @ router.to(wide).T + bias.to(wide)  # (..., k)
    weights = logits.softmax(-1)
    return _mix(norms, weights).to(hiddens[0].dtype), weights


def _norms(
    hiddens: Sequence[Tensor],
    gammas: Tensor | Sequence[Tensor],
    eps: float,
    betas: Tensor | Sequence[Tensor] | None,
    norm: str,
) -> list[Tensor]:
    shifts = [None] * len(hiddens) if betas is None else list(betas)
    return [
        depth_norm(h, gamma, eps, beta, norm)
        for h, gamma, beta in zip(hiddens, gammas, shifts, strict=True)
    ]


def _mix(norms: Sequence[Tensor], weights: Tensor) -> Tensor:
    w = weights.to(norms[0].dtype)
    mixed = w[..., 0, None] * norms[0]
    for e, n in enumerate(norms[1:], 1):
        mixed = mixed + w[..., e, None] * n
    return mixed
