"""Automaton over bytes that accepts JSON objects with any content, up to a fixed depth."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ._algebra import Automaton
from ._limits import Clock

DEPTH = 3  # levels of nested objects and arrays
_DIGITS, _HEX = b"0123456789", b"0123456789abcdefABCDEF"
_PLAIN = bytes(b for b in range(32, 127) if b not in b'"\\')
# Multi-byte characters of UTF-8: range of the first byte, range of the second byte, and number of
# further bytes.
_LETTERS = [
    (range(0xC2, 0xE0), range(0x80, 0xC0), 0),
    (range(0xE0, 0xE1), range(0xA0, 0xC0), 1),
    (range(0xE1, 0xED), range(0x80, 0xC0), 1),
    (range(0xED, 0xEE), range(0x80, 0xA0), 1),
    (range(0xEE, 0xF0), range(0x80, 0xC0), 1),
    (range(0xF0, 0xF1), range(0x90, 0xC0), 2),
    (range(0xF1, 0xF4), range(0x80, 0xC0), 2),
    (range(0xF4, 0xF5), range(0x80, 0x90), 2),
]
# Transitions inside a number by the kind of its last byte. A number may end in a state "... end".
_NUMBER: dict[str, list[tuple[bytes, str]]] = {
    "-": [(b"0", "0 end"), (b"123456789", "1 end")],
    "0 end": [(b".", "."), (b"eE", "e")],
    "1 end": [(_DIGITS, "1 end"), (b".", "."), (b"eE", "e")],
    ".": [(_DIGITS, ".1 end")],
    ".1 end": [(_DIGITS, ".1 end"), (b"eE", "e")],
    "e": [(b"+-", "e+"), (_DIGITS, "e1 end")],
    "e+": [(_DIGITS, "e1 end")],
    "e1 end": [(_DIGITS, "e1 end")],
}


def json_object(depth: int, clock: Clock) -> Automaton:
    """Return the automaton of JSON objects with at most one space between their parts.

    ``depth`` is the largest number of nested objects and arrays, including the outer object. Each
    level doubles the number of states.
    """
    return _Walk(depth, clock).automaton()


class _Walk:
    """Builder of the automaton.

    A state consists of a position in the grammar and the open containers: a string with an "o" for
    each open object and an "a" for each open array.
    """

    def __init__(self, depth: int, clock: Clock):
        self._depth, self._clock = depth, clock
        self._number: dict[tuple[str, str], int] = {}
        self._places: list[tuple[str, str]] = []
        self._rows: list[dict[int, int]] = []

    def automaton(self) -> Automaton:
        start = self._state("begin", "")
        self._link(start, b"{", "{", "o")
        for place, within in self._places:  # the list grows during the loop
            self._fill(place, within)
            part = f"2^{self._depth} ways to nest objects and arrays"
            self._clock.states(len(self._places), part, merged=False)
        table = np.full((len(self._rows), 256), -1, np.int32)
        for state, row in enumerate(self._rows):
            table[state, list(row)] = list(row.values())
        final = np.array([place == "done" for place, _ in self._places])
        return Automaton(np.arange(256, dtype=np.int32), table, final, start)

    def _state(self, place: str, within: str) -> int:
        if (place, within) not in self._number:
            self._number[place, within] = len(self._rows)
            self._places.append((place, within))
            self._rows.append({})
        return self._number[place, within]

    def _link(self, state: int, read: Iterable[int], place: str, within: str) -> None:
        target = self._state(place, within)
        self._rows[state].update(dict.fromkeys(read, target))

    def _fill(self, place: str, within: str) -> None:
        """Add the outgoing edges of a state."""
        state, bare = self._state(place, within), place.removesuffix("_")
        if place in ("{", "[", ":", ",", "key end", "value end"):  # one space is allowed here
            self._link(state, b" ", f"{place}_", within)
        if bare == "{" or (bare == "," and within[-1] == "o"):
            self._link(state, b'"', "key", within)
        if bare in ("[", ":") or (bare == "," and within[-1] == "a"):
            self._value(state, within)
        if bare == "key end":
            self._link(state, b":", ":", within)
        if bare == "value end" or (place.endswith(" end") and place[0] in "01.e"):
            self._link(state, b" ", "value end_", within)
            self._link(state, b",", ",", within)
        if bare in ("{", "[", "value end") or (place[0] in "01.e" and place[-4:] == " end"):
            closing = b"}" if within[-1:] == "o" else b"]"
            self._link(state, closing, "value end" if within[1:] else "done", within[:-1])
        if place in _NUMBER:
            for read, then in _NUMBER[place]:
                self._link(state, read, then, within)
        if place.split(":")[0] in ("key", "text"):
            self._letters(state, place, within)
        if place.startswith("word:"):
            rest = place[5:]
            self._link(state, rest[:1].encode(), self._word(rest[1:]), within)

    @staticmethod
    def _word(rest: str) -> str:
        return f"word:{rest}" if rest else "value end"

    def _value(self, state: int, within: str) -> None:
        self._link(state, b'"', "text", within)
        self._link(state, b"-", "-", within)
        for read, then in _NUMBER["-"]:
            self._link(state, read, then, within)
        for word in ("true", "false", "null"):
            self._link(state, word[:1].encode(), self._word(word[1:]), within)
        if len(within) < self._depth:
            self._link(state, b"{", "{", f"{within}o")
            self._link(state, b"[", "[", f"{within}a")

    def _letters(self, state: int, place: str, within: str) -> None:
        """Add the edges inside a string.

        ``place`` is "key" or "text". Inside an escape or a multi-byte character, it also has a
        colon and a code for the missing part of the character.
        """
        kind, _, rest = place.partition(":")
        if rest == "":
            self._link(state, _PLAIN, kind, within)
            self._link(state, b'"', "key end" if kind == "key" else "value end", within)
            self._link(state, b"\\", f"{kind}:\\", within)
            for i, (first, _, _) in enumerate(_LETTERS):
                self._link(state, first, f"{kind}:l{i}", within)
        elif rest == "\\":
            self._link(state, b'"\\/bfnrt', kind, within)
            self._link(state, b"u", f"{kind}:u3", within)
        elif rest[0] == "u":
            left = int(rest[1])
            self._link(state, _HEX, f"{kind}:u{left - 1}" if left else kind, within)
        elif rest[0] == "l":
            _, second, more = _LETTERS[int(rest[1])]
            self._link(state, second, f"{kind}:c{more}" if more else kind, within)
        else:
            left = int(rest[1]) - 1
            self._link(state, range(0x80, 0xC0), f"{kind}:c{left}" if left else kind, within)
