"""What an adapter is to a weight: its product, merged and measured; one formula per function."""

from torch import Tensor

from .lora import accumulator


def lora_delta(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * b @ a``, ``(O, I)``, rounded once."""
    dtype = accumulator(a.dtype)
    return (scale * (b.to(dtype) @ a.to(dtype))).to(a.dtype)


def lora_merge_(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, sign: int = 1) -> Tensor:
    """``weight += sign * scale * b @ a`` in place, rounded once."""
    dtype = accumulator(weight.dtype)
    return weight.copy_(weight.to(dtype) + sign * scale * (b.to(dtype) @ a.to(dtype)))


def lora_dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """``|| weight + scale * b @ a ||`` of every row, ``(O,)``, not rounded.

    Source: DoRA (Liu et al. 2024), eq. 5.
    """
    dtype = accumulator(weight.dtype)
    return (weight.to(dtype) + scale * (b.to(dtype) @ a.to(dtype))).square().sum(1).sqrt()
