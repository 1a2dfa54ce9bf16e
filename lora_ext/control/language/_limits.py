"""How large a constraint may become, and the error of one that does not keep within that.

A schema or a regular expression comes from a stranger, and a few characters of it can stand for
more states than there is memory. So everything that builds looks at a clock and at the sizes before
it goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NoReturn

MEBIBYTE = 1 << 20


class ConstraintTooLarge(ValueError):
    """The constraint needs more states, bytes or seconds than its limits; says what multiplies."""


@dataclass(frozen=True)
class Limits:
    """What building a constraint and its tables may take.

    Attributes:
        max_states: of the automaton over tokens.
        max_table_bytes: of one table; look-ahead tables above it keep a part and compute the rest
            again.
        max_seconds: of building one constraint.
        max_pattern: characters of a regular expression, or of a schema as JSON.
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
        """States that an automaton may have before equal ones are merged."""
        return 16 * self.max_states


DEFAULT = Limits()


class Clock:
    """Time and sizes of one construction.

    Args:
        what: is built, for the messages.
        limits: what it may take.
    """

    def __init__(self, what: str, limits: Limits = DEFAULT):
        self.what = what
        self.limits = limits
        self._end = time.monotonic() + limits.max_seconds

    @property
    def seconds_left(self) -> float:
        """Never below 0."""
        return max(0.0, self._end - time.monotonic())

    def look(self, part: str) -> None:
        """Raise if the time is over; ``part`` says what is being done."""
        if time.monotonic() > self._end:
            self.refuse(f"{self.limits.max_seconds} seconds", f"more, {part}")

    def states(self, found: int, part: str, merged: bool = True) -> None:
        """Raise if there are too many states; ``part`` says what multiplies them."""
        most = self.limits.max_states if merged else self.limits.max_pairs
        if found > most:
            self.refuse(f"{most} states", f"{found} or more, from {part}")

    def table(self, nbytes: int, part: str) -> None:
        """Raise if a table has too many bytes; ``part`` says what multiplies them."""
        if nbytes > self.limits.max_table_bytes:
            self.refuse(f"{self.limits.max_table_bytes} bytes", f"{nbytes}, from {part}")

    def refuse(self, expected: str, found: str) -> NoReturn:
        """Raise :class:`ConstraintTooLarge`."""
        raise ConstraintTooLarge(f"{self.what}: expected at most {expected}, found {found}")
