"""Automaton over bytes that accepts JSON objects with any content, up to a fixed depth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ._algebra import Automaton, explored
from ._limits import Clock

DEPTH = 3  # levels of nested objects and arrays
Moves = list[tuple[Iterable[int], str]]  # bytes that are read, and the next place in the grammar
Rules = dict[str, Moves]
_DIGITS, _HEX = b"0123456789", b"0123456789abcdefABCDEF"
_PLAIN = bytes(b for b in range(32, 127) if b not in b'"\\')
# Multi-byte characters of UTF-8: ranges of the first and second byte, number of further bytes.
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
# Transitions inside a number, by kind of its last byte. The number may end after "0", "1", ".1" and
# "e1".
_NUMBER: Rules = {
    "-": [(b"0", "0"), (b"123456789", "1")],
    "0": [(b".", "."), (b"eE", "e")],
    "1": [(_DIGITS, "1"), (b".", "."), (b"eE", "e")],
    ".": [(_DIGITS, ".1")],
    ".1": [(_DIGITS, ".1"), (b"eE", "e")],
    "e": [(b"+-", "e+"), (_DIGITS, "e1")],
    "e+": [(_DIGITS, "e1")],
    "e1": [(_DIGITS, "e1")],
}


def json_object(depth: int, clock: Clock) -> Automaton:
    """Return the automaton of JSON objects with at most one space between their parts, and any
    number of spaces after a value.

    ``depth`` is the largest number of nested objects and arrays, including the outer object. Each
    level doubles the number of states. A state consists of a place in the grammar and the open
    containers: a string with an "o" for each open object and an "a" for each open array.
    """
    rules = _rules()

    def edges(state: tuple[str, str]) -> Iterator[tuple[Iterable[int], tuple[str, str]]]:
        place, within = state
        for read, after in rules.get(place, ()):
            yield read, (after, within)
        place, is_number = place.rstrip(), place.startswith(("0", "1", ".1", "e1"))
        if place == "begin":
            yield b"{", ("{", "o")
        if place in ("[", ":", ",a") and len(within) < depth:
            yield b"{", ("{", f"{within}o")
            yield b"[", ("[", f"{within}a")
        if place == "value end" or is_number:
            yield b",", (f",{within[-1]}", within)
        if place in ("{", "[", "value end") or is_number:
            closing = b"}" if within[-1] == "o" else b"]"
            yield closing, ("value end" if within[1:] else "done", within[:-1])

    part = f"2^{depth} ways to nest objects and arrays"
    table, states = explored(("begin", ""), edges, 256, part, clock)
    final = np.array([place == "done" for place, _ in states])
    return Automaton(np.arange(256, dtype=np.int32), table, final, 0)


def _rules() -> Rules:
    """Return the transitions that neither open nor close a container, by place in the grammar."""
    value: Moves = [(b'"', "text"), (b"-", "-"), *_NUMBER["-"]]
    rules: Rules = {place: [*moves] for place, moves in _NUMBER.items()}
    rules["value end"] = []
    for place in ("0", "1", ".1", "e1", "value end"):  # places where a value may have ended
        rules[place].append((b" ", "value end"))
    for word in ("true", "false", "null"):
        value.append((word[:1].encode(), word[:1]))
        for i in range(1, len(word)):
            after = word[: i + 1] if i + 1 < len(word) else "value end"
            rules[word[:i]] = [(word[i : i + 1].encode(), after)]
    for text, end in (("key", "key end"), ("text", "value end")):
        rules[text] = [(_PLAIN, text), (b'"', end), (b"\\", f"{text} \\")]
        rules[f"{text} \\"] = [(b'"\\/bfnrt', text), (b"u", f"{text} u4")]
        for code, read, count in (("u", _HEX, 4), ("c", range(0x80, 0xC0), 2)):
            for left in range(1, count + 1):  # number of characters or bytes that are missing
                rules[f"{text} {code}{left}"] = [(read, f"{text} {code}{left - 1}")]
            rules[f"{text} {code}1"] = [(read, text)]
        for i, (first, second, more) in enumerate(_LETTERS):
            rules[text].append((first, f"{text} l{i}"))
            rules[f"{text} l{i}"] = [(second, f"{text} c{more}" if more else text)]
    key: Moves = [(b'"', "key")]
    spaced: Rules = {"{": key, ",o": key, "[": value, ",a": value, ":": value}
    spaced["key end"] = [(b":", ":")]
    for place, moves in spaced.items():  # one space is allowed here
        rules[place], rules[f"{place} "] = [*moves, (b" ", f"{place} ")], moves
    return rules
