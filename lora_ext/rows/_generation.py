"""Changes of the blocks around a call, as ``generate`` and servers change the rows of a batch."""

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
from ._context import Block, Entry, innermost, innermost_of, outwards


def generation_scope() -> contextlib.AbstractContextManager[None]:
    """Return a context that ends what :func:`repeat_rows` and :func:`select_rows` do inside."""
    return _context.entered(innermost())


def repeat_rows(handle: int, count: int) -> None:
    """Repeat each sequence of a pool's blocks ``count`` times in a row from now on.

    ``generate`` expands a batch like this for beams and returned sequences.
    """

    def repeat(block: Block) -> Assignment:
        assignment = block.assignment
        changes = block.handle == handle and assignment.repeat != count
        return assignment.times(count) if changes else assignment

    change_blocks(repeat)


def select_rows(rows: Tensor | Sequence[int], batch: int) -> None:
    """Let the coming forwards see only these rows of ``batch``, in this order.

    Every block around with a name for each row of the batch follows. A name for all rows stays, and
    so do blocks with another number of names.
    """
    chosen = [int(row) for row in (rows.tolist() if isinstance(rows, Tensor) else rows)]
    change_blocks(lambda block: block.assignment.select(chosen, batch))


def change_blocks(assign: Callable[[Block], Assignment]) -> None:
    """Give the blocks around other assignments, until a :func:`generation_scope` is left."""

    def change(block: Block) -> Block:
        assignment = assign(block)
        same = assignment is block.assignment
        return block if same else replace(block, assignment=assignment)

    _context.put(_mapped(innermost(), change))


def _mapped(block: Block | None, change: Callable[[Block], Block]) -> Block | None:
    """Return a block and those around it, each changed; the same objects if nothing changes."""
    if block is None:
        return None
    outer, changed = _mapped(block.outer, change), change(block)
    return changed if changed.outer is outer else replace(changed, outer=outer)


def has_activated() -> bool:
    """Return whether a block around has adapters that begin in mid-sequence."""
    blocks = outwards(innermost()) if _context.any_activated else ()
    return any(isinstance(block.assignment, Activated) for block in blocks)


def activated_in(handle: int) -> Activated | None:
    """Return the starts in the innermost block of a pool; None if all adapters serve all tokens."""
    block = innermost_of(innermost(), handle) if _context.any_activated else None
    found = None if block is None else block.assignment
    return found if isinstance(found, Activated) else None


def prompt_known(input_ids: Tensor | None, origin: int = 0) -> None:
    """Set the starts of the blocks around to those in a prompt, until a generation_scope is left.

    Starts that the callers of the blocks gave stay.

    Args:
        input_ids: ``(B, T)``. origin: number of tokens before them.

    Raises:
        ValueError: If a block needs ids and there are none, or they have another number of rows.
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
    """Give the layers of a model's forward the adapter of each token.

    Args:
        input_ids: ``(B, T)`` of the forward, or None. rows, length: B and T.
        past: number of tokens in its cache.
        kept: ``logits_to_keep`` of the forward: number of last tokens that its output head sees,
            or their indices; 0 is all.

    Raises:
        ValueError: As :meth:`Activated.of_forward`.
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

    with _context.entered(_mapped(innermost(), change)):
        yield


def _head(block: Block, found: Assignment, kept: int | Tensor) -> Block | None:
    """Return the output head's block in a forward whose tokens differ in their adapters."""
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
    """Return a block of activations ``(1, sum of lengths, features)``, for one step of a server.

    The caller keeps the adapters pinned for the step.

    Args:
        handle: of the pool. num_slots: its number of slots.
        names, slots: of each request's adapter; slot -1 is the base model.
        lengths: number of tokens of each request in the row.
        kept: indices of the requests of which the output head sees one token each, in this order:
            it gets ``(1, len(kept), features)``. None: it sees all tokens.
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
            slots=tuple(distinct),
            num_slots=num_slots,
            outer=innermost(),
            entry=Entry(),
            packed=True,
            head=head,
        )

    head = None if kept is None else block(each[list(kept)])
    return block(each.repeat_interleave(torch.tensor(lengths)), head)
