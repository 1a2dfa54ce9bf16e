"""Limits of the size and build time of constraints, and the error of exceeding them.

A schema or a regular expression may be untrusted, and a few characters can require more states than
fit into memory. All builders therefore check a clock and the sizes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NoReturn

MEBIBYTE = 1 << 20


class ConstraintTooLarge(ValueError):
    """Error for a constraint that needs more states, bytes or seconds than its limits."""


@dataclass(frozen=True)
class Limits:
    """Limits for building a constraint and its tables.

    Attributes:
        max_states: most states of the automaton over tokens.
        max_table_bytes: most bytes of one table; larger look-ahead tables are stored in part and
            recomputed.
        max_seconds: most seconds for building one constraint.
        max_pattern: most characters of a regular expression, or of a schema as JSON.
    """

    max_states: int = 4096
    max_table_bytes: int = 256 * MEBIBYTE
    max_seconds: float = 10.0
    max_pattern: int = 64 << 10

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"Limits: {name}: expected a number above 0, found {value!r}")

    @property
    def max_pairs(self) -> int:
        """Most states of an automaton before equivalent ones are merged."""
        return 16 * self.max_states


DEFAULT = Limits()


class Clock:
    """Checks of the time and sizes of one construction.

    Args:
        what: name of the construction, for messages.
        limits: the limits.
    """

    def __init__(self, what: str, limits: Limits = DEFAULT):
        self.what = what
        self.limits = limits
        self._end = time.monotonic() + limits.max_seconds

    @property
    def seconds_left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def look(self, part: str) -> None:
        """Raise ConstraintTooLarge if the time is over; ``part`` describes the current step."""
        if time.monotonic() > self._end:
            self.refuse(f"{self.limits.max_seconds} seconds", f"more, {part}")

    def states(self, found: int, part: str, merged: bool = True) -> None:
        """Raise ConstraintTooLarge for too many states; ``part`` describes the factors."""
        most = self.limits.max_states if merged else self.limits.max_pairs
        if found > most:
            self.refuse(f"{most} states", f"{found} or more, from {part}")

    def table(self, nbytes: int, part: str) -> None:
        """Raise ConstraintTooLarge for too large a table; ``part`` describes the factors."""
        if nbytes > self.limits.max_table_bytes:
            self.refuse(f"{self.limits.max_table_bytes} bytes", f"{nbytes}, from {part}")

    def refuse(self, expected: str, found: str) -> NoReturn:
        """Raise :class:`ConstraintTooLarge`."""
        raise ConstraintTooLarge(f"{self.what}: expected at most {expected}, found {found}")
