"""Entries of ``adapters(names)``: the adapters of a row, with their weights.

An entry is None or ``"__base__"`` for the base model, the name of an adapter, ``(name, weight)``,
or a mixture ``{name: weight, ...}``. A list is never a mixture: it has one entry per row.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NoReturn

BASE = "__base__"  # PEFT's name of the base model; None is equivalent
MAX_MEMBERS = 64  # maximum number of adapters in a mixture

Entry = str | None | tuple[str, float] | Mapping[str, float]
#: One adapter, or the sorted names of the two or more adapters of a mixture.
Name = str | tuple[str, ...]
#: Adapters of an entry with their weights, sorted by name; empty for the base model.
Members = tuple[tuple[str, float], ...]


def is_plain(entry: object) -> bool:
    """Return whether an entry is a name or None, without a weight."""
    return entry is None or isinstance(entry, str)


def is_entry(value: object) -> bool:
    """Return whether a value is one entry and not a list of entries; its content may be invalid."""
    if is_plain(value) or isinstance(value, Mapping):
        return True
    pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)
    return pair and not isinstance(value[1], str | Mapping | list | tuple | None)  # pyright: ignore


def names_in(entry: Any) -> tuple[str, ...]:
    """Return the names in a valid entry, including those with a weight of 0."""
    if isinstance(entry, Mapping):
        return tuple(entry)
    name = entry[0] if isinstance(entry, tuple) else entry
    return () if name in (None, BASE) else (name,)


def members_of(entry: Any, where: str) -> Members:
    """Return the adapters of an entry that have a weight other than 0.

    Args:
        entry: an entry, which may be invalid.
        where: prefix of error messages: function and argument.

    Raises:
        TypeError: If a weight is not a real number.
        ValueError: If the entry or a name is invalid, or a weight is not finite in float32.
    """
    if is_plain(entry):
        return () if entry in (None, BASE) else ((entry, 1.0),)
    if not is_entry(entry):
        _refuse(where, "names (str or None), (name, weight) or {name: weight}", entry)
    pairs: list[Any] = list(entry.items()) if isinstance(entry, Mapping) else [entry]
    if not 0 < len(pairs) <= MAX_MEMBERS:
        _refuse(where, f"1 to {MAX_MEMBERS} adapters in a mixture (None is the base model)", entry)
    for name, weight in pairs:
        if not isinstance(name, str) or name in ("", BASE):
            _refuse(where, "the name of an adapter in a mixture", name)
        if isinstance(weight, bool) or not isinstance(weight, Real):
            _refuse(f"{where}: {name!r}", "a real number as weight", weight, error=TypeError)
        if not math.isfinite(_float32(weight)):
            _refuse(f"{where}: {name!r}", "a finite weight", weight)
    return tuple(sorted((name, float(weight)) for name, weight in pairs if _float32(weight)))


def _float32(weight: Any) -> float:
    try:
        return ctypes.c_float(float(weight)).value
    except OverflowError:  # an integer or a fraction
        return math.inf


def refuse_mixtures(entries: Sequence[object]) -> None:
    """Raise NotImplementedError if an entry has weights, which some layers cannot apply."""
    for entry in entries:
        if not is_plain(entry):
            raise NotImplementedError(
                "adapters: names: expected one adapter with a weight of 1 for each row, found "
                f"{entry!r:.200}; experts and compiled graphs support mixtures only if the "
                "adapters are loaded into an AdapterPool"
            )


def name_of(members: Members) -> Name | None:
    """Return the name of one member, the names of several, or None for the base model."""
    names = tuple(name for name, _ in members)
    return names if len(names) > 1 else next(iter(names), None)


def entry_of(name: Name, weights: Sequence[float] | None = None) -> Entry:
    """Return the entry for a name and its weights; by default each weight is 1."""
    if isinstance(name, str):
        return name if weights is None or weights[0] == 1 else (name, weights[0])
    return dict(zip(name, weights or (1.0,) * len(name), strict=False))


def spelled(members: Members) -> Entry:
    """Return the entry with these members, or None for the base model."""
    name = name_of(members)
    return None if name is None else entry_of(name, [weight for _, weight in members])


def weights_of(rows: Sequence[Members]) -> tuple[tuple[float, ...], ...] | None:
    """Return the weights of each row's members, padded with 0; None if all weights are 1."""
    if all(weight == 1 for row in rows for _, weight in row):
        return None
    width = max(map(len, rows))
    return tuple((*(w for _, w in row), *(0.0,) * (width - len(row))) for row in rows)


def parse(names: Any) -> tuple[list[Any], tuple[int, ...]]:
    """Return the entries of the argument ``names``, and their shape as in :class:`Assignment`."""
    if is_entry(names):
        return [names], ()
    if not isinstance(names, Sequence) or not names:
        remedy = "; convert an array or a generator with list(names)"
        _refuse("adapters: names", "a name or a non-empty list of names", names, remedy)
    flat: list[Any] = list(names)
    shape: tuple[int, ...] = (len(flat),)
    nested = [isinstance(row, list | tuple) and not is_entry(row) for row in flat]
    if all(nested):
        lengths = sorted({len(row) for row in flat})
        if len(lengths) != 1 or lengths[0] == 0:
            _refuse("adapters: names", "the same number of names for every sequence", lengths)
        flat, shape = [entry for row in flat for entry in row], (len(flat), lengths[0])
    elif any(nested):
        expected = "one name per row, or a list for every sequence"
        remedy = '; several adapters on one row are {"a": 1, "b": 1}'
        _refuse("adapters: names", expected, names, remedy)
    if not all(map(is_entry, flat)):
        _refuse("adapters: names", "names (str or None)", names)
    return flat, shape


def _refuse(
    where: str, expected: str, found: object, remedy: str = "", error: type[Exception] = ValueError
) -> NoReturn:
    raise error(f"{where}: expected {expected}, found {found!r:.200}{remedy}")
