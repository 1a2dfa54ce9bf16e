"""Rows that are images, videos or sounds, and no sequences: each has the adapter of the sequence
that it is in."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import context
from .assignment import Assignment, Batch
from .generation import change_blocks


class Owners(NamedTuple):
    """Whose the media of a batch are."""

    rows: list[int] | None  # the sequence of each unit, in order; None: nobody can tell
    uniform: bool  # a tower has as many rows for each unit
    given: int  # rows of the argument that has them
    sequences: int

    @property
    def in_order(self) -> bool:
        """Whether each sequence has one."""
        return self.rows == list(range(self.sequences))


class _Units(Assignment):
    """A name for each unit: an image, or a token that stands for a part of one."""

    def __init__(self, names: tuple[str, ...], places: tuple[int, ...], uniform: bool):
        super().__init__(names, places, (len(places),))
        self._uniform = uniform

    def check_tokens(self, leading: torch.Size, tokens_first: bool = False) -> None:
        """Refuse an embedding that does not see units: its rows may be positions, which all
        share."""
        if leading[:1] != (len(self.places),):
            raise self._misfit(leading)

    def _spread(
        self, leading: torch.Size, tokens_first: bool, batch: Batch | None
    ) -> tuple[int, int]:
        rows, units = math.prod(leading), len(self.places)
        packed = leading[0] if len(leading) == 1 or leading[0] > 1 else rows
        if leading[0] == units or (self._uniform and packed % units == 0):
            return rows // units, 1
        raise self._misfit(leading)


class _Unknown(Assignment):
    """Names of sequences, in a layer that sees something else."""

    def _spread(
        self, leading: torch.Size, tokens_first: bool, batch: Batch | None
    ) -> tuple[int, int]:
        raise ValueError(
            "adapters: names: expected one name for all sequences, as their tokens do not tell "
            f"whose each image, video or sound is, found {self.each()!r:.200}"
        )


def serve_media(owners: Owners) -> None:
    """From now on the forwards see media, until a :func:`generation_scope` around is left."""

    change_blocks(lambda block: _of_media(block.assignment, owners))


def mixes_names() -> bool:
    """Whether a block around has several names."""
    block = context.innermost()
    while block is not None:
        if len(block.assignment.each()) > 1:
            return True
        block = block.outer
    return False


def _of_media(assignment: Assignment, owners: Owners) -> Assignment:
    names, places, repeat = assignment.names, assignment.places, assignment.repeat
    if assignment.shape == ():
        return assignment
    each = tuple(places.tolist() if isinstance(places, Tensor) else places)
    chosen: tuple[int, ...] = ()
    by_sequence = assignment.shape == (len(each),) and not isinstance(places, Tensor)
    if by_sequence and owners.rows and len(each) * repeat == owners.sequences:
        chosen = tuple(each[row // repeat] for row in owners.rows)
    if len(set(chosen or each)) == 1:
        return Assignment(names, (chosen or each)[:1], ())
    return _Units(names, chosen, owners.uniform) if chosen else _Unknown(names, each, (len(each),))
