"""An assignment says which adapter has each row: names or token ids in, rows out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext import ops
from lora_ext._checks import require
from lora_ext._torch import compiles

from ._rows import Kept, Rows, capturing, constant, repeated

Names = str | None | Sequence[str | None] | Sequence[Sequence[str | None]]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
BASE = "__base__"  # PEFT's name for the base model, beside None

# A decode step has one or two shapes; without a KV cache every step brings a new one.
MAX_SHAPES = 32


class Batch(NamedTuple):
    """What a model's forward was given."""

    sequences: int
    lengths: frozenset[int]  # in tokens; of encoder and decoder, for one


class TokensFirstError(ValueError):
    """The activations have their tokens in the first dimension and the sequences in the second."""


class Assignment:
    """Which of some names each row has, as a block, a call or PEFT's hooks gave them.

    Args:
        names: distinct names of adapters.
        places: for each entry of what was given, the place of its name in ``names``, -1 for the
            base model; or an int64 tensor of them.
        shape: whom the entries are for. ``()``: every row; ``(n,)``: n sequences or rows;
            ``(B, L)``: each token; the shape of the activations without features, for a tensor.
        repeat: how many rows of a batch in a row have each entry: beams, or returned sequences.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        places: tuple[int, ...] | Tensor,
        shape: tuple[int, ...],
        repeat: int = 1,
    ):
        self.names = names
        self.places = places
        self.shape = shape
        self.repeat = repeat
        entries = places.unique().tolist() if isinstance(places, Tensor) else places
        #: Places that occur.
        self.occurring = frozenset(entries) - {-1}
        #: What the layers of a step share.
        self.kept = Kept(MAX_SHAPES)
        # Whether entries were read as one per "sequence" or "row", by activations of which shape.
        self._readings: dict[str, torch.Size] = {}

    @classmethod
    def of(cls, given: Names, token_ids: Tensor | None = None) -> Assignment:
        """From the arguments of :func:`lora_ext.adapters`."""
        flat, shape = _parse(given)
        assignment = cls.of_entries(flat, shape)
        if token_ids is None:
            return assignment
        expected = "one list of names beside token_ids"
        require(len(shape) <= 1, "adapters", "names", expected, "a list of lists")
        kind = type(token_ids).__name__
        fits = isinstance(token_ids, Tensor)
        require(fits, "adapters", "token_ids", "a tensor of integers", kind)
        require(token_ids.dtype in INTEGERS, "adapters", "token_ids", "integers", token_ids.dtype)
        expected = "the activations' shape without features, (B, T) or (rows,)"
        require(token_ids.dim() != 0, "adapters", "token_ids", expected, "a single number")
        if token_ids.numel():
            low, high = (int(v) for v in token_ids.aminmax())
            expected, fits = f"ids in [-1, {len(flat)})", -1 <= low and high < len(flat)
            require(fits, "adapters", "token_ids", expected, f"{low} to {high}")
        with torch.inference_mode(False), torch.no_grad():
            # A copy: the caller may fill the next batch in before the backward of this one.
            own = torch.tensor([*assignment.places, -1], device=token_ids.device)
            places = own[token_ids.long()].flatten()  # -1 finds the last
            return cls(assignment.names, places, tuple(token_ids.shape))

    @classmethod
    def of_entries(cls, entries: Sequence[str | None], shape: tuple[int, ...]) -> Assignment:
        """From a name for each entry; ``shape`` as for the class."""
        names = tuple(dict.fromkeys(n for n in entries if n is not None and n != BASE))
        place: dict[str | None, int] = {name: i for i, name in enumerate(names)}
        return cls(names, tuple(place.get(name, -1) for name in entries), shape)

    def spelled(self) -> list[str]:
        """The name of each entry, the base model's as PEFT spells it."""
        names = [*self.names, BASE]  # -1 finds the last
        return [names[place] for place in self.places]  # pyright: ignore[reportCallIssue]

    def each(self) -> list[str]:
        """The names that occur, the base model's among them."""
        places = set(self.places.tolist() if isinstance(self.places, Tensor) else self.places)
        return [[*self.names, BASE][place] for place in sorted(places)]

    def same_as(self, other: Assignment) -> bool:
        """Whether both give every row of a batch the same adapter; tensors count as different."""
        mine, others = self.places, other.places
        if isinstance(mine, Tensor) or isinstance(others, Tensor):
            return self is other
        return (self.names, mine, self.shape) == (other.names, others, other.shape)

    def times(self, count: int) -> Assignment:
        """The same where every entry comes for ``count`` rows in a row."""
        return Assignment(self.names, self.places, self.shape, count)

    def select(self, rows: Sequence[int], batch: int) -> Assignment:
        """The same for some rows of a batch; as it is where it names no such batch."""
        places = self.places
        if isinstance(places, Tensor) or self.shape != (len(places),):
            return self
        if len(places) * self.repeat != batch:
            return self
        chosen = tuple(places[row // self.repeat] for row in rows)
        return Assignment(self.names, chosen, (len(chosen),))

    # ---------------------------------------------------------------------------------------------
    # Rows

    def among(
        self,
        names: tuple[str, ...],
        leading: torch.Size,
        device: torch.device,
        tokens_first: bool = False,
        batch: Batch | None = None,
    ) -> Rows:
        """Rows for a layer with adapters ``names``, grouped; made once. Those that the layer lacks
        are rows of the base: adapters need not reach every layer."""
        where = names, leading, device, tokens_first, batch
        if compiles():
            return self._among(*where)
        key = (names, leading, "tokens first") if tokens_first else (names, leading)
        return self.kept.get(key, device, self._among, *where)

    def _among(
        self,
        names: tuple[str, ...],
        leading: torch.Size,
        device: torch.device,
        tokens_first: bool,
        batch: Batch | None,
    ) -> Rows:
        known = [names.index(name) if name in names else -1 for name in self.names]
        used = tuple(sorted({known[place] for place in self.occurring} - {-1}))
        table = [used.index(position) if position in used else -1 for position in known]
        return self.rows(used, table, leading, device, tokens_first, batch)

    def rows(
        self,
        used: tuple[int, ...],
        table: Sequence[int],
        leading: torch.Size,
        device: torch.device,
        tokens_first: bool = False,
        batch: Batch | None = None,
    ) -> Rows:
        """Rows whose ids are ``table``'s number of each name."""
        ids = self.per_row(table, leading, device, tokens_first, batch)
        return Rows(used, ids, ops.lora_plan(ids, len(used)))

    def per_row(
        self,
        table: Sequence[int],
        leading: torch.Size,
        device: torch.device,
        tokens_first: bool = False,
        batch: Batch | None = None,
    ) -> Tensor:
        """``(T,)`` int32: ``table``'s number of each row's name, -1 for the base model.

        Args:
            table: a number for each of :attr:`names`.
            leading: dimensions of the activations before the features.
            device: where the activations are.
            tokens_first: the first dimension counts tokens, the second sequences.
            batch: what the model's forward was given, where that is known.

        Raises:
            ValueError: activations that the entries do not fit.
        """
        if tokens_first and len(self.shape) == 2:
            # Entries are (B, L) whatever the layer's layout: its rows are theirs, turned.
            rows, length = self.shape
            if leading != (length, rows):
                raise self._misfit(leading)
            upright = self.per_row(table, torch.Size(self.shape), device)
            return upright.view(rows, length).T.flatten()
        copies, turns = self.spread(leading, tokens_first, batch)
        table = [*table, -1]  # -1 finds the last
        if isinstance(self.places, Tensor):
            if capturing(device):
                raise RuntimeError(
                    "adapters: token_ids: expected a forward that runs, found one captured in a "
                    "CUDA graph, which would serve these very rows at every replay; capture with "
                    "names"
                )
            return constant(table, torch.int32, device)[self.places.to(device)]
        each = [table[place] for place in self.places]
        if capturing(device):
            ids = repeated(each, copies, torch.int32, device)
        else:
            ids = torch.tensor(each, dtype=torch.int32).repeat_interleave(copies).to(device)
        return ids if turns == 1 else ids.repeat(turns)

    def spread(
        self, leading: torch.Size, tokens_first: bool, batch: Batch | None
    ) -> tuple[int, int]:
        """How many consecutive rows take each entry, and how often all of that comes again."""
        rows, sequences = math.prod(leading), len(self.places) * self.repeat
        if self.shape == ():
            return rows, 1
        if len(self.shape) != 1 or isinstance(self.places, Tensor):
            if leading in (self.shape, (len(self.places),)) or (
                len(self.shape) == 1 and rows == len(self.places)
            ):
                return 1, 1
            raise self._misfit(leading)
        if tokens_first and leading[1:2] == (sequences,):
            self._read_as("sequence", leading)
            return math.prod(leading[2:]) * self.repeat, leading[0]
        if leading[:1] == (sequences,):
            if rows > sequences:
                self._read_as("sequence", leading)
            return rows // len(self.places), 1
        if batch is not None and batch.sequences == sequences:
            if leading[1:2] == (sequences,) and leading[0] in batch.lengths:
                raise TokensFirstError
            if len(leading) == 1 and any(rows == sequences * n for n in batch.lengths):
                return rows // len(self.places), 1  # the model has flattened its batch
        shared = batch is not None and batch.sequences == sequences > 1  # by all sequences
        if self.repeat == 1 and rows == len(self.places) and not shared:
            self._read_as("row", leading)
            return 1, 1
        raise self._misfit(leading)

    def _misfit(self, leading: torch.Size) -> ValueError:
        named, found = len(self.places), f"found activations of shape {_activations(leading)}"
        if isinstance(self.places, Tensor):
            shape = tuple(self.shape)
            return ValueError(
                f"adapters: token_ids: expected the activations' shape without features, as "
                f"{shape} has it, {found}"
            )
        if len(self.shape) == 2:
            expected = f"{self.shape[0]} sequences of {self.shape[1]} tokens"
        elif self.repeat == 1:
            expected = f"a batch of {named} sequences, or {named} rows"
        else:
            rows = named * self.repeat
            expected = f"a batch of {rows} = {named} names x {self.repeat} beams or returns"
        return ValueError(f"adapters: names: expected {expected}, {found}")

    def _read_as(self, unit: str, leading: torch.Size) -> None:
        """One list of names is one per sequence or one per row, and not the one here and the other
        there: rows that all sequences share, such as positions, can be as many by chance."""
        readings = {**self._readings, unit: leading}
        if len(self.places) > 1 and len(readings) == 2:
            per_sequence, per_row = readings["sequence"], readings["row"]
            raise ValueError(
                f"adapters: names: found them read as one per sequence by activations of shape "
                f"{_activations(per_sequence)} and as one per row by {_activations(per_row)}; rows "
                "that all sequences share have no adapter of their own: expected no adapter on "
                "that module (or a list of names for each sequence, one per token)"
            )
        self._readings[unit] = leading

    def check_tokens(self, leading: torch.Size, tokens_first: bool = False) -> None:
        """Refuse one list of names for one row of tokens: it may be of positions, which the
        sequences that the names mean share. Where tokens come first, it is a token of each."""
        named = len(self.places)
        if self.shape == (named,) != (1,) and leading == (1, named) and not tokens_first:
            raise ValueError(
                f"adapters: names: found {named} for an embedding that sees one row of {named} "
                f"tokens or positions: expected [[...]], a list for each sequence, where each "
                "token has a name; positions that all sequences share have no adapter of their own"
            )


class NamedRows(list[str]):
    """The names of an assignment as PEFT's ``adapter_names`` has them, and the assignment itself:
    whoever knows it need not make it again from the names."""

    def __init__(self, assignment: Assignment):
        super().__init__(assignment.spelled())
        self.assignment = assignment


def refuse_singular(where: str, given: Mapping[str, Any]) -> None:
    """Refuse ``adapter_name``, which a model would swallow, as all arguments that it does not know:
    the base model would answer."""
    if "adapter_name" in given:
        raise TypeError(
            f"{where}: expected adapter_names=, a name or one for each row, found "
            f"adapter_name={given['adapter_name']!r:.200}"
        )


def _activations(leading: torch.Size) -> str:
    return f"({', '.join(map(str, (*leading, 'features')))})"


def _parse(names: Names) -> tuple[list[str | None], tuple[int, ...]]:
    """All names in a row, and whom they are for: ``shape`` of :class:`Assignment`."""
    if names is None or isinstance(names, str):
        return [names], ()
    if not isinstance(names, Sequence) or not names:
        raise ValueError(
            f"adapters: names: expected a name or a list of names, found {names!r:.200}; "
            "list(names) makes one of an array or a generator"
        )
    # pyright does not narrow a sequence by all(...) over its elements.
    if all(name is None or isinstance(name, str) for name in names):
        return list(names), (len(names),)  # pyright: ignore[reportReturnType]
    if all(isinstance(row, list | tuple) for row in names):
        lengths = sorted({len(row) for row in names})  # pyright: ignore[reportArgumentType]
        if len(lengths) != 1 or lengths[0] == 0:
            raise ValueError(
                f"adapters: names: expected as many names for every sequence, "
                f"found lengths {lengths}"
            )
        flat = [name for row in names for name in row]  # pyright: ignore[reportOptionalIterable]
        if all(name is None or isinstance(name, str) for name in flat):
            return flat, (len(names), lengths[0])
    raise ValueError(f"adapters: names: expected names (str or None), found {names!r:.200}")
