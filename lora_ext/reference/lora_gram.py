"""Gram matrices of adapters, and the effect of an adapter on a weight, one formula per function.

Letters: ``I`` input features, ``O`` output features, ``r`` rank of the adapter, ``L`` adapters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._lora import accumulator


def lora_gram(
    a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute ``a @ a^T`` and ``b^T @ b`` of every adapter, ``(r, r)`` each.

    The results have the dtype ``dtype``; if it is None, float32 (float64 for float64 factors).
    """
    wide_a = [t.to(dtype or accumulator(t.dtype)) for t in a]
    wide_b = [t.to(dtype or accumulator(t.dtype)) for t in b]
    return [t @ t.T for t in wide_a], [t.T @ t for t in wide_b]


def lora_pair_stats(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    projected_b: Sequence[Tensor],
    scaling: Sequence[float],
) -> Tensor:
    """Compute ``(|D|^2, |PD|^2, <PD, D>, |PD - D|^2)`` of every adapter, ``(L, 4)`` float64.

    ``D = scaling * b @ a`` and ``PD = scaling * projected_b @ a`` are formed as matrices.
    """
    rows: list[Tensor] = []
    for a_s, b_s, p_s, s in zip(a, b, projected_b, scaling, strict=True):
        d, pd = s * (b_s.double() @ a_s.double()), s * (p_s.double() @ a_s.double())  # (O, I)
        rows.append(
            torch.stack([(d * d).sum(), (pd * pd).sum(), (pd * d).sum(), (pd - d).square().sum()])
        )
    return torch.stack(rows) if rows else torch.zeros(0, 4, dtype=torch.float64)


def lora_delta(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Compute ``scale * b @ a``, ``(O, I)``, rounded once."""
    dtype = accumulator(a.dtype)
    return (scale * (b.to(dtype) @ a.to(dtype))).to(a.dtype)


def lora_merge_(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, sign: int = 1) -> Tensor:
    """Compute ``weight += sign * scale * b @ a`` in place, rounded once."""
    dtype = accumulator(weight.dtype)
    return weight.copy_(weight.to(dtype) + sign * scale * (b.to(dtype) @ a.to(dtype)))


def lora_dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Compute ``|| weight + scale * b @ a ||`` of every row, ``(O,)``.

    The result is float32 (float64 for float64).

    Source: DoRA (Liu et al. 2024), eq. 5.
    """
    dtype = accumulator(weight.dtype)
    return (weight.to(dtype) + scale * (b.to(dtype) @ a.to(dtype))).square().sum(1).sqrt()
