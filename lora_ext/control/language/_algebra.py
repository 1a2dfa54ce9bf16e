"""Deterministic automata as arrays: minimise, combine, and convert from bytes to tokens.

An automaton of ``S`` states has a table ``(S, classes)`` of next states (-1 if there is none), a
flag per state that is True if a text may end there, and a start state. A class is a set of symbols
with equal columns in the table. Symbols are bytes or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ._limits import Clock

State = TypeVar("State", bound=Hashable)
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]
_CHUNK = 1 << 22  # number of table entries that are filled at once
_HASHED = 1 << 18  # number of table entries that are hashed at once, to fit into the cache


class Automaton(NamedTuple):
    """Deterministic finite automaton.

    Attributes:
        class_of: Class of each symbol, ``(symbols,)``, or -1 if no state has an edge for the
            symbol.
        table: Next states ``(S, classes)`` int32; -1 if there is no edge.
        final: Whether a text may end in each state, ``(S,)`` bool.
        start: Start state.
    """

    class_of: Ints
    table: Ints
    final: Bools
    start: int


def _mixed(table: Ints) -> NDArray[np.uint64]:
    values = table.astype(np.int64).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return values ^ (values >> np.uint64(27))


def _hash_rows(table: Ints) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each row, with a collision probability of 2^-64 per pair."""
    width = table.shape[1]
    random = np.random.default_rng(20250101).integers(1, 2**63, width, dtype=np.uint64)
    random, step = random | np.uint64(1), max(1, _HASHED // max(1, width))
    parts = [(_mixed(table[i : i + step]) * random).sum(1) for i in range(0, len(table), step)]
    return np.concatenate([np.empty(0, np.uint64), *parts])


def explored(
    start: State,
    edges: Callable[[State], Iterable[tuple[Iterable[int], State]]],
    width: int,
    part: str,
    clock: Clock,
) -> tuple[Ints, list[State]]:
    """Return the table of all states that can be reached from ``start``, and the list of these
    states.

    ``edges`` returns the transitions of a state: pairs of the classes that are read and the next
    state. The start has index 0.
    """
    number, states = {start: 0}, [start]
    rows: list[Ints] = []
    for state in states:  # the list grows during the loop
        row = [-1] * width
        for read, after in edges(state):
            if after not in number:
                number[after] = len(states)
                states.append(after)
            for letter in read:
                row[letter] = number[after]
        rows.append(np.array(row, np.int32))
        clock.states(len(states), part, merged=False)
        if len(rows) % 256 == 0:
            clock.look(part)
    return np.stack(rows), states


def edges(table: Ints) -> tuple[Ints, Ints]:
    """Return the distinct edges of a table without their symbols, as sources and targets."""
    sources, classes = np.nonzero(table >= 0)
    pairs = np.unique(sources.astype(np.int64) * len(table) + table[sources, classes])
    return pairs // len(table), pairs % len(table)


def distances(sources: Ints, targets: Ints, seeds: Ints, states: int) -> Ints:
    """Return the smallest number of edges from each state to a seed; -1 if there is no path."""
    order = np.argsort(targets, kind="stable")
    before = sources[order]
    first = np.searchsorted(targets[order], np.arange(states + 1))
    far = np.full(states, -1, np.int32)
    far[seeds] = 0
    front, step = np.asarray(seeds), 0
    while len(front):
        step += 1
        count = first[front + 1] - first[front]
        begin = np.repeat(first[front] - np.cumsum(count) + count, count)
        found = np.unique(before[begin + np.arange(count.sum())])
        front = found[far[found] < 0]
        far[front] = step
    return far


def minimal(automaton: Automaton, clock: Clock) -> Automaton:
    """Return the minimal automaton of the same language; equal languages give equal arrays.

    States are numbered in breadth-first order from the start, classes by their smallest symbol.
    States that cannot be reached, or from which no text can end, are removed. If the language is
    empty, only the start remains.
    """
    class_of, table, final, start = _merged_columns(automaton)
    sources, targets = edges(table)
    ahead = distances(targets, sources, np.array([start]), len(table))
    end = distances(sources, targets, np.flatnonzero(final), len(table))
    keep = (ahead >= 0) & (end >= 0)
    keep[start] = True
    number = np.full(len(table) + 1, -1, np.int32)
    number[:-1][keep] = np.arange(keep.sum())
    table, final, end = number[table[keep]], final[keep], end[keep]
    start = int(number[start])
    # Equivalent states have equal distances to the end, so the first partition is by distance.
    label = np.unique(end, return_inverse=True)[1].astype(np.int32)
    count = label.max() + 1
    while True:
        clock.look("merging equal states")
        below = np.append(label, np.int32(-1))[table]
        joint = np.concatenate([label[:, None], below], 1)
        label = np.unique(_hash_rows(joint), return_inverse=True)[1].astype(np.int32)
        if label.max() + 1 == count:
            break
        count = label.max() + 1
    one = np.unique(label, return_index=True)[1]
    table = np.append(label, np.int32(-1))[table[one]]
    return _canonical(Automaton(class_of, table, final[one], int(label[start])))


def _merged_columns(automaton: Automaton) -> Automaton:
    """Merge symbols with equal columns into classes, numbered by their first symbol."""
    class_of, table, final, start = automaton
    unread = np.full((len(table), 1), -1, table.dtype)  # column of class -1, appended at the end
    hashes = np.append(_hash_rows(table.T), _hash_rows(unread.T))
    raw = np.unique(hashes, return_inverse=True)[1][class_of]
    values, first, inverse = np.unique(raw, return_index=True, return_inverse=True)
    rank = np.empty(len(values), np.int32)
    rank[np.argsort(first)] = np.arange(len(values))
    columns = np.empty(len(values), np.int64)
    columns[rank] = class_of[first]
    known = (columns >= 0) & (columns < table.shape[1])
    merged = np.full((len(table), len(columns)), -1, table.dtype)
    merged[:, known] = table[:, columns[known]]
    return Automaton(rank[inverse], merged, final, start)


def _canonical(automaton: Automaton) -> Automaton:
    """Merge columns and number the states in breadth-first order."""
    class_of, table, final, start = _merged_columns(automaton)
    order, seen = [start], {start}
    for state in order:  # the list grows during the loop
        after, place = np.unique(table[state], return_index=True)
        for s in after[np.argsort(place)].tolist():
            if s >= 0 and s not in seen:
                seen.add(s)
                order.append(s)
    number = np.full(len(table) + 1, -1, np.int32)
    number[order] = np.arange(len(order))
    return Automaton(class_of, number[table[order]], final[order], 0)


def joined(
    a: Automaton, b: Automaton, both: Callable[[Bools, Bools], Bools], clock: Clock
) -> Automaton:
    """Return the product automaton: its states are the reachable pairs of states of a and b.

    Args:
        a: First automaton.
        b: Second automaton.
        both: Function that combines the ``final`` flags of a pair: logical "and" for the
            intersection, "or" for the union.
        clock: Limits of time and size.

    Raises:
        ConstraintTooLarge: If there are too many pairs.
    """
    part = f"{len(a.table)} states times {len(b.table)}"
    width = len(b.table) + 1  # The last state of both tables is a non-final sink.
    mixed = (a.class_of.astype(np.int64) + 1) * (b.table.shape[1] + 1) + b.class_of + 1
    classes, class_of = np.unique(mixed, return_inverse=True)
    of_a = _with_sink(a)[:, classes // (b.table.shape[1] + 1) - 1]
    of_b = _with_sink(b)[:, classes % (b.table.shape[1] + 1) - 1]
    final_a, final_b = np.append(a.final, False), np.append(b.final, False)
    # For "or", one of the two automata may be in its sink; for "and", neither may.
    stuck = both(np.array([True]), np.array([False]))[0]
    pairs, known = [a.start * width + b.start], {a.start * width + b.start: 0}
    rows: list[Ints] = []
    for pair in pairs:  # the list grows during the loop
        sa, sb = divmod(pair, width)
        row = of_a[sa].astype(np.int64) * width + of_b[sb]
        lost_a, lost_b = of_a[sa] == len(a.table), of_b[sb] == len(b.table)
        row[(lost_a & lost_b) if stuck else (lost_a | lost_b)] = -1
        for p in np.unique(row).tolist():
            if p >= 0 and p not in known:
                known[p] = len(pairs)
                pairs.append(p)
        if len(rows) % 64 == 0:
            clock.states(len(pairs), part, merged=False)
            clock.table(len(pairs) * 4 * len(classes), part)
            clock.look(part)
        rows.append(row)
    values = np.array(sorted(known))
    numbers = np.array([known[p] for p in values.tolist()], np.int32)
    table = np.stack(rows)
    table = np.where(table >= 0, numbers[np.searchsorted(values, table.clip(0))], -1)
    at = np.array(pairs)
    final = both(final_a[at // width], final_b[at % width])
    return Automaton(class_of.astype(np.int32), table.astype(np.int32), final, 0)


def complement(a: Automaton) -> Automaton:
    """Return the automaton of all texts that ``a`` does not accept, over all symbols."""
    table = _with_sink(a)
    return Automaton(
        np.where(a.class_of < 0, table.shape[1] - 1, a.class_of).astype(np.int32),
        table.astype(np.int32),
        ~np.append(a.final, False),
        a.start,
    )


def _with_sink(a: Automaton) -> Ints:
    """Return the table with two additions: a sink as last state, and a last class without edges.

    All missing edges lead to the sink.
    """
    lost = len(a.table)
    table = np.where(a.table < 0, lost, a.table)
    table = np.concatenate([table, np.full((lost, 1), lost, table.dtype)], 1)
    return np.concatenate([table, np.full((1, table.shape[1]), lost, table.dtype)])


def over_tokens(
    byte: Automaton, tokens: Sequence[bytes | None], clock: Clock, part: str
) -> Automaton:
    """Convert an automaton over bytes to an automaton over tokens, which accepts all tokenizations
    of the same texts.

    Args:
        byte: Automaton over the 256 values of a byte.
        tokens: Bytes of each token; None for a token without text, which gets no edge.
        clock: Limits of time and size.
        part: Description of the size in error messages, such as "3 states times 4".
    """
    # Tokens with equal sequences of byte classes have equal columns, so they are one class.
    reads = byte.class_of.astype(np.uint8).tobytes()
    unread = np.flatnonzero(byte.class_of < 0).astype(np.uint8).tobytes()
    spelled: dict[bytes, int] = {}
    group = np.full(len(tokens), -1, np.int32)
    for i, token in enumerate(tokens):
        if token:
            word = token.translate(reads, unread)
            if len(word) == len(token):
                group[i] = spelled.setdefault(word, len(spelled))
    table = np.full((len(byte.table), len(spelled)), -1, np.int32)
    clock.table(table.nbytes, part)
    levels = _prefixes(list(spelled))
    # Index -1 means the last row. This row contains only -1, so that the state -1 is absorbing.
    step = np.append(byte.table, np.full((1, byte.table.shape[1]), -1, np.int32), 0)
    chunk = max(1, _CHUNK // max(1, len(spelled)))
    for low in range(0, len(table), chunk):
        clock.look(part)
        behind = np.arange(low, min(len(table), low + chunk), dtype=np.int32)[None]
        for level in levels:
            behind = step[behind[level.parents], level.letters[:, None]]  # (prefixes, states)
            table[low : low + chunk, level.words] = behind[level.ends].T
    return Automaton(group, table, byte.final, byte.start)


class _Level(NamedTuple):
    """The ``n`` distinct prefixes of one length, taken from all words.

    Attributes:
        parents: Index in the previous level of each prefix without its last letter, ``(n,)``.
        letters: Last letter of each prefix, ``(n,)``.
        words: Indices of the words of this length.
        ends: Index of the prefix that equals each of these words.
    """

    parents: Ints
    letters: Ints
    words: Ints
    ends: Ints


def _prefixes(words: list[bytes]) -> list[_Level]:
    """Return the prefixes of words, one level per length, so that a shared prefix is read once."""
    length = np.array([len(w) for w in words], np.int64)
    first = np.cumsum(length) - length
    letters = np.frombuffer(b"".join(words), np.uint8).astype(np.int64)
    levels: list[_Level] = []
    word = np.arange(len(words))
    node = np.zeros(len(words), np.int64)
    while len(word):
        key = node * 256 + letters[first[word] + len(levels)]
        keys, node = np.unique(key, return_inverse=True)
        done = length[word] == len(levels) + 1
        levels.append(_Level(keys // 256, keys % 256, word[done], node[done]))
        word, node = word[~done], node[~done]
    return levels
