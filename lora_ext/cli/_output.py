"""Output of the commands: tables, JSON and progress bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from lora_ext.adapter import aligned, natural_order

Item = TypeVar("Item")
_DASH = "-"


class Fault(Exception):
    """Fault that a command has found: one sentence on standard error, and exit status 1."""


def show(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print a summary with a table of modules below it, or one JSON object of both.

    Args:
        summary: values by title. The text output omits values that are None.
        rows: rows with equal keys, which become headings. They are sorted by their "module".
        as_json: print JSON, with underscores instead of spaces in keys.
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
    """Print a text, escaping characters that standard output cannot encode.

    Nothing is printed if standard output is closed.
    """
    if sys.stdout is not None:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))


def _keyed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace(" ", "_"): value for key, value in row.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return aligned columns with headings, the first left-aligned and the others right-aligned."""
    names = list(rows[0])
    return aligned([names, *([cell(row[name]) for name in names] for row in rows)])


def printable(text: str) -> str:
    """Replace characters that could control a terminal: names are read from untrusted files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cell(value: Any) -> str:
    """Format a value for a table."""
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
    """Return the items, with a tqdm bar on standard error if they take more than a second.

    The bar needs a terminal and tqdm; the other arguments are passed to tqdm.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    how: dict[str, Any] = {"desc": desc, "total": total, "unit": unit}
    return tqdm(items, file=sys.stderr, delay=1.0, leave=False, **how)
