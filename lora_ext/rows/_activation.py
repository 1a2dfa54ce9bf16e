"""Adapters that begin in mid-sequence: where each row's does, and which tokens have it.

An activated adapter (aLoRA) serves a row from the last place on at which its *invocation*, a run of
tokens of its own, stands in the row's prompt. What lies before that place, the *start*, is the base
model's, so that keys and values of it may be shared with the base and with other such adapters.

A start is absolute: a place in the row's tokens, pads counted. Token ``t`` of a forward that has
``past`` tokens in its cache has the adapter iff ``past + t >= start``. So chunks of a prompt, a
cache and no cache give the same answer.

Source: Greenewald et al. 2025, "Activated LoRA: Fine-tuned LLMs for Intrinsics"; PEFT 0.21.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext._checks import integer, require

from ._assignment import INTEGERS, Assignment, Batch

Starts = int | None | Sequence[int | None]
Invocations = Sequence[tuple[int, ...]]


def last_start(ids: Tensor, invocation: Sequence[int]) -> list[int | None]:
    """Where an invocation begins for the last time in each row of ``ids (B, T)``; None where it
    does not occur."""
    n = len(invocation)
    if ids.shape[1] < n:
        return [None] * len(ids)
    wanted = torch.tensor(invocation, device=ids.device)
    found = (ids.unfold(1, n, 1) == wanted).all(-1)  # (B, T - n + 1)
    places = torch.arange(1, found.shape[1] + 1, device=ids.device)
    last = (found * places).amax(1) - 1  # (B,), -1 where there is none
    return [None if place < 0 else place for place in last.tolist()]


class Activated(Assignment):
    """Names of sequences with the place where each begins.

    What a forward of them is given is an ordinary assignment, :meth:`at`. A layer that nobody has
    told which forward it is in takes it for the whole of the rows.

    Args:
        names, places, shape, repeat: as of :class:`Assignment`; ``shape`` is ``()`` or ``(n,)``.
        invocations: of each name, empty for an adapter that serves all tokens.
        starts: for each entry, None where the row does not invoke its adapter; None: not known yet.
        fixed: they hold for all that comes; False: as the block's last forward has shown them.
        length: tokens of a row, where starts were looked for in all of them.
        first: what it was before any start was known.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        places: tuple[int, ...],
        shape: tuple[int, ...],
        repeat: int,
        invocations: Invocations,
        starts: tuple[int | None, ...] | None = None,
        fixed: bool = False,
        length: int | None = None,
        first: Activated | None = None,
    ):
        super().__init__(names, places, shape, repeat)
        self.entries = places  # `places`, known to be no tensor
        self.invocations = tuple(invocations)
        self.starts, self.fixed, self.length = starts, fixed, length
        self.first = self if first is None else first
        # Ordinary assignments of forwards, which keep what their layers share.
        self._whole_rows: dict[tuple[int, ...], Assignment] = {}

    # ---------------------------------------------------------------------------------------------
    # Starts become known

    def of_prompt(self, ids: Tensor | None, origin: int = 0) -> Activated:
        """The same with the starts of this prompt, for good; as it is where they are given.

        ``origin`` tokens lie before ``ids (B, T)``, without which a ValueError is raised.
        """
        if self.fixed:
            return self
        pending = self.first
        if not pending._may_begin():
            return self
        if ids is None:
            raise self._unknown("found a prompt without input_ids")
        return pending._with(pending._found(ids, origin), fixed=True)._warned()

    def of_forward(self, ids: Tensor | None, past: int) -> Activated:
        """The same with what a forward shows: the starts in its ids ``(B, T)``; where it has a
        cache of ``past`` tokens, of rows without one there, those that the block has seen.

        Raises:
            ValueError: a row's start is not to be seen here, and was not before.
        """
        if self.fixed or not self._may_begin():
            return self
        if past == 0:
            if ids is None:
                raise self._unknown("found a forward without input_ids")
            found = self.first._found(ids, 0)
            same = found == self.starts
            return self if same else self.first._with(found, fixed=False)._warned()
        found = self.starts if ids is None else self._found(ids, past)
        if self.starts is not None and found is not None:
            both = zip(found, self.starts, strict=True)
            found = tuple(before if now is None else now for now, before in both)
        elif found is None or None in found:
            raise self._unknown(f"found a forward over a cache of {past} tokens without it")
        return self if found == self.starts else self.first._with(found, fixed=False)

    def _with(self, starts: tuple[int | None, ...], fixed: bool) -> Activated:
        places, shape = self.entries, self.shape
        if not shape:  # one name for every row
            places, shape = places * len(starts), (len(starts),)
        given = self.repeat, self.invocations, starts, fixed, None, self.first
        return Activated(self.names, places, shape, *given)

    def _found(self, ids: Tensor, origin: int) -> tuple[int | None, ...]:
        """The start of each entry, by its ids."""
        require(ids.dim() == 2, "adapters", "input_ids", "(B, T)", tuple(ids.shape))
        rows = (len(self.entries) if self.shape else len(ids)) * self.repeat
        expected = f"{rows} rows, as there are names"
        require(len(ids) == rows, "adapters", "input_ids", expected, len(ids))
        ids, places = ids[:: self.repeat], self.entries
        if not self.shape:
            places = places * len(ids)
        starts: list[int | None] = [0] * len(places)
        for place, invocation in enumerate(self.invocations):
            if invocation and place in places:
                for row, start in enumerate(last_start(ids, invocation)):
                    if places[row] == place:
                        starts[row] = None if start is None else origin + start
        return tuple(starts)

    def _may_begin(self) -> bool:
        """Whether an entry has an adapter with an invocation."""
        return any(place >= 0 and self.invocations[place] for place in self.entries)

    def _unknown(self, found: str) -> ValueError:
        names = [name for name, n in zip(self.names, self.invocations, strict=True) if n]
        return ValueError(
            f"adapters: starts: expected the place where each of {names!r:.200} begins in its row, "
            f"which its alora_invocation_tokens tell in the prompt, {found}; enter "
            "lora_ext.adapters(names, starts=[...]), or input_ids= with the whole prompts"
        )

    def _warned(self) -> Activated:
        """The same, once it is said which rows the base model serves."""
        absent = {
            self.names[place]: row
            for row, (place, start) in enumerate(zip(self.entries, self.starts or (), strict=True))
            if start is None and place >= 0
        }
        if absent:
            name, row = next(iter(absent.items()))
            tokens = list(self.invocations[self.names.index(name)])
            more = "" if len(absent) == 1 else ", and rows of other adapters likewise"
            warnings.warn(
                f"adapters: row {row} lacks the invocation of adapter {name!r}, {tokens!r:.200}: "
                f"the base model serves it{more}",
                stacklevel=5,
            )
        return self

    # ---------------------------------------------------------------------------------------------
    # Forwards

    def at(self, past: int, length: int, rows: int) -> Assignment:
        """What a forward of ``rows`` sequences of ``length`` tokens over ``past`` ones has: a name
        for each sequence, where none begins inside; else one for each token."""
        if self.starts is None:
            raise self._unknown("found it where nobody has looked for it")
        pairs = list(zip(self.entries, self.starts, strict=True))
        inside = any(p >= 0 and s is not None and past < s < past + length for p, s in pairs)
        if not inside:
            whole = tuple(p if s is not None and s <= past else -1 for p, s in pairs)
            if whole not in self._whole_rows:
                ordinary = Assignment(self.names, whole, self.shape, self.repeat)
                self._whole_rows[whole] = ordinary
            return self._whole_rows[whole]
        never = past + length
        each = torch.tensor(self.entries)[:, None]  # (n, 1)
        begins = torch.tensor([never if s is None else s for s in self.starts])[:, None]
        table = torch.where(past + torch.arange(length) >= begins, each, -1)  # (n, length)
        count = self.repeat if self.shape else rows
        table = table.repeat_interleave(count, 0)
        return Assignment(self.names, table.flatten(), tuple(table.shape))

    def per_row(
        self,
        table: Sequence[int],
        leading: torch.Size,
        device: torch.device,
        tokens_first: bool = False,
        batch: Batch | None = None,
    ) -> Tensor:
        """As of an ordinary one, for a layer that sees all tokens of the rows."""
        across = leading[:2][::-1] if tokens_first else leading[:2]
        rows = len(self.entries) * self.repeat if self.shape else across[:1].numel()
        length = self.length
        if length is None:  # nobody knows what lies in a cache: no start may be beyond these tokens
            length = leading.numel() // max(rows, 1) if len(across) < 2 else across[1]
            late = [s for s in self.starts or () if s is not None and s >= max(length, 1)]
            if late:
                raise self._unknown(f"found place {late[0]} beyond a layer's {length} tokens")
        elif across != (rows, length) and leading != (rows * length,):
            if self.starts is not None and any(self.starts):
                raise ValueError(
                    f"adapters: input_ids: expected activations of {rows} rows of {length} tokens, "
                    f"found {tuple(leading)} before the features; the layers of an attached model "
                    "follow a cache, those of lora_ext.nn take whole rows"
                )
        whole = self.at(0, length, rows)
        return whole.per_row(table, leading, device, tokens_first, batch)

    # ---------------------------------------------------------------------------------------------
    # What generate does to rows

    def times(self, count: int) -> Assignment:
        """The same where every entry comes for ``count`` rows in a row."""
        return self._like(self.entries, self.shape, count, self.starts)

    def select(self, rows: Sequence[int], batch: int) -> Assignment:
        """The same for some rows of a batch; as it is where it names no such batch."""
        if self.shape != (len(self.entries),) or len(self.entries) * self.repeat != batch:
            return self
        entries = [row // self.repeat for row in rows]
        starts = None if self.starts is None else tuple(self.starts[i] for i in entries)
        return self._like(tuple(self.entries[i] for i in entries), (len(entries),), 1, starts)

    def _like(
        self,
        places: tuple[int, ...],
        shape: tuple[int, ...],
        repeat: int,
        starts: tuple[int | None, ...] | None,
    ) -> Activated:
        given = self.invocations, starts, self.fixed, self.length
        return Activated(self.names, places, shape, repeat, *given)

    def same_as(self, other: Assignment) -> bool:
        """Whether both give every row of a batch the same adapter from the same place on."""
        alike = isinstance(other, Activated) and self.starts == other.starts
        return alike and super().same_as(other)


def begun(
    assignment: Assignment,
    invocations: Invocations,
    token_ids: Tensor | None,
    input_ids: Tensor | None,
    starts: Starts,
) -> Assignment:
    """An assignment of :func:`lora_ext.adapters` with what the call says of starts.

    Names of tokens say it by themselves, and stay as they are. ``invocations`` are those of the
    names, empty for ordinary adapters. More than one of the last three, or what does not fit the
    names, is a ValueError.
    """
    given = {"token_ids": token_ids, "input_ids": input_ids, "starts": starts}
    found = [name for name, value in given.items() if value is not None]
    expected = "at most one of token_ids, input_ids and starts"
    require(len(found) < 2, "adapters", " and ".join(found), expected, "both")
    if found == ["token_ids"]:
        return assignment
    if isinstance(assignment.places, Tensor) or len(assignment.shape) > 1:
        expected = "None beside names of tokens, which say it themselves"
        require(not found, "adapters", found[0] if found else "starts", expected, "some")
        return assignment
    if input_ids is not None:
        require(isinstance(input_ids, Tensor), "adapters", "input_ids", "a tensor", type(input_ids))
        dtype = input_ids.dtype
        require(dtype in INTEGERS, "adapters", "input_ids", "integers", dtype)
    if not any(invocations) and starts is None:
        if input_ids is not None:
            _pending(assignment, invocations)._found(input_ids, 0)  # fits the names, or raises
        return assignment
    activated = _pending(assignment, invocations)
    if starts is not None:
        activated.starts, activated.fixed = _checked_starts(starts, activated), True
        return activated
    if input_ids is None:
        return activated
    known = activated.of_prompt(input_ids)
    known.length = input_ids.shape[1]
    return known


def _pending(assignment: Assignment, invocations: Invocations) -> Activated:
    places = assignment.places
    assert isinstance(places, tuple)
    return Activated(assignment.names, places, assignment.shape, assignment.repeat, invocations)


def _checked_starts(starts: Starts, activated: Activated) -> tuple[int | None, ...]:
    """A place for each entry: where an ordinary adapter has None, its first token."""
    each = [starts] if starts is None or isinstance(starts, int) else list(starts)
    count = len(activated.entries)
    expected = f"a place or None for each of {count} names"
    require(len(each) == count, "adapters", "starts", expected, len(each))
    for start in each:
        if start is not None:
            expected = "places (integers from 0 on) or None"
            integer("adapters", "starts", start, 0, expected=expected)
    ordinary = [p < 0 or not activated.invocations[p] for p in activated.entries]
    return tuple(
        0 if start is None and plain else start for start, plain in zip(each, ordinary, strict=True)
    )
