"""Blocks for servers that pack tokens of many requests into one row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .assignment import Assignment
from .context import Block, innermost
from .entry import Entry
from .layer_names import Places


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
