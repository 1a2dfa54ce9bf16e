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
    """Fault that a command has found.

    The command then prints one sentence to standard error and ends with exit status 1.
    """


def show(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print a summary and below it a table of modules, or print one JSON object with all values.

    Args:
        summary: values by title. Text output omits values that are None.
        rows: rows of the table. All have the same keys, which are the headings. They are printed in
            the order of their "module".
        as_json: whether to print JSON. The spaces in keys become underscores.
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
        # Flushed, since another process may read the output through a pipe and wait.
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
    """Return an iterable of the items that shows a progress bar on standard error.

    The bar appears after a second. Without a terminal or tqdm, there is no bar. The other arguments
    are those of ``tqdm``.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    how: dict[str, Any] = {"desc": desc, "total": total, "unit": unit}
    return tqdm(items, file=sys.stderr, delay=1.0, leave=False, **how)
