"""Constraints: regular languages over the tokens of a model.

Letters: ``V`` vocabulary, ``S`` states of the automaton.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_ext._checks import integer, require

from . import _algebra, _any_json, _keywords, _regex
from ._algebra import Automaton
from ._limits import DEFAULT, Clock, Limits
from ._vocabulary import end_tokens, vocabulary_of
from .matched import Matched

_MOST_CLASSES = 1 << 15  # classes are stored as int16
_MOST_KEPT = 64
_kept: OrderedDict[tuple[Any, ...], Constraint] = OrderedDict()
_kept_lock = threading.Lock()


class Constraint:
    """Regular language of allowed token sequences, stored as a minimal automaton.

    You can combine constraints with the same vocabulary: ``a & b`` is the intersection, ``a | b``
    the union, ``~a`` the complement. Two constraints with the same language are equal.

    Constructors with a tokenizer cache constraints by arguments and vocabulary. Constructors that
    need outlines-core raise ImportError if outlines-core is not installed; the message contains the
    command that installs it.

    Attributes:
        vocab_size: Number ``V`` of tokens of the vocabulary.
        eos: Tokens that end a text.
        class_of: Class of each token, ``(V,)`` int16 on the CPU. In every state, the tokens of a
            class lead to the same next state. Class 0 contains the end tokens.
        table: Next state by state and class, ``(S, classes)`` int16 on the CPU. The value is -1 if
            the class is forbidden, and ``S`` if the class ends the text.
    """

    def __init__(self, content: Automaton, vocab_size: int, eos: tuple[int, ...]):
        states = len(content.table)
        ends = np.where(content.final, states, -1)
        class_of = content.class_of.astype(np.int16) + 1
        class_of[list(eos)] = 0
        table = np.concatenate([ends[:, None], content.table], 1).astype(np.int16)
        self.vocab_size = vocab_size
        self.eos = eos
        self.class_of = torch.from_numpy(class_of)
        self.table = torch.from_numpy(table)
        self._content = content

    # --- construction -----------------------------------------------------------------------------
    @classmethod
    def _of(
        cls, what: str, automaton: Automaton, eos: tuple[int, ...], clock: Clock, part: str
    ) -> Constraint:
        """Build the constraint of an automaton over tokens; ``part`` names its size in errors."""
        automaton.class_of[list(eos)] = -1
        content = _algebra.minimal(automaton, clock)
        clock.states(len(content.table), part)
        classes = content.table.shape[1]
        if classes >= _MOST_CLASSES:
            clock.refuse(f"{_MOST_CLASSES} classes of tokens", f"{classes}, from {part}")
        some = bool(content.final.any())
        require(some, what, "texts", "at least one text that satisfies the constraint", "none")
        return cls(content, len(automaton.class_of), eos)

    @classmethod
    def choice(
        cls,
        texts: Sequence[str],
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Constraint:
        """Return the constraint that allows exactly the given texts, in any tokenization.

        Args:
            texts: Allowed texts, at least one.
            tokenizer: Tokenizer of transformers.
            vocab_size: Number of ids of the model, if it has more than the tokenizer.
            eos_token_id: Token or tokens that end a text; None for those of the tokenizer.
            limits: Limits of states, bytes and seconds.

        Raises:
            ValueError: If there is no text, or the tokenizer is not supported.
            ConstraintTooLarge: If the constraint exceeds the limits.
        """
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("choice", (texts,), _keywords.choice, *how)

    @classmethod
    def keywords(
        cls,
        tokenizer: Any,
        all_of: Sequence[str | Sequence[str]] = (),
        none_of: Sequence[str] = (),
        *,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Constraint:
        """Return the constraint that a text contains all words of ``all_of`` and no word of
        ``none_of``.

        A word may occur as any substring of the text, in any tokenization: "a dog" and "dogma" both
        contain "dog".

        Args:
            tokenizer: See :meth:`choice`.
            all_of: Words that must occur. An item may be a list of words, of which at least one
                must occur.
            none_of: Words that must not occur.
            vocab_size: See :meth:`choice`.
            eos_token_id: See :meth:`choice`.
            limits: See :meth:`choice`.

        Raises:
            ValueError: If a word is empty, or no text can satisfy both lists.
            ConstraintTooLarge: If the constraint exceeds the limits.
        """
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("keywords", (all_of, none_of), _keywords.keywords, *how)

    @classmethod
    def regex(
        cls,
        pattern: str,
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Constraint:
        r"""Return the constraint that a whole text matches a regular expression.

        The syntax is that of Rust's regex crate, without ``\b``. ``^`` and ``$`` are only allowed
        at the beginning and end of the whole text, where they have no effect. A text with a NUL
        byte does not match any expression. Requires the extra ``control`` (outlines-core).

        Args:
            pattern: Regular expression.
            tokenizer: See :meth:`choice`.
            vocab_size: See :meth:`choice`.
            eos_token_id: See :meth:`choice`.
            limits: See :meth:`choice`.

        Raises:
            ValueError: If the expression is invalid.
            ConstraintTooLarge: If the constraint exceeds the limits.
        """
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("regex", (pattern,), _regex.pattern, *how)

    @classmethod
    def json_schema(
        cls,
        schema: dict[str, Any] | str,
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Constraint:
        """Return the constraint that a text is JSON that satisfies a schema.

        The parts of the JSON are separated by at most one space. Properties must have the order of
        the schema, and other properties are not allowed. For ``date`` and ``date-time``, only the
        format is enforced, not the calendar. Requires the extra ``control`` (outlines-core).

        Args:
            schema: JSON schema, as a dictionary or as JSON text.
            tokenizer: See :meth:`choice`.
            vocab_size: See :meth:`choice`.
            eos_token_id: See :meth:`choice`.
            limits: See :meth:`choice`.

        Raises:
            NotImplementedError: If an automaton cannot enforce a keyword, such as ``minimum`` or
                ``uniqueItems`` (the message names it), or if outlines-core would change a value of
                ``enum`` or ``const``: a number with too many digits, or a property name with a
                special character of regular expressions.
            ValueError: If the schema is invalid.
            ConstraintTooLarge: If the constraint exceeds the limits.
        """
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("json_schema", (schema,), _regex.json_schema, *how)

    @classmethod
    def json_object(
        cls,
        tokenizer: Any,
        *,
        depth: int = _any_json.DEPTH,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Constraint:
        """Return the constraint that a text is a JSON object, with any content.

        The parts of the JSON are separated by at most one space.

        Args:
            tokenizer: See :meth:`choice`.
            depth: Largest number of nested objects and arrays, including the outer object, at least
                1. Each level doubles the number of states.
            vocab_size: See :meth:`choice`.
            eos_token_id: See :meth:`choice`.
            limits: See :meth:`choice`.
        """
        integer("json_object", "depth", depth, 1)
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("json_object", (depth,), _any_json.json_object, *how)

    @classmethod
    def _spelled(
        cls,
        what: str,
        content: tuple[Any, ...],
        build: Callable[..., Automaton],
        tokenizer: Any,
        vocab_size: int | None,
        eos_token_id: int | Sequence[int] | None,
        limits: Limits,
    ) -> Constraint:
        """Build the constraint of the automaton over bytes that ``build`` returns, or load it from
        the cache.
        """
        vocabulary = vocabulary_of(what, tokenizer, vocab_size, eos_token_id)
        content = tuple(map(_settled, content))
        told = hashlib.blake2b(repr(content).encode(), digest_size=24).digest()
        key = (what, told, vocabulary.key, limits)
        with _kept_lock:
            if (found := _kept.get(key)) is not None:
                _kept.move_to_end(key)
                return found
        clock = Clock(what, limits)
        byte = _algebra.minimal(build(*content, clock), clock)
        part = f"{len(byte.table)} states over bytes times the vocabulary"
        tokens = _algebra.over_tokens(byte, vocabulary.tokens, clock, part)
        made = cls._of(what, tokens, vocabulary.eos, clock, part)
        with _kept_lock:
            _kept[key] = made
            while len(_kept) > _MOST_KEPT:
                _kept.popitem(last=False)
        return made

    @classmethod
    def from_edges(
        cls,
        edges: Iterable[tuple[int, int, int]],
        start: int,
        final: Iterable[int],
        vocab_size: int,
        eos_token_id: int | Sequence[int],
        *,
        limits: Limits = DEFAULT,
    ) -> Constraint:
        """Build a constraint from the edges of a deterministic automaton.

        Args:
            edges: Triples (state, token, next state). A state is any non-negative integer.
            start: State before the first token.
            final: States in which a text may end.
            vocab_size: Number ``V`` of tokens of the vocabulary.
            eos_token_id: Token or tokens that end a text; no edge may have such a token.
            limits: Limits of states, bytes and seconds.

        Raises:
            ValueError: If states or tokens are out of range, a state and token have two next
                states, or the language is empty.
            ConstraintTooLarge: If the constraint exceeds the limits.
        """
        what = "from_edges"
        whole = type(vocab_size) is int and vocab_size >= 1
        require(whole, what, "vocab_size", "a whole number, at least 1", repr(vocab_size))
        eos = end_tokens(what, eos_token_id, vocab_size)
        clock = Clock(what, limits)
        listed = [tuple(edge) for edge in edges]
        wrong = [e for e in listed if len(e) != 3 or not all(_whole(n) for n in e)]
        expected = "triples (state, token, next state) of whole numbers"
        require(not wrong, what, "edges", expected, f"{wrong[:1]!r:.80}")
        ends = list(final)
        require(_whole(start), what, "start", "a whole number of at least 0", repr(start))
        require(all(map(_whole, ends)), what, "final", "whole numbers of at least 0", ends)
        states = {start, *ends, *(e[0] for e in listed), *(e[2] for e in listed)}
        clock.states(len(states), "edges", merged=False)
        number = {s: i for i, s in enumerate(sorted(states))}
        tokens = sorted({e[1] for e in listed})
        wrong = [t for t in tokens if t >= vocab_size]
        require(not wrong, what, "edges", f"tokens below vocab_size {vocab_size}", wrong[:1])
        both = [t for t in tokens if t in eos]
        expected = "no edge of an end token (list the state before it in final instead)"
        require(not both, what, "edges", expected, f"token {both[:1]}")
        place = {t: i for i, t in enumerate(tokens)}
        clock.table(4 * len(states) * (len(tokens) + 1), "states times tokens")
        table = np.full((len(states), len(tokens)), -1, np.int32)
        for s, t, after in listed:
            at = number[s], place[t]
            one = table[at] in (-1, number[after])
            require(one, what, "edges", f"one next state for state {s} and token {t}", "two")
            table[at] = number[after]
        class_of = np.full(vocab_size, -1, np.int32)
        class_of[tokens] = np.arange(len(tokens))
        flags = np.zeros(len(states), bool)
        flags[[number[s] for s in ends]] = True
        return cls._of(what, Automaton(class_of, table, flags, number[start]), eos, clock, "edges")

    @staticmethod
    def from_matcher(matcher: Any, vocab_size: int, eos_token_id: int | Sequence[int]) -> Matched:
        """Build a constraint from a matcher of xgrammar or llguidance, such as one for a grammar.

        The constraint only forbids the tokens that the matcher forbids. The constraint does not
        look ahead: the states of a parser cannot be enumerated, so it is not known whether a text
        can still end within its budget. A text that is truncated at the budget is a prefix of a
        text that satisfies the constraint. Guides, ``&``, ``|`` and ``~`` are not supported.

        Args:
            matcher: New object with the methods of xgrammar's ``GrammarMatcher``
                (``fill_next_token_bitmask``, ``accept_token``, ``rollback``) or of llguidance's
                ``LLMatcher`` (``compute_bitmask``, ``consume_token``, ``rollback``), which has read
                no token. Do not use the matcher elsewhere. All rows may share one matcher; with one
                matcher per row, no rollback is needed.
            vocab_size: Number ``V`` of tokens of the model's vocabulary.
            eos_token_id: Token or tokens that end a text, as in the matcher.

        Raises:
            ValueError: If the object is not a matcher, or tokens are out of range.
        """
        return Matched(matcher, vocab_size, eos_token_id)

    # --- combination ------------------------------------------------------------------------------
    def __and__(self, other: Constraint) -> Constraint:
        return self._joined(other, "&", np.logical_and)

    def __or__(self, other: Constraint) -> Constraint:
        return self._joined(other, "|", np.logical_or)

    def __invert__(self) -> Constraint:
        content = _algebra.complement(self._content)
        return self._of("~", content, self.eos, Clock("~"), "the complement")

    def _joined(self, other: Constraint, sign: str, both: Any) -> Constraint:
        if not isinstance(other, Constraint):
            return NotImplemented
        mine, theirs = (self.vocab_size, self.eos), (other.vocab_size, other.eos)
        expected = f"vocab_size and eos {mine}, as in the left operand"
        require(mine == theirs, sign, "right operand", expected, theirs)
        clock = Clock(sign)
        joined = _algebra.joined(self._content, other._content, both, clock)
        part = f"{self.num_states} states times {other.num_states}"
        return self._of(sign, joined, self.eos, clock, part)

    # --- queries ----------------------------------------------------------------------------------
    @property
    def num_states(self) -> int:
        """Number of states of the minimal automaton, without the end."""
        return len(self.table)

    @property
    def end(self) -> int:
        """State after the end of a text."""
        return len(self.table)

    @cached_property
    def rows(self) -> list[list[int]]:
        """Copy of :attr:`table` as lists, for fast access to single entries."""
        return self.table.tolist()

    @cached_property
    def classes(self) -> list[int]:
        """Copy of :attr:`class_of` as a list, for fast access to single entries."""
        return self.class_of.tolist()

    def next_state(self, state: int, token: int) -> int:
        """Return the next state, or -1 if the token is forbidden.

        The states -1 and ``end`` are absorbing.
        """
        if state in (-1, self.end):
            return state
        if not 0 <= token < self.vocab_size:
            return -1
        return self.rows[state][self.classes[token]]

    def reads(self, token: int) -> bool:
        """Return whether any text of the language contains the token."""
        return bool((self.table[:, self.classes[token]] >= 0).any())

    def accepts(self, tokens: Iterable[int] | Tensor) -> bool:
        """Return whether a text is in the language. ``tokens`` do not include the end token."""
        state = 0
        for token in tokens.tolist() if isinstance(tokens, Tensor) else tokens:
            state = self.next_state(state, int(token))
            if state in (-1, self.end):
                return False
        return self.rows[state][0] == self.end

    @cached_property
    def distance(self) -> Tensor:
        """Smallest number of tokens from each state to the end, including the end token.

        Shape ``(S + 1,)``; the last entry is for the end.
        """
        table = np.concatenate([self.table.numpy(), np.full((1, self.table.shape[1]), -1)])
        sources, targets = _algebra.edges(table)
        seeds = np.array([self.end])
        return torch.from_numpy(_algebra.distances(sources, targets, seeds, len(table)))

    @cached_property
    def class_index(self) -> Tensor:
        """Copy of :attr:`class_of` as int64, for indexing."""
        return self.class_of.long()

    @cached_property
    def tokens_by_class(self) -> tuple[Tensor, Tensor]:
        """All tokens sorted by class, and the position at which each class begins in this order.

        Shapes ``(V,)`` and ``(classes + 1,)``; the last position is ``V``.
        """
        counts = torch.bincount(self.class_index, minlength=self.table.shape[1])
        first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return self.class_of.argsort(stable=True), first

    @cached_property
    def key(self) -> bytes:
        """Hash of the vocabulary's size, the end tokens and the minimal automaton."""
        digest = hashlib.blake2b(repr((self.vocab_size, self.eos)).encode(), digest_size=24)
        digest.update(self.class_of.numpy().tobytes())
        digest.update(self.table.numpy().tobytes())
        return digest.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constraint) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return (
            f"Constraint(num_states={self.num_states}, classes={self.table.shape[1]}, "
            f"vocab_size={self.vocab_size})"
        )


def _whole(n: object) -> bool:
    return type(n) is int and n >= 0


def _settled(content: Any) -> Any:
    """Convert nested iterables to lists, because ``repr`` abbreviates arrays and iterators."""
    if isinstance(content, (str, bytes, Mapping)) or not isinstance(content, Iterable):
        return content
    return [_settled(part) for part in content]
