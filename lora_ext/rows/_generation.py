"""What ``generate`` and servers do to the rows of a batch, done to the blocks around them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import _context
from ._activation import Activated
from ._assignment import Assignment
from ._attachment import Places
from ._context import Block, Entry, innermost


def generation_scope() -> contextlib.AbstractContextManager[None]:
    """What :func:`repeat_rows` and :func:`select_rows` do lasts until this block is left."""
    return _context.entered(_context.innermost())


def repeat_rows(handle: int, count: int) -> None:
    """From now on every sequence in a block of this pool comes ``count`` times in a row, as
    ``generate`` expands a batch for beams and returned sequences."""

    def repeat(block: Block) -> Assignment:
        assignment = block.assignment
        changes = block.handle == handle and assignment.repeat != count
        return assignment.times(count) if changes else assignment

    change_blocks(repeat)


def select_rows(rows: Tensor | Sequence[int], batch: int) -> None:
    """From now on the forwards see these rows alone, in this order, of so many as ``batch`` says.

    Every block around that has a name for each row of the batch follows; names for all rows stay,
    and so do blocks of another number of names.
    """
    chosen = [int(row) for row in (rows.tolist() if isinstance(rows, Tensor) else rows)]
    change_blocks(lambda block: block.assignment.select(chosen, batch))


def change_blocks(assign: Callable[[Block], Assignment]) -> None:
    """Put blocks with other assignments in the place of those around, until a
    :func:`generation_scope` is left."""

    def change(block: Block) -> Block:
        assignment = assign(block)
        same = assignment is block.assignment
        return block if same else replace(block, assignment=assignment)

    _context.put(_mapped(_context.innermost(), change))


def _mapped(block: Block | None, change: Callable[[Block], Block]) -> Block | None:
    """A block and those around it, each changed; the very blocks where nothing is."""
    if block is None:
        return None
    outer, changed = _mapped(block.outer, change), change(block)
    return changed if changed.outer is outer else replace(changed, outer=outer)


def has_activated() -> bool:
    """Whether a block around has adapters that begin in mid-sequence."""
    block = _context.innermost() if _context.any_activated else None
    while block is not None and not isinstance(block.assignment, Activated):
        block = block.outer
    return block is not None


def activated_in(handle: int) -> Activated | None:
    """Where adapters begin in the innermost block of a pool; None where all serve all tokens."""
    block = _context.innermost() if _context.any_activated else None
    while block is not None and block.handle != handle:
        block = block.outer
    found = None if block is None else block.assignment
    return found if isinstance(found, Activated) else None


def prompt_known(input_ids: Tensor | None, origin: int = 0) -> None:
    """From now on adapters that begin in mid-sequence begin where this prompt invokes them, until a
    :func:`generation_scope` is left. Starts that the blocks' callers gave stay.

    ``origin`` tokens lie before ``input_ids (B, T)``. Where a block needs ids and there are none,
    or of another number of rows than names, a ValueError is raised.
    """
    _change_activated(lambda activated: activated.of_prompt(input_ids, origin))


def _change_activated(change: Callable[[Activated], Assignment]) -> None:
    def assign(block: Block) -> Assignment:
        found = block.assignment
        return change(found) if isinstance(found, Activated) else found

    change_blocks(assign)


@contextlib.contextmanager
def activated_forward(
    input_ids: Tensor | None, rows: int, length: int, past: int, kept: int | Tensor = 0
) -> Iterator[None]:
    """Around a model's forward: its layers see which of its tokens have which adapter.

    Args:
        input_ids: ``(B, T)`` of the forward, or None. rows, length: B and T.
        past: how many tokens its cache has.
        kept: ``logits_to_keep`` of the forward: how many of the last tokens its output head sees,
            or which; 0 is all.

    Raises:
        ValueError: what :meth:`Activated.of_forward` finds.
    """
    if not has_activated():
        yield
        return
    _change_activated(lambda activated: activated.of_forward(input_ids, past))

    def change(block: Block) -> Block:
        if not isinstance(block.assignment, Activated):
            return block
        found = block.assignment.at(past, length, rows)
        return replace(block, assignment=found, head=_head(block, found, kept))

    with _context.entered(_mapped(_context.innermost(), change)):
        yield


def _head(block: Block, found: Assignment, kept: int | Tensor) -> Block | None:
    """What the output head reads of a forward whose tokens differ in their adapters."""
    if not isinstance(found.places, Tensor):
        return block.head
    places = found.places.view(found.shape)
    if isinstance(kept, Tensor):
        places = places[:, kept.to(places.device)]
    elif kept:
        places = places[:, -kept:]
    assignment = Assignment(found.names, places.flatten(), tuple(places.shape))
    return replace(block, assignment=assignment, head=None)


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
