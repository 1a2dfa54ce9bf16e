"""Sums in one fixed order, on every device and for any number of threads.

torch adds with atomics where indices repeat, on the CPU in ``index_put_`` and on CUDA in
``index_add_``; the other of the two goes through the entries in order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_at(target: Tensor, index: Tensor, values: Tensor) -> None:
    """Add ``values[..., j]`` to ``target[..., index[j]]`` in place; indices may repeat.

    ``target`` has one dimension or two, ``index`` one.
    """
    if target.device.type == "cpu":
        target.index_add_(-1, index, values)
    else:
        every = [None] * (target.dim() - 1)
        torch.ops.aten.index_put_(target, [*every, index], values, True)


def sums_at(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Return values added up by index in float64, ``(size,)``: long sums of small counts lose
    nothing."""
    sums = torch.zeros(size, dtype=torch.float64, device=values.device)
    add_at(sums, index.flatten(), values.double().flatten())
    return sums


def in_rows(t: Tensor) -> Tensor:
    """Return ``t`` below a new first axis, which shows it twice where it is one row and nothing
    else.

    torch cuts the sum of a single long row among its threads, the sums of two rows never.
    """
    return t.expand(2, *t.shape) if t.numel() == t.shape[-1] else t[None]


def last_sum(t: Tensor) -> Tensor:
    """Return ``t.sum(-1)``."""
    return in_rows(t).sum(-1)[0]
