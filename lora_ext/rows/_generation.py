"""Functions that change the current blocks when ``generate`` or a server changes a batch's rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import _context
from ._activation import Activated
from ._assignment import Assignment
from ._attachment import Places
from ._context import Block, EntryPoint, innermost, innermost_of, outwards
from ._entries import Members, name_of, weights_of


def generation_scope() -> contextlib.AbstractContextManager[None]:
    """Return a context manager that restores the current ``adapters`` blocks on exit. Inside it,
    functions of this module may replace the blocks."""
    return _context.entered(innermost())


def repeat_rows(handle: int, count: int) -> None:
    """Make each entry of a pool's blocks apply to ``count`` consecutive sequences from now on.

    ``generate`` repeats each sequence of a batch ``count`` times for beams or returned sequences.
    """

    def repeat(block: Block) -> Assignment:
        assignment = block.assignment
        changes = block.handle == handle and assignment.repeat != count
        return assignment.times(count) if changes else assignment

    change_blocks(repeat)


def select_rows(rows: Tensor | Sequence[int], batch: int) -> None:
    """Restrict the current blocks to some rows of the batch, for all later forwards.

    Only blocks with one name per row of the batch are changed.

    Args:
        rows: Indices of the rows, in their new order.
        batch: Number of rows of the current batch.
    """
    chosen = [int(row) for row in (rows.tolist() if isinstance(rows, Tensor) else rows)]
    change_blocks(lambda block: block.assignment.select(chosen, batch))


def change_blocks(assign: Callable[[Block], Assignment]) -> None:
    """Replace the assignments of the current blocks until a :func:`generation_scope` is left."""

    def change(block: Block) -> Block:
        assignment = assign(block)
        same = assignment is block.assignment
        return block if same else replace(block, assignment=assignment)

    _context.put(_mapped(innermost(), change))


def _mapped(block: Block | None, change: Callable[[Block], Block]) -> Block | None:
    """Apply ``change`` to a block and its outer blocks, and return the new block.

    Blocks that do not change are not copied.
    """
    if block is None:
        return None
    outer, changed = _mapped(block.outer, change), change(block)
    return changed if changed.outer is outer else replace(changed, outer=outer)


def has_activated() -> bool:
    """Return whether a current block has activated adapters."""
    blocks = outwards(innermost()) if _context.any_activated else ()
    return any(isinstance(block.assignment, Activated) for block in blocks)


def activated_in(handle: int) -> Activated | None:
    """Return the assignment of a pool's innermost block if it is :class:`Activated`, else None."""
    block = innermost_of(innermost(), handle) if _context.any_activated else None
    found = None if block is None else block.assignment
    return found if isinstance(found, Activated) else None


def prompt_known(input_ids: Tensor | None, origin: int = 0) -> None:
    """Store in the current blocks the positions at which activated adapters start in the prompts.

    The starts are valid until the surrounding :func:`generation_scope` is left. If starts were
    passed to a block, they remain unchanged.

    Args:
        input_ids: Token ids ``(B, T)`` of the prompts.
        origin: Number of tokens before the first one of ``input_ids``.

    Raises:
        ValueError: If a block needs ids and they are None or have a wrong number of rows.
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
    """Set the adapter of each token for the layers of a forward, during a ``with`` block.

    Args:
        input_ids: Token ids ``(B, T)`` of the forward, or None.
        rows: Number B of sequences.
        length: Number T of tokens.
        past: Number of tokens in the cache.
        kept: ``logits_to_keep`` of the forward: number of last tokens that the output head
            receives, or indices of the tokens that it receives; 0 for all tokens.

    Raises:
        ValueError: See :meth:`Activated.of_forward`.
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
    """Return the block of the output head, which receives the tokens ``kept``."""
    if not isinstance(found.places, Tensor):
        return block.head
    index: Any = slice(None)
    if isinstance(kept, Tensor):
        index = kept.to(found.places.device)
    elif kept:
        index = slice(-kept, None)
    places, weights = found.places.view(found.shape)[:, index], found.weights
    if isinstance(weights, Tensor):
        weights = weights.view(*found.shape, -1)[:, index].flatten(0, 1)
    shape = tuple(places.shape)
    assignment = Assignment(found.names, places.flatten(), shape, weights=weights)
    return replace(block, assignment=assignment, head=None)


def packed_block(
    handle: int, num_slots: int, runs: Sequence[tuple[Members, int, int]], kept: list[int] | None
) -> Block:
    """Return a block for one step of a server, with activations ``(1, tokens, features)``.

    The tokens are divided into runs of consecutive tokens of one request with one adapter. A
    request has two runs if an activated adapter begins inside the step: the first run then uses
    the base model. Other requests have one run. The caller keeps the adapters pinned in the step.

    Args:
        handle: Number of the pool.
        num_slots: Number of slots of the pool.
        runs: For each run, the adapters with their weights, the slot (-1 for the base model) and
            the number of tokens. Two versions of an adapter have different slots.
        kept: For each token that the output head receives, the index of its run; the head's input
            is then ``(1, len(kept), features)``. None if the head receives all tokens.
    """
    members, slots, lengths = zip(*runs, strict=True)
    distinct: dict[int, Any] = {slot: name_of(each) for each, slot, _ in runs if each}
    weights = weights_of(members)
    place = {slot: i for i, slot in enumerate(distinct)}
    each = torch.tensor([place.get(slot, -1) for slot in slots])
    of_runs = None if weights is None else torch.tensor(weights, dtype=torch.float32)

    def block(of_tokens: Tensor, head: Block | None = None) -> Block:
        own = None if of_runs is None else of_runs[of_tokens]
        shape, places = (1, len(of_tokens)), each[of_tokens]
        assignment = Assignment(tuple(distinct.values()), places, shape, weights=own)
        return Block(
            handle,
            Places(),
            assignment,
            slots=tuple(distinct),
            num_slots=num_slots,
            outer=innermost(),
            entry=EntryPoint(),
            packed=True,
            head=head,
        )

    head = None if kept is None else block(torch.tensor(kept))
    return block(torch.arange(len(slots)).repeat_interleave(torch.tensor(lengths)), head)
