"""Scopes, which are sets of variables as bitsets in Python integers."""

from __future__ import annotations

from collections.abc import Iterator


class PCStructureError(ValueError):
    """The graph is not the circuit that somebody asked for; names the unit and the variables."""


def bits(scope: int) -> Iterator[int]:
    """The variables of a scope, ascending."""
    while scope:
        low = scope & -scope
        yield low.bit_length() - 1
        scope ^= low


def variables(scope: int) -> list[int]:
    """The variables of a scope, ascending."""
    return list(bits(scope))


def braces(scope: int) -> str:
    """A scope as errors print it, cut after twelve variables."""
    shown = variables(scope)
    tail = ", ..." if len(shown) > 12 else ""
    return "{" + ", ".join(map(str, shown[:12])) + tail + "}"
