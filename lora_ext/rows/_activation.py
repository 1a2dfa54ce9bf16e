"""Activated adapters (aLoRA): the position in each row from which the adapter applies.

An activated adapter (aLoRA) applies to a row from the last occurrence of its *invocation*, a
sequence of tokens, in the row's prompt. This position is the *start*. The tokens before it use the
base model, so their keys and values can be shared with the base model and with other activated
adapters.

A start is an absolute position in the tokens of the row, including padding. Token ``t`` of a
forward with ``past`` tokens in its cache uses the adapter if and only if ``past + t >= start``. The
result is therefore the same with a cache, without a cache, and for a prompt split into chunks.

Source: Greenewald et al. 2025, "Activated LoRA: Fine-tuned LLMs for Intrinsics"; PEFT 0.21.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext._checks import integer, require

from ._assignment import Assignment, Layout, check_integers

Starts = int | None | Sequence[int | None]
Invocations = Sequence[tuple[int, ...]]


def last_start(ids: Tensor, invocation: Sequence[int]) -> list[int | None]:
    """Return the last position of ``invocation`` in each row of ``ids (B, T)``, None if absent."""
    n = len(invocation)
    if ids.shape[1] < n:
        return [None] * len(ids)
    wanted = torch.tensor(invocation, device=ids.device)
    found = (ids.unfold(1, n, 1) == wanted).all(-1)  # (B, T - n + 1)
    places = torch.arange(1, found.shape[1] + 1, device=ids.device)
    last = (found * places).amax(1) - 1  # (B,), -1 without an occurrence
    return [None if place < 0 else place for place in last.tolist()]


class Activated(Assignment):
    """Assignment with the position (start) in each row from which an activated adapter applies.

    In an attached model, each forward replaces this assignment by the ordinary assignment that
    :meth:`at` returns for the number of tokens in the cache. Layers of :mod:`lora_ext.nn` call
    :meth:`ids` instead. It assumes that there is no cache, so activations must contain all tokens
    of each sequence.

    Args:
        entries: Assignment without a tensor, of shape ``()`` or ``(n,)``.
        invocations: Invocation of each name; empty for an adapter that applies to all tokens.
        starts: Start of each entry, which is None if the row does not contain the invocation; or
            None if the starts are not known yet.
        fixed: True if the starts are valid for all forwards; False if each prompt sets new ones.
        length: Number of tokens of a sequence, if ``input_ids`` of the block set the starts.
        unsearched: Original assignment, which is used to find the starts in the next prompt. Its
            shape may be ``()``, because prompts may have different numbers of sequences. The starts
            that it contains are not used. Default: this assignment.
    """

    def __init__(
        self,
        entries: Assignment,
        invocations: Invocations,
        starts: tuple[int | None, ...] | None = None,
        fixed: bool = False,
        length: int | None = None,
        unsearched: Activated | None = None,
    ):
        shape, repeat, weights = entries.shape, entries.repeat, entries.weights
        super().__init__(entries.names, entries.places, shape, repeat, weights)
        assert isinstance(entries.places, tuple)
        self.entries = entries.places
        self.invocations = tuple(invocations)
        self.starts, self.fixed, self.length = starts, fixed, length
        self.unsearched = self if unsearched is None else unsearched
        # Results of `at` for forwards in which no adapter starts, by the places of the entries. All
        # decoding steps use the same result, so their layers share the tensors that it caches.
        self._whole_rows: dict[tuple[int, ...], Assignment] = {}

    # ---------------------------------------------------------------------------------------------
    # Starts of prompts and forwards

    def of_prompt(self, ids: Tensor | None, origin: int = 0) -> Activated:
        """Find the starts in whole prompts, and return an assignment with these starts.

        The starts are then fixed for all forwards. The prompts are the ``input_ids`` of a block or
        of a call of ``generate``.

        Args:
            ids: Token ids ``(B, T)`` of the prompts.
            origin: Number of tokens before the first one of ``ids``.

        Returns:
            The assignment with these starts; ``self`` if the starts are fixed already, or if no
            entry has an invocation.

        Raises:
            ValueError: If ``ids`` is None or its number of rows does not match the entries.
        """
        unsearched = self.unsearched
        if self.fixed or not unsearched._may_begin():
            return self
        if ids is None:
            raise self._unknown("found a prompt without input_ids")
        return unsearched._with(unsearched._found(ids, origin), fixed=True)._warned()

    def of_forward(self, ids: Tensor | None, past: int) -> Activated:
        """Find the starts in a forward's ids, and return an assignment with these starts.

        Later forwards may change the starts.

        If no tokens are cached, the ids are new prompts and set all starts; the start of a row
        without the invocation is None. If ``past`` tokens are cached, the ids continue the
        sequences of the last forward: if a row of the ids contains the invocation, the new start
        replaces the earlier one, and otherwise the row keeps its start.

        Args:
            ids: Token ids ``(B, T)``, or None if the forward has none.
            past: Number of cached tokens.

        Returns:
            The assignment with these starts; ``self`` if the starts are fixed or do not change, or
            if no entry has an invocation.

        Raises:
            ValueError: If a new prompt has no ids; or if a row of the ids lacks the invocation and
                the cached tokens were never searched for it.
        """
        if self.fixed or not self._may_begin():
            return self
        if past == 0:
            if ids is None:
                raise self._unknown("found a forward without input_ids")
            found, unsearched = self.unsearched._found(ids, 0), self.unsearched
            return self if found == self.starts else unsearched._with(found, False)._warned()
        found = self.starts if ids is None else self._found(ids, past)
        if self.starts is not None and found is not None:
            both = zip(found, self.starts, strict=True)
            found = tuple(before if now is None else now for now, before in both)
        elif found is None or None in found:
            raise self._unknown(f"found a forward that continues a cache of {past} tokens")
        return self if found == self.starts else self.unsearched._with(found, fixed=False)

    def _with(self, starts: tuple[int | None, ...], fixed: bool) -> Activated:
        entries: Assignment = self
        if not self.shape:  # one name for every row
            n = len(starts)
            weights = None if self.weights is None else self.weights * n
            entries = Assignment(self.names, self.entries * n, (n,), self.repeat, weights)
        return Activated(entries, self.invocations, starts, fixed, unsearched=self.unsearched)

    def _found(self, ids: Tensor, origin: int) -> tuple[int | None, ...]:
        """Return for each entry the start of its adapter, or 0 for an ordinary adapter."""
        require(ids.dim() == 2, "adapters", "input_ids", "(B, T)", tuple(ids.shape))
        rows = (len(self.entries) if self.shape else len(ids)) * self.repeat
        expected = f"{rows} rows, as the names require"
        require(len(ids) == rows, "adapters", "input_ids", expected, len(ids))
        ids, places = ids[:: self.repeat], self.entries
        if not self.shape:
            places = places * len(ids)
        starts: list[int | None] = [0] * len(places)
        for place, invocation in enumerate(self.invocations):
            if invocation and place in places:
                for entry, start in enumerate(last_start(ids, invocation)):
                    if places[entry] == place:
                        starts[entry] = None if start is None else origin + start
        return tuple(starts)

    def _may_begin(self) -> bool:
        """Return whether a sequence uses an adapter with invocation tokens (aLoRA)."""
        return any(place >= 0 and self.invocations[place] for place in self.entries)

    def _unknown(self, found: str) -> ValueError:
        names = [name for name, n in zip(self.names, self.invocations, strict=True) if n]
        return ValueError(
            f"adapters: starts: expected known positions at which {names!r:.200} begin (the last "
            f"alora_invocation_tokens in each prompt), {found}; enter lora_ext.adapters with "
            "starts=[...], or with input_ids= that contain the whole prompts"
        )

    def _warned(self) -> Activated:
        """Return ``self``, after a warning if rows without an invocation use the base model."""
        absent = {
            self.names[place]: i
            for i, (place, start) in enumerate(zip(self.entries, self.starts or (), strict=True))
            if start is None and place >= 0
        }
        if absent:
            name, i = next(iter(absent.items()))
            tokens = list(self.invocations[self.names.index(name)])
            more = "" if len(absent) == 1 else ", as do rows of other adapters"
            warnings.warn(
                f"adapters: row {i} lacks the invocation of adapter {name!r}, {tokens!r:.200}, "
                f"and uses the base model{more}",
                stacklevel=5,
            )
        return self

    # ---------------------------------------------------------------------------------------------
    # Forwards

    def at(self, past: int, length: int, rows: int) -> Assignment:
        """Return the assignment for a forward with ``rows`` sequences of ``length`` tokens.

        The cache contains ``past`` tokens. The result has one entry per sequence, or one per token
        if an adapter starts among the tokens of the forward.
        """
        if self.starts is None:
            raise self._unknown("found a layer that ran before the model received a prompt")
        pairs = list(zip(self.entries, self.starts, strict=True))
        inside = any(p >= 0 and s is not None and past < s < past + length for p, s in pairs)
        if not inside:
            whole = tuple(p if s is not None and s <= past else -1 for p, s in pairs)
            if whole not in self._whole_rows:
                ordinary = Assignment(self.names, whole, self.shape, self.repeat, self.weights)
                self._whole_rows[whole] = ordinary
            return self._whole_rows[whole]
        never = past + length
        each = torch.tensor(self.entries)[:, None]  # (n, 1)
        begins = torch.tensor([never if s is None else s for s in self.starts])[:, None]
        table = torch.where(past + torch.arange(length) >= begins, each, -1)  # (n, length)
        count = self.repeat if self.shape else rows
        table = table.repeat_interleave(count, 0)
        weights = self.weights
        if weights is not None:
            weights = torch.tensor(weights, dtype=torch.float32)
            weights = weights.repeat_interleave(count * length, 0)
        return Assignment(self.names, table.flatten(), tuple(table.shape), weights=weights)

    def ids(self, table: Sequence[int], layout: Layout) -> Tensor:
        """Return :meth:`Assignment.ids` for a layer outside the forward of an attached model."""
        return self._of_layer(layout).ids(table, layout)

    def row_weights(self, layout: Layout) -> Tensor | None:
        """Return :meth:`Assignment.row_weights` for a layer outside an attached model's forward."""
        return self._of_layer(layout).row_weights(layout)

    def _of_layer(self, layout: Layout) -> Assignment:
        """Return the assignment of a layer outside the forward of an attached model.

        This method assumes that the activations contain all tokens of each sequence. It can only
        check that every start is among these tokens.

        Raises:
            ValueError: If a start is after the last token, in which case the activations may
                continue a cache; or if the starts are from ``input_ids`` of another shape.
        """
        leading = layout.leading
        across = leading[:2][::-1] if layout.tokens_first else leading[:2]
        rows = len(self.entries) * self.repeat if self.shape else across[:1].numel()
        length = self.length
        if length is None:
            length = leading.numel() // max(rows, 1) if len(across) < 2 else across[1]
            late = [s for s in self.starts or () if s is not None and s >= max(length, 1)]
            if late:
                raise self._unknown(f"found start {late[0]} for only {length} tokens in a layer")
        elif across != (rows, length) and leading != (rows * length,):
            # A start of 0 selects all tokens of a sequence and None selects none, for any length.
            if self.starts is not None and any(self.starts):
                raise ValueError(
                    f"adapters: input_ids: expected activations of {rows} rows of {length} tokens, "
                    f"found {tuple(leading)} before the features; layers of lora_ext.nn need all "
                    "tokens of each row, so attach the model to a pool to use a cache"
                )
        return self.at(0, length, rows)

    # ---------------------------------------------------------------------------------------------
    # Changes of rows by generate

    def times(self, count: int) -> Activated:
        """Return the assignment for batches with ``count`` consecutive sequences per entry."""
        return self._like(super().times(count), self.starts)

    def select(self, rows: Sequence[int], batch: int) -> Assignment:
        """Return the assignment for some rows of the batch; see :meth:`Assignment.select`."""
        chosen, starts = super().select(rows, batch), self.starts
        if chosen is self:
            return self
        if starts is not None:
            starts = tuple(starts[row // self.repeat] for row in rows)
        return self._like(chosen, starts)

    def _like(self, entries: Assignment, starts: tuple[int | None, ...] | None) -> Activated:
        return Activated(entries, self.invocations, starts, self.fixed, self.length)

    def same_as(self, other: Assignment) -> bool:
        """Return whether ``other`` assigns the same adapters with the same starts."""
        alike = isinstance(other, Activated) and self.starts == other.starts
        return alike and super().same_as(other)


def with_starts(
    assignment: Assignment,
    invocations: Invocations,
    token_ids: Tensor | None,
    input_ids: Tensor | None = None,
    starts: Starts = None,
) -> Assignment:
    """Return ``assignment`` with the starts given by the arguments of :func:`lora_ext.adapters`.

    ``invocations`` contains the invocation of each name, empty for ordinary adapters. An assignment
    with one entry per token needs no starts and is returned unchanged.

    Raises:
        ValueError: If more than one of ``token_ids``, ``input_ids`` and ``starts`` is not None, or
            if one of them does not match the names.
    """
    given = {"token_ids": token_ids, "input_ids": input_ids, "starts": starts}
    found = [name for name, value in given.items() if value is not None]
    expected = "at most one of token_ids, input_ids and starts"
    require(len(found) < 2, "adapters", " and ".join(found), expected, len(found))
    if token_ids is not None:
        return assignment
    if len(assignment.shape) > 1:
        if found:
            expected = "None with one name per token, which determines the starts"
            value = given[found[0]]
            raise ValueError(f"adapters: {found[0]}: expected {expected}, found {value!r:.100}")
        return assignment
    if input_ids is not None:
        check_integers("input_ids", input_ids)
    if not any(invocations) and starts is None:
        if input_ids is not None:  # This raises ValueError if the ids do not match the names.
            Activated(assignment, invocations)._found(input_ids, 0)
        return assignment
    activated = Activated(assignment, invocations)
    if starts is not None:
        activated.starts, activated.fixed = _checked_starts(starts, activated), True
        return activated
    if input_ids is None:
        return activated
    known = activated.of_prompt(input_ids)
    known.length = input_ids.shape[1]
    return known


def _checked_starts(
    starts: int | Sequence[int | None], activated: Activated
) -> tuple[int | None, ...]:
    """Return the start of each entry; for an ordinary adapter None becomes 0."""
    each = [starts] if isinstance(starts, int) else list(starts)
    count = len(activated.entries)
    expected = f"a position or None for each of {count} names"
    require(len(each) == count, "adapters", "starts", expected, len(each))
    for start in each:
        if start is not None:
            expected = "positions (integers of at least 0) or None"
            integer("adapters", "starts", start, 0, expected=expected)
    ordinary = [p < 0 or not activated.invocations[p] for p in activated.entries]
    return tuple(
        0 if start is None and plain else start for start, plain in zip(each, ordinary, strict=True)
    )
