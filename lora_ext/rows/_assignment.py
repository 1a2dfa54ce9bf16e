"""Assignments of adapters to rows: convert names or token ids to adapter ids per row."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import require
from lora_ext._torch import compiles

from . import _entries
from ._entries import BASE, Entry, Name, entry_of
from ._rows import Kept, Rows, capturing, constant, planned, renumbered, repeated

Names = Entry | Sequence[Entry] | Sequence[Sequence[Entry]]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# Maximum number of cached layouts. All decode steps use the same one or two shapes of activations;
# without a KV cache every step uses a new shape.
MAX_SHAPES = 32


class Batch(NamedTuple):
    """Number and lengths of the sequences in the batch of a model's forward."""

    sequences: int  # number of sequences
    lengths: frozenset[int]  # tokens per sequence, for example in the encoder and the decoder


class Layout(NamedTuple):
    """Layout of the rows of one layer's activations ``(*leading, features)``."""

    leading: torch.Size
    device: torch.device
    tokens_first: bool = False  # whether leading is (tokens, sequences, ...)
    batch: Batch | None = None  # batch of the model's forward, if it is known


class TokensFirstError(ValueError):
    """Error for activations with tokens as the first dimension and sequences as the second."""


class Assignment:
    """Assignment of an adapter name to each entry: each sequence, row or token, or all rows.

    Args:
        names: Distinct names of adapters; the name of a mixture is the tuple of its adapters'
            names. In :func:`~lora_ext.rows.packed_block` there is one name per slot, so a name
            occurs twice if two versions of its adapter are in the step.
        places: Index into ``names`` for each entry, or -1 for the base model, as a tuple or an
            int64 tensor.
        shape: Meaning of the entries. ``()``: one entry for all rows. ``(n,)``: one entry for each
            of n sequences, or of n rows; :meth:`spread` decides this by the layout of each layer.
            ``(B, L)``: one entry per token. If ``places`` is a tensor, ``shape`` is the shape of
            the activations without features.
        repeat: Number of consecutive sequences of the batch per entry (beams or returned
            sequences).
        weights: K weights for each entry, one per adapter of its name and then zeros: tuples, or a
            float32 tensor if ``places`` is a tensor. None if all weights are 1.
    """

    def __init__(
        self,
        names: tuple[Name, ...],
        places: tuple[int, ...] | Tensor,
        shape: tuple[int, ...],
        repeat: int = 1,
        weights: tuple[tuple[float, ...], ...] | Tensor | None = None,
    ):
        self.names, self.places, self.shape, self.repeat = names, places, shape, repeat
        self.weights = weights
        #: Names that occur only with a weight of 0.
        self.unused: tuple[str, ...] = ()
        #: Entries for :meth:`AdapterPool.acquire`: one for each name, with its weights if some are
        #: not 1, then one for each name in ``unused``, which gets no slot.
        self.asked: tuple[Entry, ...] = names  # pyright: ignore  # mixtures only in `of_entries`
        entries = places.unique().tolist() if isinstance(places, Tensor) else places
        #: Distinct values of ``places``, without -1.
        self.occurring = frozenset(entries) - {-1}
        #: Cache of tensors that the layers of a step share.
        self.kept = Kept(MAX_SHAPES)
        # Under the keys "sequence" and "row", a shape of activations for which the entries were
        # interpreted as one per sequence or per row. `_read_as` raises if both keys are set.
        self._readings: dict[str, torch.Size] = {}

    @classmethod
    def of(cls, given: Names, token_ids: Tensor | None = None) -> Assignment:
        """Create the assignment for the arguments of :func:`lora_ext.adapters`."""
        flat, shape = _entries.parse(given)
        assignment = cls.of_entries(flat, shape)
        if token_ids is None:
            return assignment
        expected = "one list of names with token_ids"
        require(len(shape) <= 1, "adapters", "names", expected, f"lists of shape {shape}")
        check_integers("token_ids", token_ids)
        expected = "the shape (B, T) or (rows,) of activations without features"
        require(token_ids.dim() != 0, "adapters", "token_ids", expected, tuple(token_ids.shape))
        if token_ids.numel():
            low, high = (int(v) for v in token_ids.aminmax())
            expected, fits = f"ids in [-1, {len(flat)})", -1 <= low and high < len(flat)
            require(fits, "adapters", "token_ids", expected, f"{low} to {high}")
        with torch.inference_mode(False), torch.no_grad():
            # Copy the ids, since the caller may overwrite them before the backward of this batch.
            own = torch.tensor([*assignment.places, -1], device=token_ids.device)
            places = own[token_ids.long()].flatten()  # -1 reads the last entry
            weights = assignment.weights
            if isinstance(weights, tuple):  # an id of -1 may read any weights
                each = torch.tensor(weights, dtype=torch.float32, device=token_ids.device)
                weights = each[token_ids.flatten().long()]
            made = cls(assignment.names, places, tuple(token_ids.shape), weights=weights)
            made.asked = assignment.asked
            return made

    @classmethod
    def of_entries(cls, entries: Sequence[Entry], shape: tuple[int, ...]) -> Assignment:
        """Create an assignment from a flat list of entries; see the class for ``shape``.

        Raises:
            TypeError, ValueError: If an entry is invalid, as for :func:`lora_ext.adapters`.
        """
        each: list[Any] = list(entries)
        weights, asked, unused = None, {}, dict[str, None]()
        if not all(isinstance(entry, str | None) for entry in each):
            rows = [_entries.members_of(entry, "adapters: names") for entry in each]
            each, weights = [_entries.name_of(row) for row in rows], _entries.weights_of(rows)
            for name, row in zip(each, rows, strict=True):
                if name not in asked or any(weight != 1 for _, weight in row):
                    asked[name] = _entries.spelled(row)
            found = {name for row in rows for name, _ in row}
            unused = {n: None for e in entries for n in _entries.names_in(e) if n not in found}
        names = tuple(dict.fromkeys(n for n in each if n is not None and n != BASE))
        place: dict[Any, int] = {name: i for i, name in enumerate(names)}
        made = cls(names, tuple(place.get(name, -1) for name in each), shape, weights=weights)
        made.unused = tuple(unused)
        wanted = tuple(asked[name] for name in names) if asked else made.asked
        made.asked = (*wanted, *((name, 0.0) for name in unused))
        return made

    def spelled(self) -> list[Entry]:
        """Return the entries as :func:`lora_ext.adapters` accepts them, with BASE for None."""
        return [BASE if place < 0 else entry_of(self.names[place], w) for place, w in self.pairs()]

    def plain(self) -> list[str]:
        """Return the name of each entry, or :data:`BASE` for an entry with weights."""
        return [entry if isinstance(entry, str) else BASE for entry in self.spelled()]

    def each(self) -> list[Any]:
        """Return the distinct entries: :data:`BASE`, then the adapters in the order of ``names``.

        An adapter with a weight other than 1 is a pair (name, weight), and a mixture is a tuple of
        such pairs.
        """
        found = [
            BASE if p < 0 else entry_of(self.names[p], w) for p, w in sorted(set(self.pairs()))
        ]
        return [tuple(e.items()) if isinstance(e, dict) else e for e in found]

    def pairs(self) -> list[tuple[int, tuple[float, ...] | None]]:
        """Return the place and weights of each entry; None for weights that are all 1."""
        places: Any = self.places.tolist() if isinstance(self.places, Tensor) else self.places
        weights: Any = self.weights
        if weights is None:
            return [(place, None) for place in places]
        weights = weights.tolist() if isinstance(weights, Tensor) else weights
        return [(p, tuple(w) if p >= 0 else None) for p, w in zip(places, weights, strict=True)]

    def same_as(self, other: Assignment) -> bool:
        """Return whether the two assignments are equal.

        Assignments with tensors are equal only if they are the same object.
        """
        mine, others = self.places, other.places
        if isinstance(mine, Tensor) or isinstance(others, Tensor):
            return self is other
        same = (self.names, mine, self.shape) == (other.names, others, other.shape)
        return bool(same and self.weights == other.weights)

    def times(self, count: int) -> Assignment:
        """Return the assignment for batches with ``count`` consecutive sequences per entry."""
        return Assignment(self.names, self.places, self.shape, count, self.weights)

    def select(self, rows: Sequence[int], batch: int) -> Assignment:
        """Return the assignment for a batch that contains only some rows of the current batch.

        Returns ``self`` if ``batch``, the current number of rows, is not the number of entries.
        """
        places = self.places
        of_rows = self.shape == (len(places),) and len(places) * self.repeat == batch
        if isinstance(places, Tensor) or not of_rows:
            return self
        entries = [row // self.repeat for row in rows]
        chosen = tuple(places[entry] for entry in entries)
        weights: Any = self.weights
        weights = weights and tuple(weights[entry] for entry in entries)
        return Assignment(self.names, chosen, (len(chosen),), weights=weights)

    # ---------------------------------------------------------------------------------------------
    # Rows

    @property
    def mixed(self) -> bool:
        """True if an entry has a weight other than 1, or several adapters."""
        return self.weights is not None or not all(map(_entries.is_plain, self.names))

    @functools.cached_property
    def weighted(self) -> frozenset[str]:
        """Names of the adapters of entries that have a weight other than 1, or several adapters."""
        if not self.mixed:
            return frozenset()
        entries = [entry for entry in self.each() if not _entries.is_plain(entry)]
        pairs = [entry if isinstance(entry[0], tuple) else (entry,) for entry in entries]
        return frozenset(name for own in pairs for name, _ in own)

    @property
    def members(self) -> tuple[str, ...]:
        """Distinct names of the adapters of all entries."""
        each = (name if isinstance(name, tuple) else (name,) for name in self.names)
        return tuple(dict.fromkeys(member for names in each for member in names))

    def rows_among(self, names: tuple[str, ...], layout: Layout, mixes: bool = False) -> Rows:
        """Return the rows of a layer that has the adapters ``names``, from a cache if possible.

        Rows whose adapter the layer does not have use the base model. The key of the cache omits
        ``layout.batch``, for the reason given in :meth:`Block.rows`.

        Raises:
            NotImplementedError: If one of the names is in an entry with a weight or several
                adapters, and ``mixes`` is False.
        """
        mixed = self.mixed and mixes
        if not mixed and not self.weighted.isdisjoint(names):
            _entries.refuse_mixtures(self.each())
        if compiles():
            return self._rows_among(names, layout, mixed)
        leading, device, tokens_first, _ = layout
        key = (names, leading, tokens_first, mixes)
        return self.kept.get(key, device, self._rows_among, names, layout, mixed)

    def _rows_among(self, names: tuple[str, ...], layout: Layout, mixed: bool) -> Rows:
        weights = self.row_weights(layout) if mixed else None  # (T, K)
        each = [name if isinstance(name, tuple) else (name,) for name in self.names]
        width = max([len(own) for own in each], default=1) if weights is None else weights.shape[1]
        known = [[names.index(n) if n in names else -1 for n in own] for own in each]
        used = tuple(sorted({i for place in self.occurring for i in known[place]} - {-1}))
        columns: list[Tensor] = []
        for k in range(width if mixed else 1):
            of_place = [own[k] if k < len(own) else -1 for own in known]
            table = [used.index(i) if i in used else -1 for i in of_place]
            columns.append(self.ids(table, layout))
        return planned(used, torch.stack(columns, 1) if mixed else columns[0], weights)

    def ids(self, table: Sequence[int], layout: Layout) -> Tensor:
        """Return the ids of the T rows of a layer, ``(T,)`` int32.

        The id of a row is ``table[i]`` if its adapter is ``names[i]``, and -1 for the base model.

        Raises:
            ValueError: If the entries do not match the layout.
        """
        device = layout.device
        if layout.tokens_first and len(self.shape) == 2:
            # The entries are (B, L) in every layout; the rows of this layout are (L, B).
            if layout.leading != self.shape[::-1]:
                raise self._misfit(layout.leading)
            upright = self.ids(table, Layout(torch.Size(self.shape), device))
            return upright.view(self.shape).T.flatten()
        copies, turns = self.spread(layout)
        if isinstance(self.places, Tensor):
            if capturing(device):
                raise RuntimeError(
                    "adapters: token_ids: expected None while a CUDA graph is captured, found a "
                    "tensor, whose ids every replay would use; pass one name per row instead"
                )
            return renumbered(self.places.to(device), table)
        each = [-1 if place < 0 else table[place] for place in self.places]
        if capturing(device):
            ids = repeated(each, copies, torch.int32, device)
        else:
            ids = torch.tensor(each, dtype=torch.int32).repeat_interleave(copies).to(device)
        return ids if turns == 1 else ids.repeat(turns)

    def row_weights(self, layout: Layout) -> Tensor | None:
        """Return the weights of the T rows of a layer, ``(T, K)`` float32; None if all are 1.

        Raises:
            ValueError: If the entries do not match the layout.
        """
        weights, device = self.weights, layout.device
        if weights is None:
            return None
        if isinstance(weights, Tensor):
            each = weights.to(device)  # (n, K)
        elif capturing(device):
            flat = [weight for row in weights for weight in row]
            each = constant(flat, torch.float32, device).view(len(weights), -1)
        else:
            each = torch.tensor(weights, dtype=torch.float32).to(device)
        if layout.tokens_first and len(self.shape) == 2:
            return each.view(*self.shape, -1).transpose(0, 1).flatten(0, 1)
        copies, turns = self.spread(layout)
        return each.repeat_interleave(copies, 0).repeat(turns, 1)

    def spread(self, layout: Layout) -> tuple[int, int]:
        """Return ``(copies, turns)``, which describe how the entries cover the rows of a layer.

        Each entry is repeated for ``copies`` consecutive rows, and the resulting list of rows is
        repeated ``turns`` times. If the shape is ``(n,)``, each entry stands for a sequence if the
        number of sequences, ``n * repeat``, is a dimension of the layout or the size of the model's
        batch. Otherwise each entry stands for a row. The batch only decides whether the entries
        match the layout. If they match, the result does not depend on the batch.

        Raises:
            TokensFirstError: If the batch shows that the first dimension is tokens. The caller must
                then repeat the call with ``layout.tokens_first``.
            ValueError: If the entries do not match the layout.
        """
        leading, batch = layout.leading, layout.batch
        rows, sequences = math.prod(leading), len(self.places) * self.repeat
        if self.shape == ():
            return rows, 1
        if len(self.shape) != 1 or isinstance(self.places, Tensor):  # one entry per row
            if leading in (self.shape, (len(self.places),)) or (
                len(self.shape) == 1 and rows == len(self.places)
            ):
                return 1, 1
            raise self._misfit(leading)
        if layout.tokens_first and leading[1:2] == (sequences,):
            self._read_as("sequence", leading)
            return math.prod(leading[2:]) * self.repeat, leading[0]
        if leading[:1] == (sequences,):
            if rows > sequences:  # with one row per sequence, both interpretations are the same
                self._read_as("sequence", leading)
            return rows // len(self.places), 1
        if batch is not None and batch.sequences == sequences:
            if leading[1:2] == (sequences,) and leading[0] in batch.lengths:
                raise TokensFirstError
            if len(leading) == 1 and any(rows == sequences * n for n in batch.lengths):
                return rows // len(self.places), 1  # the model has flattened its batch
        # Names that match the sequences of the batch are not assigned to rows. If a layer then has
        # as many rows as there are names, all sequences share these rows, such as positions.
        shared = batch is not None and batch.sequences == sequences > 1
        if self.repeat == 1 and rows == len(self.places) and not shared:
            self._read_as("row", leading)
            return 1, 1
        raise self._misfit(leading)

    def _misfit(self, leading: torch.Size) -> ValueError:
        named, found = len(self.places), f"found activations of shape {_activations(leading)}"
        if isinstance(self.places, Tensor):
            expected = f"activations of shape {_activations(torch.Size(self.shape))}"
            return ValueError(f"adapters: token_ids: expected {expected}, {found}")
        if len(self.shape) == 2:
            expected = f"{self.shape[0]} sequences of {self.shape[1]} tokens"
        elif self.repeat == 1:
            expected = f"a batch of {named} sequences, or {named} rows"
        else:
            rows = named * self.repeat
            expected = f"a batch of {rows} = {named} names x {self.repeat} beams or returned rows"
        return ValueError(f"adapters: names: expected {expected}, {found}")

    def _read_as(self, unit: str, leading: torch.Size) -> None:
        """Record that the entries were interpreted as one per sequence or one per row.

        Raises:
            ValueError: If both interpretations have occurred. One of them is then wrong: a layer
                whose rows all sequences share, such as positions, can have as many rows as there
                are names by chance.
        """
        readings = {**self._readings, unit: leading}
        if len(self.places) > 1 and len(readings) == 2:
            per_sequence, per_row = readings["sequence"], readings["row"]
            raise ValueError(
                "adapters: names: expected one meaning for all layers, found one name per sequence "
                f"for {_activations(per_sequence)}, one per row for {_activations(per_row)}; pass "
                "a list of names per sequence, or exclude modules whose rows all sequences share"
            )
        self._readings[unit] = leading

    def check_tokens(self, layout: Layout) -> None:
        """Raise ValueError if an embedding receives a single row with one token per name.

        Such a row cannot be distinguished from positions that all sequences share. If tokens are
        the first dimension, the row contains one token of each sequence and is accepted.
        """
        named = len(self.places)
        one_row = self.shape == (named,) != (1,) and layout.leading == (1, named)
        if one_row and not layout.tokens_first:
            raise ValueError(
                f"adapters: names: expected one sequence per name, found {named} names and an "
                f"embedding with one row of {named} tokens or positions; pass [[...]] with one "
                "name per token, or exclude embeddings of positions that all sequences share"
            )


class NamedRows(list[Any]):
    """List of an assignment's entries in the format of PEFT's ``adapter_names``."""

    def __init__(self, assignment: Assignment):
        super().__init__(assignment.spelled())
        self.assignment = assignment


def check_integers(argument: str, t: object) -> None:
    """Raise ValueError if an argument of ``adapters`` is not a tensor of integers."""
    found = t.dtype if isinstance(t, Tensor) else type(t).__name__
    expected = "integers" if isinstance(t, Tensor) else "a tensor of integers"
    require(found in INTEGERS, "adapters", argument, expected, found)


def refuse_singular(where: str, given: Mapping[str, Any]) -> None:
    """Raise TypeError if ``given`` contains ``adapter_name``, which models silently ignore."""
    if "adapter_name" in given:
        raise TypeError(
            f"{where}: expected adapter_names= with one name or one per row, found "
            f"adapter_name={given['adapter_name']!r:.200}"
        )


def _activations(leading: torch.Size) -> str:
    return f"({', '.join(map(str, (*leading, 'features')))})"
