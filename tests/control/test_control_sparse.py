"""The sparse path: the same distribution without a matrix product over the vocabulary."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from control_toys import BUDGET, LEAST, Prefix, V, constraint, guide, table_model
from torch import Tensor

from lora_ext import control
from lora_ext.control import Block, Row, _rejection
from lora_ext.control._messages import Plan

PREFIXES = [p for n in range(4) for p in itertools.product(range(4), repeat=n)]


def row_at(prefix: Prefix, guided: bool = True) -> Row:
    row: Row | None = Row.first(Plan(constraint(), BUDGET, LEAST, guide() if guided else None))
    for token in prefix:
        (row,) = control.advance([row], [token])
    assert row is not None
    return row


def normal(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


@pytest.mark.parametrize("prefix", [p for p in PREFIXES if not row_at(p).lost])
def test_accepted_tokens_of_rejection_sampling_follow_the_guided_law(prefix: Prefix) -> None:
    row, scores = row_at(prefix), table_model()(prefix).log()[None]
    bound = _rejection.log_bound(row)
    assert bound is not None
    proposed = normal(control.moved([Block([0], bound[None])], scores, 1.0))[0]
    live = (proposed > 0).nonzero()[:, 0].tolist()
    keep = torch.zeros(V, dtype=torch.float64)
    keep[live] = _rejection.keep_probabilities([row], torch.tensor([live]))[0]
    assert keep.max() <= 1 and keep.min() >= 0
    wanted = normal(control.apply([row], scores)[0])[0]
    got = proposed * keep
    assert torch.allclose(got / got.sum(), wanted, atol=1e-14)


def test_draw_follows_its_uniforms_and_falls_back_to_the_dense_distribution() -> None:
    row, scores = row_at(()), table_model()(()).log()[None]
    dense = normal(control.apply([row], scores)[0])[0].cumsum(-1)
    for u in torch.linspace(0.01, 0.99, 25).tolist():

        def never(rows: list[int], count: int, u: float = u) -> Tensor:
            # The first number proposes a token, and the second one, 1.0, rejects it.
            return torch.tensor([u, 1.0]).expand(len(rows), count, 2)

        token, drawn = control.draw([row], scores, 1.0, never, tries=4, rounds=2)
        assert token == [int(torch.searchsorted(dense, torch.tensor(u).double(), right=True))]
        assert drawn == 1 + 4 + 1


def test_tokens_rejected_in_the_first_round_are_drawn_correctly_in_the_next() -> None:
    row, scores = row_at(()), table_model()(()).log()[None]
    wanted = normal(control.apply([row], scores)[0])[0].cumsum(-1)
    for u in torch.linspace(0.01, 0.99, 25).tolist():
        turns = itertools.count()

        def numbers(rows: list[int], count: int, u: float = u, turns: Any = turns) -> Tensor:
            if next(turns) == 0:  # The first round proposes every token and accepts none.
                first = torch.linspace(0.001, 0.999, count)
                return torch.stack([first, torch.ones(count)], -1).expand(len(rows), count, 2)
            return torch.tensor([u, 0.999]).expand(len(rows), count, 2)

        token, drawn = control.draw([row], scores, 1.0, numbers, tries=400)
        assert token == [int(torch.searchsorted(wanted, torch.tensor(u).double(), right=True))]
        assert drawn == 100 + 1  # The first draw of the second round is accepted.


def test_draws_of_mixed_rows_have_the_dense_distributions() -> None:
    kinds: list[Row | None] = [
        row_at(()),
        None,
        row_at((2,), guided=False),
        row_at((0,)),
        row_at((2, 3)),
    ]
    prefixes: list[Prefix] = [(), (), (2,), (0,), (2, 3)]
    scores = torch.stack([table_model()(p).log() for p in prefixes])
    wanted = normal(control.apply(kinds, scores * 0.8, 0.8)[0] / 0.8)
    copies, generator = 3000, torch.Generator().manual_seed(0)
    tokens, drawn = control.draw(
        kinds * copies,
        (scores * 0.8).repeat(copies, 1),
        0.8,
        lambda rows, count: torch.rand(len(rows), count, 2, generator=generator),
        tries=2,
    )
    found = torch.tensor(tokens).view(copies, len(kinds))
    counts = torch.stack([torch.bincount(c, minlength=V) for c in found.unbind(1)]) / copies
    assert (counts - wanted).abs().max() < 4 * 0.5 / copies**0.5
    assert drawn < 3 * len(tokens)


@pytest.mark.parametrize("tries", [1, 2, 5])
def test_most_likely_token_equals_that_of_the_dense_distribution(tries: int) -> None:
    for prefix in PREFIXES:
        row = row_at(prefix)
        if row.lost:
            continue
        scores = table_model()(prefix).log()[None]
        wanted = int(control.apply([row], scores)[0].argmax())
        assert control.likeliest([row], scores, tries) == [wanted]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 1e-300])
def test_draw_at_almost_zero_temperature_is_the_most_likely_allowed_token(
    temperature: float,
) -> None:
    # The end token, the most likely one, is forbidden.
    row, scores = row_at(()), torch.tensor([[1.0, 0.5, 3.0, 2.0, 40.0]])
    numbers = torch.tensor([0.7, 0.5])
    for one in (row, row_at((), guided=False)):
        tokens, _ = control.draw(
            [one], scores, temperature, lambda rows, m: numbers.expand(len(rows), m, 2)
        )
        assert tokens == [2]


@pytest.mark.parametrize("guided", [True, False])
def test_draw_raises_if_no_token_is_possible(guided: bool) -> None:
    scores = torch.full((1, V), -torch.inf)
    scores[0, 4] = 0.0  # Only the end token has a finite score, and it is not allowed here.
    for bad in (scores, torch.full((1, V), torch.nan)):
        with pytest.raises(ValueError, match="scores"):
            control.draw([row_at((), guided)], bad, 1.0, lambda n, m: torch.rand(len(n), m, 2))
