"""Scopes, which are sets of variables as bitsets in Python integers, and errors that name them."""

from __future__ import annotations

from collections.abc import Iterator


class PCStructureError(ValueError):
    """The graph is not the circuit that somebody asked for; names the unit and the variables."""


def require(
    ok: bool, where: str, expected: object, found: object, error: type[ValueError] = ValueError
) -> None:
    """Raise ``error`` with ``"<where>: expected <expected>, found <found>"`` unless ``ok``."""
    if not ok:
        raise error(f"{where}: expected {expected}, found {found}")


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
