"""Which block an autograd node was made in, for layers that a backward computes again.

Activation checkpointing runs a layer a second time, in the backward: after its block, perhaps, and
on a GPU in another thread. It must see what it saw in the forward. Autograd numbers the nodes that
a thread makes, so it is enough to note at which number a thread entered and left a block; the node
that the backward is busy with then tells the block. Reentrant checkpoints make their node before
their forward, others save their tensors in nodes made during it: the node is the region's own.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from typing import Any, Generic, TypeVar

import torch

Block = TypeVar("Block")

_MOST = 128  # changes remembered per thread: of so many forwards the gradients may be added up


class _Timeline(Generic[Block]):
    """The blocks of one thread: from node number ``starts[i]`` on, ``blocks[i]``."""

    def __init__(self) -> None:
        self.starts = [0]
        self.blocks: list[Block | None] = [None]

    def note(self, block: Block | None) -> None:
        now = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
        if self.starts[-1] == now:  # no node since the last change: serving leaves no trace
            self.starts.pop()
            self.blocks.pop()
        if not self.blocks or self.blocks[-1] is not block:
            self.starts.append(now)
            self.blocks.append(block)
        if len(self.starts) > _MOST:
            del self.starts[0], self.blocks[0]

    def at(self, number: int) -> Block | None:
        found = bisect.bisect_right(self.starts, number) - 1
        if found < 0:
            raise RuntimeError(
                "adapters: a layer is computed again in the backward, and its block was left so "
                f"long ago that it is forgotten, {_MOST} changes of the block since; call "
                "backward() earlier"
            )
        return self.blocks[found]


class _Thread(threading.local):
    """What a thread knows of blocks."""

    def __init__(self) -> None:
        self.timeline: _Timeline[Any] | None = None
        self.last: Any = ...  # the block that was noted last; at first something that is no block
        self.resolved: tuple[tuple[int, int], Any] = ((-1, -1), None)
        self.looked: dict[int, int] = {}  # by pool, when it was asked who else has blocks


here = _Thread()
_timelines: deque[_Timeline[Any]] = deque(maxlen=64)  # of threads, also of those that have ended


def note(block: Any) -> None:
    """From now on this thread's nodes are made in ``block``; not for use inside a backward."""
    if here.timeline is None:
        here.timeline = _Timeline()
        _timelines.append(here.timeline)
    here.timeline.note(block)
    here.last = block


def block_of_forward(task: int) -> Any:
    """The block in which the node was made that this thread's backward, autograd's number ``task``,
    is busy with; a RuntimeError where threads have different answers, or the node is too old."""
    node = torch._C._current_autograd_node()
    if node is None:  # a callback at the end of the backward
        return None
    key = (task, node._sequence_nr())  # pyright: ignore[reportAttributeAccessIssue]
    known, block = here.resolved
    if known == key:
        return block
    if here.timeline is not None:
        block = here.timeline.at(key[1])
    else:  # a thread of autograd's own, which serves a device
        found = [line.at(key[1]) for line in list(_timelines) if line.starts != [0]]
        block = found[0] if found else None
        if any(other is not block for other in found):
            raise RuntimeError(
                "adapters: a layer is computed again in the backward, and several threads have "
                "had blocks that may be those of its forward; give adapter_ids, or train in one "
                "thread"
            )
    here.resolved = (key, block)
    return block
