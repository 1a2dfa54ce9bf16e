"""Lookup of the ``adapters`` block of each autograd node, for layers recomputed in backward.

Activation checkpointing recomputes a layer in the backward pass. The layer needs the block of its
forward, but this block may already have been exited, and on a GPU autograd runs the backward in
another thread. The block is therefore looked up by the autograd node that the backward evaluates:

* Autograd numbers the nodes that a thread creates: 0, 1, 2, ...
* Whenever a thread enters or exits a block, it records the number of its next node. These records
  determine which block was innermost when each node of the thread was created.
* The backward recomputes a checkpointed region while it evaluates a node of that region. A
  reentrant checkpoint creates this node just before the forward of the region; other checkpoints
  use the nodes created during the forward. In both cases the node was created in the block of the
  region.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from typing import Any

import torch

_MOST_CHANGES = 128  # maximum number of records per thread; a forward in a block needs up to two


class _Timeline:
    """Records of the blocks of one thread.

    ``blocks[i]`` was the innermost block for the nodes from number ``starts[i]`` up to, but not
    including, ``starts[i + 1]``.
    """

    def __init__(self) -> None:
        self.starts: list[int] = [0]
        self.blocks: list[Any] = [None]

    def record(self, block: Any) -> None:
        """Record that ``block`` is innermost from the next node on."""
        now = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
        # If no node was created since the last record, as in serving, that record is not needed.
        if self.starts[-1] == now:
            self.starts.pop()
            self.blocks.pop()
        # The record before the removed one may have the same block as the new record.
        if not self.blocks or self.blocks[-1] is not block:
            self.starts.append(now)
            self.blocks.append(block)
        if len(self.starts) > _MOST_CHANGES:
            del self.starts[0], self.blocks[0]

    def at(self, number: int) -> Any:
        found = bisect.bisect_right(self.starts, number) - 1
        if found < 0:
            raise RuntimeError(
                f"adapters: expected the backward of a recomputed layer within {_MOST_CHANGES} "
                f"entries and exits of blocks after its forward, found autograd node {number}, "
                f"older than the oldest known {self.starts[0]}; call backward() earlier"
            )
        return self.blocks[found]


class _Thread(threading.local):
    """State of the current thread."""

    def __init__(self) -> None:
        self.timeline: _Timeline | None = None
        self.last: Any = ...  # the block that was recorded last; `...` before the first record
        # Backward pass and node of the last call of block_of_forward, and the call's result.
        self.resolved: tuple[tuple[int, int], Any] = ((-1, -1), None)
        # Value of `_context._changes` at the last search for other threads' blocks, by pool.
        self.looked: dict[int, int] = {}


here = _Thread()
_timelines: deque[_Timeline] = deque(maxlen=64)  # the latest threads, also finished ones


def record(block: Any) -> None:
    """Record ``block`` as the block of this thread's next autograd nodes, outside a backward."""
    if here.timeline is None:
        here.timeline = _Timeline()
        _timelines.append(here.timeline)
    here.timeline.record(block)
    here.last = block


def block_of_forward(task: int) -> Any:
    """Return the block that was innermost when the node that autograd evaluates was created.

    Args:
        task: Autograd's id of the backward pass that this thread runs.

    Raises:
        RuntimeError: If the node is too old, or if several threads have recorded different blocks
            for its number.
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
    else:
        # This is autograd's thread for a device, which creates no nodes. A node does not say which
        # thread created it, so all threads that have entered a block must have recorded the same
        # block for this number.
        found = [line.at(key[1]) for line in list(_timelines) if line.blocks != [None]]
        block = found[0] if found else None
        if any(other is not block for other in found):
            raise RuntimeError(
                "adapters: expected one block for the forward of a layer that the backward "
                f"recomputes, found different blocks in {len(found)} threads; pass "
                "adapter_ids, or train in one thread"
            )
    here.resolved = (key, block)
    return block
