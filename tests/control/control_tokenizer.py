"""A small byte-level tokenizer, with one token per byte and some tokens of several bytes."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from lora_ext.control import Constraint

MERGES = ["Ġ d", "o g", "Ġd og", "a b", "b a", "ab ab", '{ "', '" :', "1 2", ". 5", "e s", "y es"]


@cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(m.split(" ")) for m in MERGES]
    vocab = {t: i for i, t in enumerate([*letters, *("".join(p) for p in pairs)])}
    plain = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>")


def accepts(constraint: Constraint, text: str) -> bool:
    return constraint.accepts(tokenizer().encode(text))


def random_texts(constraint: Constraint, count: int, longest: int, seed: int = 0) -> list[str]:
    """Return random texts that satisfy the constraint, drawn token by token."""
    rng, tokens = random.Random(seed), tokenizer()
    order, first = constraint.tokens_by_class
    out: list[str] = []
    for _ in range(count):
        state, text = 0, []
        while True:
            left = longest - len(text)
            far = constraint.distance.tolist()
            kinds = [
                c
                for c, s in enumerate(constraint.rows[state])
                if s >= 0 and far[s] <= max(left, far[state] - 1) and first[c] < first[c + 1]
            ]
            kind = rng.choice(kinds)
            if kind == 0:
                break
            place = rng.randrange(int(first[kind]), int(first[kind + 1]))
            text.append(int(order[place]))
            state = constraint.rows[state][kind]
        out.append(tokens.decode(text))
    return out


def full_match(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None
