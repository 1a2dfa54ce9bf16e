"""Helpers for layers that process rows in chunks, to keep intermediate tensors small."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

_ELEMENTS = 1 << 24  # maximum number of elements of an intermediate tensor of one chunk


def rows_per_chunk(elements_per_row: int) -> int:
    """Return the number of rows per chunk if each row needs ``elements_per_row`` elements."""
    return max(1, _ELEMENTS // elements_per_row)


def recomputed(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """Compute ``function(*args)``, and recompute its intermediate tensors in the backward."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]
