"""Changes to the inputs of an op that make it raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Change = Callable[[dict[str, Any]], dict[str, Any]]


def is_(**named: Any) -> Change:
    """Return a change that replaces the named arguments."""
    return lambda i: named


def cut(name: str, dim: int = 0) -> Change:
    """Return a change that removes the first entry of an argument along a dimension."""
    return lambda i: {name: i[name].narrow(dim, 1, i[name].shape[dim] - 1)}


def cast(*names: str, dtype: torch.dtype) -> Change:
    """Return a change that converts the named arguments to another dtype."""
    return lambda i: {name: i[name].nan_to_num(0).to(dtype) for name in names}


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
