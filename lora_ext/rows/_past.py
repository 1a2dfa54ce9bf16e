"""The block of each autograd node, for layers that a backward computes again.

Activation checkpointing runs a layer a second time, in the backward, possibly after its block was
left, and on a GPU in another thread. The layer needs the block of its forward. Autograd numbers the
nodes of a thread. A thread records the numbers at which it enters and leaves blocks, which gives
the block of any node that the backward evaluates. Reentrant checkpoints make their node before
their forward, others save tensors in nodes made during it; both nodes belong to the block of the
checkpointed region.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from typing import Any

import torch

_MOST_CHANGES = 128  # per thread: gradients of as many forwards can be accumulated


class _Timeline:
    """The blocks of one thread: from node number ``starts[i]`` on, ``blocks[i]``."""

    def __init__(self) -> None:
        self.starts: list[int] = [0]
        self.blocks: list[Any] = [None]

    def note(self, block: Any) -> None:
        now = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
        if self.starts[-1] == now:  # no node since the last change, as in serving
            self.starts.pop()
            self.blocks.pop()
        if not self.blocks or self.blocks[-1] is not block:
            self.starts.append(now)
            self.blocks.append(block)
        if len(self.starts) > _MOST_CHANGES:
            del self.starts[0], self.blocks[0]

    def at(self, number: int) -> Any:
        found = bisect.bisect_right(self.starts, number) - 1
        if found < 0:
            raise RuntimeError(
                "adapters: expected the backward of a layer that is computed again within "
                f"{_MOST_CHANGES} changes of the block since its forward, found autograd node "
                f"{number} before node {self.starts[0]}, the oldest known; call backward() earlier"
            )
        return self.blocks[found]


class _Thread(threading.local):
    """State of the current thread."""

    def __init__(self) -> None:
        self.timeline: _Timeline | None = None
        self.last: Any = ...  # the block that was noted last; `...` before the first one
        self.resolved: tuple[tuple[int, int], Any] = ((-1, -1), None)  # last block_of_forward
        # By pool, `_changes` of `_context` at the last search for blocks of other threads.
        self.looked: dict[int, int] = {}


here = _Thread()
_timelines: deque[_Timeline] = deque(maxlen=64)  # of all threads, including finished ones


def note(block: Any) -> None:
    """Set the block of the next autograd nodes of this thread; not for use inside a backward."""
    if here.timeline is None:
        here.timeline = _Timeline()
        _timelines.append(here.timeline)
    here.timeline.note(block)
    here.last = block


def block_of_forward(task: int) -> Any:
    """Return the block of the node that this thread's backward evaluates.

    Args:
        task: Number of the backward in autograd.

    Raises:
        RuntimeError: If the node is too old, or threads have different blocks for its number.
    """
    node = torch._C._current_autograd_node()
    if node is None:  # in a callback at the end of the backward
        return None
    key = (task, node._sequence_nr())  # pyright: ignore[reportAttributeAccessIssue]
    known, block = here.resolved
    if known == key:
        return block
    if here.timeline is not None:
        block = here.timeline.at(key[1])
    else:  # autograd's thread of a device
        found = [line.at(key[1]) for line in list(_timelines) if line.starts != [0]]
        block = found[0] if found else None
        if any(other is not block for other in found):
            raise RuntimeError(
                "adapters: expected one block for the forward of a layer that the backward "
                f"computes again, found different blocks in {len(found)} threads; give "
                "adapter_ids, or train in one thread"
            )
    here.resolved = (key, block)
    return block
