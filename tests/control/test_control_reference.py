"""Ratios and masks compared with the formulas of ``reference``, for random automata and guides."""

from __future__ import annotations

import pytest
import torch
from control_toys import guide
from torch import Tensor

from lora_ext import reference
from lora_ext.control import Constraint, ConstraintProcessor, Plan, Row, advance, log_ratios

V, EOS, BUDGET = 9, 8, 7


def drawn(seed: int) -> Constraint:
    """Return a random automaton of six states in which a third of the edges are missing."""
    g = torch.Generator().manual_seed(seed)
    table = torch.where(torch.rand(6, 8, generator=g) < 0.67, 0, -7) + torch.randint(
        6, (6, 8), generator=g
    )
    edges = [(s, t, int(table[s, t])) for s in range(6) for t in range(8) if table[s, t] >= 0]
    return Constraint.from_edges(edges, 0, {3, 5}, V, EOS)


def delta(constraint: Constraint) -> Tensor:
    return constraint.table.long()[:, constraint.class_of.long()]


@pytest.mark.parametrize(("seed", "least"), [(0, 0), (1, 2), (2, 3), (3, 0)])
def test_live_states_messages_and_ratios_equal_the_formulas(seed: int, least: int) -> None:
    one, whole = drawn(seed), guide(seed, states=4, vocab=V)
    plan, edges = Plan(one, BUDGET, least, whole), delta(one)
    live = reference.control_live(edges, BUDGET, least)
    wanted = reference.control_messages(edges, whole.transition, whole.emission, BUDGET, least)
    for k in range(BUDGET + 1):
        assert [plan.alive(s, k) for s in range(one.num_states + 1)] == live[k].tolist()
        table, scale = plan.messages(k)
        assert torch.allclose(table * scale.exp()[:, None], wanted[k], rtol=1e-12, atol=0)
    row, law = Row.first(plan), whole.initial
    for k in range(BUDGET, 0, -1):
        (block,) = log_ratios([row])
        ratio = reference.control_ratio(edges, whole.emission, wanted, law, row.state, k, least)
        assert torch.allclose(block.ratio[0].exp(), ratio, rtol=1e-11, atol=1e-300)
        token = int(ratio[:EOS].argmax()) if float(ratio[:EOS].max()) > 0 else EOS
        (row,) = advance([row], [token])
        assert row is not None
        if row.ended:
            break
        law = reference.control_filter(law, whole.transition, whole.emission, token)
    assert row.ended


@pytest.mark.parametrize("forbidden", [2, 40])
def test_ratios_of_tokens_of_every_layout_equal_the_formula(forbidden: int) -> None:
    """Check next states with many tokens and with few, and few or many forbidden tokens. Two of
    three rows share a state."""
    vocab, eos = 200, 199
    ways = [(100, 0), (40, 1), (3, 2), (56 - forbidden, 0)]
    targets = [target for count, target in ways for _ in range(count)]
    edges = [(0, t, target) for t, target in enumerate(targets)]
    edges += [(1, t, 2) for t in range(7)] + [(2, t, 0) for t in range(150)]
    one = Constraint.from_edges(edges, 0, {1, 2}, vocab, eos)
    whole = guide(1, states=4, vocab=vocab)
    plan, table = Plan(one, 5, 0, whole), delta(one)
    wanted = reference.control_messages(table, whole.transition, whole.emission, 5)
    laws = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    laws = laws / laws.sum(1, keepdim=True)
    behind = plan.after(0, 5, 120)  # the state that token 120 leads to
    rows = [Row(plan, s, 4, x) for s, x in zip((0, behind, 0), laws, strict=True)]
    found = {i: r for places, ratio in log_ratios(rows) for i, r in zip(places, ratio, strict=True)}
    for i, row in enumerate(rows):
        ratio = reference.control_ratio(table, whole.emission, wanted, laws[i], row.state, 4)
        assert torch.allclose(found[i].exp(), ratio, rtol=1e-11, atol=1e-300)


def test_processor_and_formula_allow_the_same_tokens() -> None:
    one = drawn(4)
    how = ConstraintProcessor(one, max_new_tokens=BUDGET)
    scores = how(torch.tensor([[0]]), torch.zeros(1, V))[0]
    step = reference.control_live(delta(one), BUDGET)[BUDGET - 1][delta(one)[0]]
    assert torch.equal(scores > -torch.inf, step & (delta(one)[0] >= 0))
