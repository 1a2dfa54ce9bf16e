"""Elementwise functions."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "cos": torch.cos,
    "sin": torch.sin,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}


def pointwise(x: Tensor, function: str) -> Tensor:
    """Compute ``function(x)`` in float64."""
    return _FUNCTIONS[function](x.double())
