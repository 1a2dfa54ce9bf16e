"""What ``generate`` does to the rows of a batch, done to the blocks around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from . import context
from .assignment import Assignment
from .context import Block


@contextlib.contextmanager
def generation_scope() -> Iterator[None]:
    """What :func:`repeat_rows` and :func:`select_rows` do lasts until this block is left."""
    with context.entered(context.innermost()):
        yield


def repeat_rows(handle: int, count: int) -> None:
    """From now on every sequence comes ``count`` times in a row, as ``generate`` expands a batch.

    Args:
        handle: of the pool whose block it is. count: of beams or returned sequences.
    """

    def repeat(block: Block) -> Assignment:
        assignment = block.assignment
        changes = block.handle == handle and assignment.repeat != count
        return assignment.times(count) if changes else assignment

    change_blocks(repeat)


def select_rows(rows: Tensor | Sequence[int], batch: int) -> None:
    """From now on the forwards see these rows alone, in this order, of a batch.

    Every block around that has a name for each row of the batch follows; names for all rows stay,
    and so do blocks of another number of names.

    Args:
        rows: numbers of rows, ``(n,)``. batch: how many rows there were.
    """
    chosen = [int(row) for row in (rows.tolist() if isinstance(rows, Tensor) else rows)]
    change_blocks(lambda block: block.assignment.select(chosen, batch))


def change_blocks(assign: Callable[[Block], Assignment]) -> None:
    """Put blocks with other assignments in the place of those around, until a
    :func:`generation_scope` is left."""

    def changed(block: Block | None) -> Block | None:
        if block is None:
            return None
        outer, assignment = changed(block.outer), assign(block)
        if outer is block.outer and assignment is block.assignment:
            return block
        return replace(block, assignment=assignment, outer=outer)

    context.put(changed(context.innermost()))
