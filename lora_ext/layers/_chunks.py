"""Helpers for layers that process rows in chunks, to keep intermediate tensors small."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

_ELEMENTS = 1 << 24  # maximum number of elements of an intermediate tensor in one chunk


def rows_per_chunk(elements_per_row: int) -> int:
    """Return the rows per chunk if an intermediate tensor has this many elements per row."""
    return max(1, _ELEMENTS // elements_per_row)


def recomputed(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """Return ``function(*args)``; backward recomputes its intermediate tensors."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]
