"""What ``generate`` and servers do to the rows of a batch, done to the blocks around them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import context
from .assignment import Assignment
from .attachment import Places
from .context import Block, Entry, innermost


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


def packed_block(
    handle: int,
    num_slots: int,
    names: Sequence[str | None],
    slots: Sequence[int],
    lengths: Sequence[int],
    kept: Sequence[int] | None = None,
) -> Block:
    """A block for activations ``(1, sum of lengths, features)``, to be entered around one step.

    Whoever calls it keeps the adapters pinned for the step.

    Args:
        handle: of the pool. num_slots: how many it has.
        names, slots: of each request's adapter; slot -1 is the base model.
        lengths: how many tokens each request has in the row.
        kept: the requests, by their places, whose tokens the output head sees, one each and in this
            order: it gets ``(1, len(kept), features)``. None: it sees all tokens.
    """
    distinct = {slot: name for name, slot in zip(names, slots, strict=True) if slot >= 0}
    place = {slot: i for i, slot in enumerate(distinct)}
    each = torch.tensor([place.get(slot, -1) for slot in slots])

    def block(places: Tensor, head: Block | None = None) -> Block:
        assignment = Assignment(tuple(map(str, distinct.values())), places, (1, len(places)))
        return Block(
            handle,
            Places(),
            assignment,
            tuple(distinct),
            num_slots,
            innermost(),
            Entry(),
            packed=True,
            head=head,
        )

    head = None if kept is None else block(each[list(kept)])
    return block(each.repeat_interleave(torch.tensor(lengths)), head)
