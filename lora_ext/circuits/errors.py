"""The error of a graph that is no circuit, and the one form that messages have."""

from __future__ import annotations


class PCStructureError(ValueError):
    """The graph is not the circuit that somebody asked for; names the unit and the variables."""


def require(
    ok: bool, where: str, expected: object, found: object, error: type[ValueError] = ValueError
) -> None:
    """Raise ``error`` with ``"<where>: expected <expected>, found <found>"`` unless ``ok``."""
    if not ok:
        raise error(f"{where}: expected {expected}, found {found}")
