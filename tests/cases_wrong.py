"""Changes of an op's inputs, for the tests of what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Change = Callable[[dict[str, Any]], dict[str, Any]]


def is_(**named: Any) -> Change:
    """Replace arguments."""
    return lambda i: named


def cut(name: str, dim: int = 0) -> Change:
    """Take the first entry of a dimension away."""
    return lambda i: {name: i[name].narrow(dim, 1, i[name].shape[dim] - 1)}


def cast(*names: str, dtype: torch.dtype) -> Change:
    """Convert arguments to another dtype."""
    return lambda i: {name: i[name].nan_to_num(0).to(dtype) for name in names}


def ints(*values: int) -> torch.Tensor:
    """Return an int32 tensor."""
    return torch.tensor(values, dtype=torch.int32)
