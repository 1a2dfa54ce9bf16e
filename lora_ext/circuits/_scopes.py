"""Scopes: sets of variables as bitsets in Python integers."""

from __future__ import annotations


class PCStructureError(ValueError):
    """An error in the structure of a circuit; the message names the unit and the variables."""


def variables(scope: int) -> list[int]:
    """Return the variables of a scope, ascending."""
    found: list[int] = []
    while scope:
        low = scope & -scope
        found.append(low.bit_length() - 1)
        scope ^= low
    return found


def braces(scope: int) -> str:
    """Return a scope as text for messages, abbreviated after twelve variables."""
    shown = variables(scope)
    tail = ", ..." if len(shown) > 12 else ""
    return "{" + ", ".join(map(str, shown[:12])) + tail + "}"
