"""Substitute for torch's 16-bit CPU products that reads past the end of rows, as AMX does."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

_HALVES = (torch.float16, torch.bfloat16)
_BEHIND = 32  # number of elements read past the end of each row


def _behind(left: Tensor) -> Tensor:
    """Return 0 times the sum of the numbers behind each row, ``(T, 1)``. It is NaN if one of these
    numbers is not finite. Numbers beyond the end of the memory count as 0."""
    whole = torch.empty(0, dtype=left.dtype).set_(left.untyped_storage())
    padded = F.pad(whole, (0, _BEHIND))
    start = left.storage_offset() + left.shape[1]
    rows = padded.as_strided((left.shape[0], _BEHIND), (left.stride(0), 1), start)
    return (0 * rows.float()).sum(1, keepdim=True)


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype not in _HALVES:
        return torch.bmm(left[None], right[None])[0]
    y = torch.bmm(left.float()[None], right.float()[None])[0]
    if left.numel() and left.stride(1) == 1 and left.shape[1] % 32:
        y = y + _behind(left)
    return y.to(left.dtype)


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1):
    y = alpha * _mm(left, right)
    return y if beta == 0 else y + beta * bias


def _mm_out(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(_mm(left, right))


@contextmanager
def reading_behind() -> Iterator[None]:
    """Replace ``mm`` and ``addmm`` on the CPU, for calls from Python and from C++.

    Each 16-bit product adds 0 times the 32 numbers behind each row of its left operand, unless the
    width is a multiple of 32. The result is thus NaN if one of these numbers is not finite.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name, function in {"mm": _mm, "mm.out": _mm_out, "addmm": _addmm}.items():
            library.impl(name, function, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
