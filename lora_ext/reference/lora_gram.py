"""Inner products of adapters, one formula per function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .lora import accumulator


def lora_gram(
    a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """``a @ a^T`` and ``b^T @ b`` of every adapter, ``(r, r)`` each, not rounded."""
    wide_a = [t.to(dtype or accumulator(t.dtype)) for t in a]
    wide_b = [t.to(dtype or accumulator(t.dtype)) for t in b]
    return [t @ t.T for t in wide_a], [t.T @ t for t in wide_b]


def lora_pair_stats(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    projected_b: Sequence[Tensor],
    scaling: Sequence[float],
) -> Tensor:
    """``(|D|^2, |PD|^2, <PD, D>, |PD - D|^2)`` of every adapter, ``(L, 4)`` float64.

    ``D = scaling * b @ a`` and ``PD = scaling * projected_b @ a`` are formed here.
    """
    rows: list[Tensor] = []
    for a_s, b_s, p_s, s in zip(a, b, projected_b, scaling, strict=True):
        d, pd = s * (b_s.double() @ a_s.double()), s * (p_s.double() @ a_s.double())  # (O, I)
        rows.append(
            torch.stack([(d * d).sum(), (pd * pd).sum(), (pd * d).sum(), (pd - d).square().sum()])
        )
    return torch.stack(rows) if rows else torch.zeros(0, 4, dtype=torch.float64)
