"""What the commands print: tables for people, JSON for programs, progress for the impatient."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from lora_ext.adapter import aligned, natural_order

Item = TypeVar("Item")
_DASH = "-"


class Fault(Exception):
    """What a command has shown is amiss: one sentence for standard error, and status 1."""


def show(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print a summary, and below it a table of ``modules``; or one JSON object of both.

    Args:
        summary: a value for each title. A value that is None is left out of what people read.
        rows: all with the same keys, which become headings; in the order of their modules' names.
        as_json: print JSON. Spaces in keys become underscores.
    """
    rows = sorted(rows, key=lambda row: natural_order(row["module"]))
    if as_json:
        modules = [_keyed(row) for row in rows]
        say(json.dumps({**_keyed(summary), "modules": modules}, indent=2, allow_nan=False))
        return
    width = max(map(len, summary), default=0)
    for key, value in summary.items():
        if value is not None:
            say(f"{key.ljust(width)}  {cell(value)}")
    if rows:
        say(f"\n{table(rows)}")


def say(text: str) -> None:
    """Print a text, with escapes for what standard output cannot write; nothing if it is closed."""
    if sys.stdout is not None:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))


def _keyed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace(" ", "_"): value for key, value in row.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned columns below their headings; the first one to the left, the others to the right."""
    names = list(rows[0])
    return aligned([names, *([cell(row[name]) for name in names] for row in rows)])


def printable(text: str) -> str:
    """Text without what a terminal would obey: names come from files that nobody vouches for."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cell(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return _DASH
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple | list):
        return ", ".join(map(cell, value)) or _DASH
    return printable(str(value))


def progress(
    items: Iterable[Item], desc: str | None = None, total: int | None = None, unit: str = "module"
) -> Iterable[Item]:
    """The items, with a bar on standard error once they take more than a second, in a terminal
    that has tqdm; further arguments are tqdm's."""
    if sys.stderr is None or not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    how: dict[str, Any] = {"desc": desc, "total": total, "unit": unit}
    return tqdm(items, file=sys.stderr, delay=1.0, leave=False, **how)
