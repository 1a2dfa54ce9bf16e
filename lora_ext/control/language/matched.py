"""Constraints that an external matcher evaluates token by token.

Examples of matchers are xgrammar's ``GrammarMatcher`` and llguidance's ``LLMatcher``.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import instance, require

from ._vocabulary import end_tokens

_KEPT_MASKS = 4096
_ONE_OF = (
    ("fill_next_token_bitmask", "accept_token", "rollback"),  # xgrammar's GrammarMatcher
    ("compute_bitmask", "consume_token", "rollback"),  # llguidance's LLMatcher
)


class Matched:
    """Constraint of a matcher, with the prefixes of texts as states.

    :meth:`Constraint.from_matcher <lora_ext.control.Constraint.from_matcher>` creates the
    constraint. A state is the number of a prefix that has occurred. To change the state, the
    matcher is rolled back to the prefix that the old and the new state share, and reads the
    remaining tokens of the new state. One matcher is therefore sufficient for all rows. The matcher
    must not be used elsewhere.

    Attributes:
        vocab_size: Number ``V`` of tokens of the vocabulary.
        eos: Tokens that end a text.
        end: State after the end of a text.
    """

    end = sys.maxsize

    def __init__(self, matcher: Any, vocab_size: int, eos_token_id: int | Sequence[int]):
        where = "from_matcher"
        instance(where, "vocab_size", vocab_size, int)
        require(vocab_size >= 1, where, "vocab_size", "at least 1", vocab_size)
        known = any(all(callable(getattr(matcher, m, None)) for m in way) for way in _ONE_OF)
        methods = " or ".join(map(", ".join, _ONE_OF))
        expected = f"a matcher like xgrammar's or llguidance's, with the methods {methods}"
        require(known, where, "matcher", expected, type(matcher).__name__)
        self.vocab_size = vocab_size
        self.eos = end_tokens(where, eos_token_id, vocab_size)
        self._matcher, self._fills = matcher, hasattr(matcher, _ONE_OF[0][0])
        self._lock = threading.Lock()
        self._standing: list[int] = []  # tokens that the matcher has read
        self._texts: list[tuple[int, int]] = [(-1, -1)]  # previous state and token of each state
        self._number: dict[tuple[int, int], int] = {}
        self._masks: OrderedDict[int, Tensor] = OrderedDict()

    def mask(self, state: int) -> Tensor:
        """Return which tokens are allowed in a state, ``(V,)`` bool.

        In the state ``end``, only the end tokens are allowed.
        """
        if state == self.end:
            found = torch.zeros(self.vocab_size, dtype=torch.bool)
            found[list(self.eos)] = True
            return found
        with self._lock:
            if state not in self._masks:
                self._go(state)
                self._masks[state] = self._bits()
                if len(self._masks) > _KEPT_MASKS:
                    self._masks.popitem(last=False)
            words = self._masks[state]
        bits = (words[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
        return bits.flatten()[: self.vocab_size].bool()

    def next_state(self, state: int, token: int) -> int:
        """Return the next state, or -1 if the token is forbidden.

        The states -1 and ``end`` are absorbing.
        """
        if state in (-1, self.end):
            return state
        if not (0 <= token < self.vocab_size and bool(self.mask(state)[token])):
            return -1
        if token in self.eos:
            return self.end
        with self._lock:
            key = state, token
            if key not in self._number:
                self._number[key] = len(self._texts)
                self._texts.append(key)
            return self._number[key]

    def accepts(self, tokens: Sequence[int] | Tensor) -> bool:
        """Return whether a text is in the language. ``tokens`` do not include the end token."""
        state = 0
        for token in tokens.tolist() if isinstance(tokens, Tensor) else tokens:
            state = self.next_state(state, int(token))
            if state in (-1, self.end):
                return False
        return bool(self.mask(state)[list(self.eos)].any())

    def reads(self, token: int) -> bool:
        """Return whether any text may contain the token: True except for end tokens."""
        return token not in self.eos

    def _bits(self) -> Tensor:
        words = -(-self.vocab_size // 32)
        if self._fills:
            bits = torch.full((1, words), -1, dtype=torch.int32)
            self._matcher.fill_next_token_bitmask(bits, 0)
            return bits[0]
        told = bytearray(self._matcher.compute_bitmask())
        return torch.frombuffer(told.ljust(4 * words, b"\0"), dtype=torch.int32)[:words].clone()

    def _go(self, state: int) -> None:
        """Roll back and advance the matcher to a state."""
        text: list[int] = []
        while state:
            state, token = self._texts[state]
            text.append(token)
        text.reverse()
        shared = 0
        for mine, its in zip(text, self._standing, strict=False):
            if mine != its:
                break
            shared += 1
        if back := len(self._standing) - shared:
            self._matcher.rollback(back)
        take = self._matcher.accept_token if self._fills else self._matcher.consume_token
        self._standing = text[:shared]
        for token in text[shared:]:
            taken = take(token)
            expected, found = "every token of its mask to be accepted", f"token {token} rejected"
            require(taken, "from_matcher", "matcher", expected, found)
            self._standing.append(token)

    def __repr__(self) -> str:
        return f"Matched({type(self._matcher).__name__}, vocab_size={self.vocab_size})"
