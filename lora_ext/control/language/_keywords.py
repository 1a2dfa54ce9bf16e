"""Automata over bytes for choices between texts, and for texts with required or forbidden words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lora_ext._checks import require

from ._algebra import Automaton, explored
from ._limits import Clock
from ._vocabulary import utf8

#: Text that must occur, or several texts of which one must occur.
Group = str | Sequence[str]


def choice(texts: Sequence[str], clock: Clock) -> Automaton:
    """Return the automaton that accepts exactly the given texts: the prefix tree of their bytes."""
    listed = [] if isinstance(texts, str) else list(texts)
    good = bool(listed) and all(isinstance(t, str) for t in listed)
    require(good, "choice", "texts", "a list of at least one text", repr(texts)[:80])
    part = "the bytes of all texts"
    tree = _Tree(clock, part)
    ends = {tree.add(utf8("choice", "texts", text)) for text in listed}
    below = ([((byte,), after) for byte, after in node.items()] for node in tree.below)
    table, nodes = explored(0, [*below].__getitem__, 256, part, clock)
    final = np.array([node in ends for node in nodes])
    return Automaton(np.arange(256, dtype=np.int32), table, final, 0)


def keywords(all_of: Sequence[Group], none_of: Sequence[str], clock: Clock) -> Automaton:
    """Return the automaton of texts that contain a word of each group of ``all_of`` and no word of
    ``none_of``.

    A state is a pair: a state of the Aho-Corasick automaton of all words, and the set of the groups
    with a word that has occurred.
    """
    groups = [_group(f"all_of[{i}]", g) for i, g in enumerate(_listed("all_of", all_of))]
    banned = [_word("none_of", w) for w in _listed("none_of", none_of)]
    tree = _Tree(clock, "the bytes of all words")
    # One bit per group with a word at the node; the highest bit is for forbidden words.
    marks: dict[int, int] = {}
    for i, words in enumerate([*groups, banned]):
        for word in words:
            node = tree.add(word)
            marks[node] = marks.get(node, 0) | 1 << i
    never = 1 << len(groups)
    every = never - 1
    letters = sorted({b for g in [*groups, banned] for w in g for b in w})
    moves, seen = tree.moves(letters, marks)
    part = f"the words times 2^{len(groups)} sets of groups that have occurred"

    def edges(state: tuple[int, int]) -> Iterator[tuple[Sequence[int], tuple[int, int]]]:
        node, have = state
        targets = (*moves[node], 0)  # the last one is for letters that are in no word
        for letter, target in enumerate(targets):
            new = have | seen[target]
            if not new & never:
                yield (letter,), (target, new)

    table, states = explored((0, 0), edges, len(letters) + 1, part, clock)
    class_of = np.full(256, len(letters), np.int32)
    class_of[letters] = np.arange(len(letters))
    final = np.array([have == every for _, have in states])
    return Automaton(class_of, table, final, 0)


class _Tree:
    """Prefix tree of words; node 0 is the empty word."""

    def __init__(self, clock: Clock, part: str):
        self.below: list[dict[int, int]] = [{}]
        self._clock, self._part = clock, part

    def add(self, word: bytes) -> int:
        """Add a word and return its node."""
        node = 0
        for byte in word:
            if byte not in self.below[node]:
                self.below[node][byte] = len(self.below)
                self.below.append({})
                self._clock.states(len(self.below), self._part, merged=False)
            node = self.below[node][byte]
        return node

    def moves(
        self, letters: Sequence[int], marks: dict[int, int]
    ) -> tuple[list[list[int]], list[int]]:
        """Return the transitions of the Aho-Corasick automaton, and the marks of each node.

        The marks of a node include the marks of all words that are suffixes of the node's text.
        """
        moves: list[list[int]] = [[] for _ in self.below]
        seen = [marks.get(node, 0) for node in range(len(self.below))]
        moves[0] = [self.below[0].get(b, 0) for b in letters]
        place_of = {b: i for i, b in enumerate(letters)}
        queue = [(child, 0) for child in self.below[0].values()]
        for node, back in queue:  # sorted by depth, so `back`, the longest suffix, is complete
            seen[node] |= seen[back]
            moves[node] = [self.below[node].get(b, moves[back][i]) for i, b in enumerate(letters)]
            queue += [(child, moves[back][place_of[b]]) for b, child in self.below[node].items()]
        return moves, seen


def _listed(name: str, words: Sequence[Group]) -> list[Group]:
    known = not isinstance(words, (str, bytes)) and isinstance(words, Sequence)
    require(known, "keywords", name, "a list of texts", repr(words)[:80])
    return list(words)


def _group(argument: str, group: Group) -> list[bytes]:
    words = [group] if isinstance(group, str) else list(group)
    require(bool(words), "keywords", argument, "a word or a non-empty list of words", repr(group))
    return [_word(argument, w) for w in words]


def _word(argument: str, word: object) -> bytes:
    full = isinstance(word, str) and word != ""
    require(full, "keywords", argument, "a non-empty string", repr(word)[:80])
    assert isinstance(word, str)
    return utf8("keywords", argument, word)
