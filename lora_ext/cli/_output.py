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
    """Raised if a command finds a fault, such as a value that is not finite.

    The command prints the message to standard error and ends with exit status 1.
    """


def show(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print a summary and a table of modules, or one JSON object with all values.

    Args:
        summary: values by title. Text output omits values that are None.
        rows: rows of the table, printed in the natural order of their "module". All rows have the
            same keys, which are the headings.
        as_json: whether to print JSON. Spaces in keys are replaced by underscores.
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
    """Print a text. Characters that standard output cannot encode are escaped.

    If Python started without a standard output, nothing is printed.
    """
    if sys.stdout is not None:
        encoding = sys.stdout.encoding or "utf-8"
        # The output is flushed, since another process may wait for it at the end of a pipe.
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _keyed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace(" ", "_"): value for key, value in row.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as a table with headings. Only the first column is left-aligned."""
    names = list(rows[0])
    return aligned([names, *([cell(row[name]) for name in names] for row in rows)])


def printable(text: str) -> str:
    """Replace characters that are not printable by escape sequences.

    Texts may contain names from untrusted files, and such characters could control the terminal.
    """
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
    """Return an iterable that yields the items and shows a progress bar on standard error.

    The bar appears after one second. It is not shown if standard error is not a terminal, or if
    tqdm is not installed. For ``desc``, ``total`` and ``unit``, see ``tqdm``.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    how: dict[str, Any] = {"desc": desc, "total": total, "unit": unit}
    return tqdm(items, file=sys.stderr, delay=1.0, leave=False, **how)
