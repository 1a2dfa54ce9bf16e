"""NaN among leaf logits makes its row NaN, although a maximum in hardware ignores NaN."""

from __future__ import annotations

import pytest
import torch
from backends import Backend

from lora_ext import ops


@pytest.mark.parametrize("vocab", [5, 70, 20000])
@pytest.mark.parametrize("other", [0.0, -torch.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_leaf_with_nan_makes_only_its_row_nan(
    backend: Backend, vocab: int, other: float, place: int
) -> None:
    for dtype in backend.dtypes():
        leaf = torch.full((2, 1, 2, vocab), other, dtype=dtype)
        leaf[:, :, :, 1] = 2  # Row 1 has a possible token and no NaN.
        leaf[0, :, :, 1] = other
        leaf[0, 0, 1, place] = torch.nan
        x = torch.ones(2, 1, dtype=torch.long)
        leaf, x = leaf.to(backend.device), x.to(backend.device)
        prefix = ops.circuit_scan("cp", leaf, x=x).prefix
        assert prefix[0].isnan().all() and prefix[1].isfinite().all()
