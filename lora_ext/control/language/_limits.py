"""Limits of the size and build time of constraints, and the error for larger constraints.

A schema or a regular expression may be untrusted, and a few characters can require more states than
fit into memory. All builders therefore check the elapsed time and the sizes.
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
        max_states: Largest number of states of the automaton over tokens.
        max_table_bytes: Largest number of bytes of one table. If the tables of a guide are larger,
            only some tables are stored and all other tables are recomputed.
        max_seconds: Longest time for building one constraint, in seconds.
        max_pattern: Largest number of characters of a regular expression, or of a schema as JSON.
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
        """Largest number of states of an automaton before equivalent states are merged."""
        return 16 * self.max_states


DEFAULT = Limits()


class Clock:
    """Time and sizes of one automaton under construction, checked against limits.

    Args:
        what: Name of what is constructed, for messages.
        limits: Limits to check.
    """

    def __init__(self, what: str, limits: Limits = DEFAULT):
        self.what = what
        self.limits = limits
        self._end = time.monotonic() + limits.max_seconds

    @property
    def seconds_left(self) -> float:
        """Seconds until the time limit, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def look(self, part: str) -> None:
        """Raise ConstraintTooLarge if the time is over; ``part`` describes the current step."""
        if time.monotonic() > self._end:
            self.refuse(f"{self.limits.max_seconds} seconds", f"more ({part})")

    def states(self, found: int, part: str, merged: bool = True) -> None:
        """Raise ConstraintTooLarge if an automaton has too many states.

        Args:
            found: Number of states.
            part: Description of this number in the message, such as "3 states times 4".
            merged: True to compare with ``max_states``, for an automaton whose equivalent states
                are merged; False to compare with ``max_pairs``.
        """
        most = self.limits.max_states if merged else self.limits.max_pairs
        if found > most:
            self.refuse(f"{most} states", f"{found} or more, from {part}")

    def table(self, nbytes: int, part: str) -> None:
        """Raise ConstraintTooLarge if a table is larger than ``max_table_bytes``.

        ``part`` describes the size in the message, such as "3 states times 4".
        """
        if nbytes > self.limits.max_table_bytes:
            self.refuse(f"{self.limits.max_table_bytes} bytes", f"{nbytes}, from {part}")

    def refuse(self, expected: str, found: str) -> NoReturn:
        """Raise :class:`ConstraintTooLarge`."""
        raise ConstraintTooLarge(f"{self.what}: expected at most {expected}, found {found}")
