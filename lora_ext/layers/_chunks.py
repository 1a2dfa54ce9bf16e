"""Chunks of rows, which keep the intermediate tensors of a layer small."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

_ELEMENTS = 1 << 24  # elements of the largest intermediate tensor of a chunk


def rows_per_chunk(elements_per_row: int) -> int:
    """Return the number of rows of a chunk whose rows need ``elements_per_row`` elements each."""
    return max(1, _ELEMENTS // elements_per_row)


def recomputed(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """Compute ``function(*args)`` and recompute its intermediate tensors in the backward."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]
