"""Chunks of rows, so that what a layer computes between its input and output stays small."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

_ELEMENTS = 1 << 24  # of the largest tensor between a chunk's rows and its result


def rows_per_chunk(elements_per_row: int) -> int:
    """Return how many rows make one chunk, when each of them needs so many elements at once."""
    return max(1, _ELEMENTS // elements_per_row)


def recomputed(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """Return ``function(*args)``, whose intermediate tensors the backward computes again."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]
