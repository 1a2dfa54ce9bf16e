"""Sums in one fixed order, on every device and for any number of threads.

If indices repeat, ``index_put_`` on the CPU and ``index_add_`` on CUDA add with atomics, in an
order that may vary. ``index_add_`` on the CPU and ``index_put_`` on CUDA add in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_at(target: Tensor, index: Tensor, values: Tensor) -> None:
    """Add ``values[..., j]`` to ``target[..., index[j]]`` in place; indices may repeat.

    ``target`` has one or two dimensions, ``index`` has one.
    """
    if target.device.type == "cpu":
        target.index_add_(-1, index, values)
    else:
        every = [None] * (target.dim() - 1)
        torch.ops.aten.index_put_(target, [*every, index], values, True)


def sums_at(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the sums of ``values`` by index, ``(size,)``.

    They are float64, because long sums of small counts would lose digits in float32.
    """
    sums = torch.zeros(size, dtype=torch.float64, device=values.device)
    add_at(sums, index.flatten(), values.double().flatten())
    return sums


def in_rows(t: Tensor) -> Tensor:
    """Return ``t`` with a new first axis, of size 2 if ``t`` is a single row and 1 otherwise.

    torch divides the sum of a single long row among its threads, so the bits of the sum would
    depend on the number of threads. It does not divide the sums of two rows.
    """
    return t.expand(2, *t.shape) if t.numel() == t.shape[-1] else t[None]


def last_sum(t: Tensor) -> Tensor:
    """Return ``t.sum(-1)`` in an order independent of the number of threads."""
    return in_rows(t).sum(-1)[0]
