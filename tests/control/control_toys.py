"""A language small enough to enumerate: a vocabulary of five, texts of at most four tokens and an
end token.

A text must contain a 2 and must not contain two adjacent 3s. ``budget`` counts all tokens including
the end token. At least ``LEAST`` tokens precede the end token. The language model is a table, so
all probabilities are finite sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lora_ext.control import Constraint, Guide

V, EOS, BUDGET, LEAST, H = 5, 4, 5, 2, 3
Prefix = tuple[int, ...]
EDGES = [
    *((0, t, s) for t, s in zip(range(4), (0, 0, 2, 1), strict=True)),
    *((1, t, s) for t, s in zip(range(3), (0, 0, 2), strict=True)),
    *((2, t, s) for t, s in zip(range(4), (2, 2, 2, 3), strict=True)),
    *((3, t, 2) for t in range(3)),
]


def constraint() -> Constraint:
    return Constraint.from_edges(EDGES, 0, {2, 3}, V, EOS)


def satisfies(text: Prefix) -> bool:
    """Return whether a text satisfies the constraint, without the automaton."""
    return 2 in text and all(pair != (3, 3) for pair in itertools.pairwise(text))


def texts(budget: int = BUDGET, least: int = LEAST) -> Iterator[Prefix]:
    """Yield all texts that satisfy the constraint and fit the budget, with their end tokens."""
    for length in range(least, budget):
        for text in itertools.product(range(4), repeat=length):
            if satisfies(text):
                yield (*text, EOS)


def guide(seed: int = 0, states: int = H, vocab: int = V) -> Guide:
    g = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return (2 * torch.randn(*shape, generator=g, dtype=torch.float64)).softmax(-1)

    return Guide(rows(states), rows(states, states), rows(states, vocab))


def table_model(seed: int = 5) -> Callable[[Prefix], Tensor]:
    """Return a language model, a function from a prefix to float64 probabilities of the next
    token."""
    known: dict[Prefix, Tensor] = {}

    def model(prefix: Prefix) -> Tensor:
        if prefix not in known:
            # The seed depends only on the prefix, so the order of calls does not matter.
            number = seed + sum((t + 1) * 7**i for i, t in enumerate(prefix))
            g = torch.Generator().manual_seed(number)
            known[prefix] = (1.5 * torch.randn(V, generator=g, dtype=torch.float64)).softmax(-1)
        return known[prefix]

    return model


def hmm_model(guide: Guide) -> Callable[[Prefix], Tensor]:
    """Return the guide as a language model."""

    def model(prefix: Prefix) -> Tensor:
        law = guide.initial
        for token in prefix:
            law = (law * guide.emission[:, token]) @ guide.transition
        return (law / law.sum()) @ guide.emission

    return model


def probability(model: Callable[[Prefix], Tensor], text: Prefix) -> float:
    """Return the probability of a text, including its end token."""
    product = 1.0
    for i, token in enumerate(text):
        product *= float(model(text[:i])[token])
    return product


def satisfaction(guide: Guide, prefix: Prefix, budget: int = BUDGET, least: int = LEAST) -> float:
    """Return ``P_hmm(constraint | prefix)``, summed over all texts with this prefix."""
    model = hmm_model(guide)
    ways = [t for t in texts(budget, least) if t[: len(prefix)] == prefix]
    return sum(probability(model, t) for t in ways) / (probability(model, prefix) or 1.0)
