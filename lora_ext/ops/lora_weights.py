"""What an adapter is to a weight: its product, merged and measured.

All are products of full matrices, done by torch's GEMM on every device: no kernel of this package
has anything to add, and bits may depend on the library's threads. All but :func:`lora_delta` take
no part in autograd. Autocast leaves them alone.

Letters: ``I`` in, ``O`` out, ``r`` the adapter's rank.
"""

from typing import cast

import torch
from torch import Tensor

from lora_ext._checks import require, require_shape
from lora_ext._torch import exactly
from lora_ext.reference import accumulator


def _check(op: str, a: Tensor, b: Tensor, weight: Tensor | None = None) -> None:
    fits = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1]
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    require(fits, op, "a and b", "shapes (r, I) and (O, r)", shapes)
    if weight is not None:
        require_shape(op, "weight", weight, "(O, I)", (b.shape[0], a.shape[1]))
    for name, t in (("a", a), ("b", b), ("weight", a if weight is None else weight)):
        require(t.is_floating_point(), op, name, "a floating dtype", t.dtype)


def _product(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    with exactly(a.device):
        return (b.to(dtype) @ a.to(dtype)).mul_(scale)


def lora_delta(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Return the weight that an adapter adds, ``scale * b @ a``; differentiable, by torch's GEMM.

    Args:
        a: ``(r, I)`` floating.
        b: ``(O, r)``.
        scale: the adapter's scale.

    Returns:
        ``(O, I)`` in the dtype of ``a``, accumulated in float32 (float64), rounded once.

    Raises:
        ValueError: if a shape or dtype disagrees, naming the argument.

    Source: LoRA (Hu et al. 2021), section 4.1.
    """
    _check("lora_delta", a, b)
    return _product(a, b, scale, accumulator(a.dtype)).to(a.dtype)


@torch.no_grad()
def lora_merge_(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, sign: int = 1) -> Tensor:
    """Add an adapter to a weight in place, ``weight += sign * scale * b @ a``, rounded once.

    By torch's GEMM. Taking out (``sign=-1``) what was added does not restore every bit of a rounded
    weight; who needs them keeps a copy.

    Args:
        weight: ``(O, I)`` floating.
        a: ``(r, I)``.
        b: ``(O, r)``.
        scale: the adapter's scale.
        sign: 1 to merge, -1 to take out.

    Returns:
        ``weight``.

    Raises:
        ValueError: if a shape, a dtype or the sign is wrong, naming the argument.

    Source: LoRA (Hu et al. 2021), section 4.1.
    """
    _check("lora_merge_", a, b, weight)
    require(sign in (1, -1), "lora_merge_", "sign", "1 or -1", sign)
    dtype = accumulator(weight.dtype)
    return weight.copy_(_product(a, b, sign * scale, dtype).add_(weight.to(dtype)))


@torch.no_grad()
def lora_dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return the norm of every row of ``weight + scale * b @ a``; ``b @ a`` is not formed.

    ``|w|^2 + 2 scale <w a^T, b> + scale^2 <b (a a^T), b>`` per row, by torch's GEMM. Where the
    adapter all but cancels a row, the difference keeps an absolute error of a few roundings of
    ``|w|^2``: a norm of 1e-2 ``|w|`` is exact to 2e-3 of itself in float32, one of 1e-4 ``|w|`` is
    noise. A row of zeros in ``b`` gives the bits of ``torch.linalg.vector_norm``, with which PEFT's
    magnitudes begin.

    Args:
        weight: ``(O, I)`` floating.
        a: ``(r, I)``.
        b: ``(O, r)``.
        scale: the adapter's scale, a number or a tensor of one.

    Returns:
        ``(O,)`` float32 (float64 for float64).

    Raises:
        ValueError: if a shape or dtype disagrees, naming the argument.

    Source: DoRA (Liu et al. 2024), eq. 5.
    """
    _check("lora_dora_norm", a, b, weight)
    dtype = accumulator(weight.dtype)
    with exactly(weight.device):
        wide, wide_a, wide_b = weight.to(dtype), a.to(dtype), b.to(dtype)
        # torch annotates vector_norm not at all.
        norm = cast(Tensor, torch.linalg.vector_norm(wide, dim=1))  # pyright: ignore[reportUnknownMemberType]
        square = norm.square_()  # whose root gives the norm back
        square += 2 * scale * ((wide @ wide_a.T) * wide_b).sum(1)
        square += scale**2 * ((wide_b @ (wide_a @ wide_a.T)) * wide_b).sum(1)
        return square.clamp_(min=0).sqrt_()
