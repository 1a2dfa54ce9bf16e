"""The token distributions of masking and of guides, checked by enumeration of all texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from control_toys import (
    BUDGET,
    EOS,
    LEAST,
    Prefix,
    V,
    constraint,
    guide,
    hmm_model,
    probability,
    satisfaction,
    table_model,
    texts,
)
from torch import Tensor

from lora_ext.control import Constraint, ConstraintProcessor, Guide
from lora_ext.control._messages import Plan

PROMPT = 1
Model = Callable[[Prefix], Tensor]


def every_text() -> list[Prefix]:
    return list(texts())


def forced(
    processor: ConstraintProcessor, model: Model, rows: Sequence[Prefix]
) -> tuple[list[float], Tensor]:
    """Return the processor's probabilities of these texts, and their log weights."""
    out = [1.0] * len(rows)
    for step in range(max(map(len, rows))):
        ids = torch.tensor([[PROMPT, *(row + (0,) * step)[:step]] for row in rows])
        t = processor.temperature
        scores = torch.stack([model((row + (0,) * step)[:step]).log() * t for row in rows])
        law = (processor(ids, scores) / t).softmax(-1)
        for i, row in enumerate(rows):
            if step < len(row):
                out[i] *= float(law[i, row[step]])
    return out, processor.log_weight


def processor(guide: Guide | None, **settings: object) -> ConstraintProcessor:
    settings = {"max_new_tokens": BUDGET, "min_new_tokens": LEAST} | settings
    return ConstraintProcessor(constraint(), guide, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_guided_law_is_the_exact_conditional_if_the_model_is_the_guide(
    temperature: float,
) -> None:
    model, rows = hmm_model(guide()), every_text()
    joint = [probability(model, row) for row in rows]
    law, _ = forced(processor(guide(), temperature=temperature), model, rows)
    assert law == pytest.approx([p / sum(joint) for p in joint], abs=1e-13)


@pytest.mark.parametrize("guided", [False, True])
def test_drawn_texts_satisfy_the_constraint_and_weights_recover_the_model(
    guided: bool,
) -> None:
    model, rows = table_model(), every_text()
    law, weight = forced(processor(guide() if guided else None), model, rows)
    assert sum(law) == pytest.approx(1, abs=1e-13)  # All other texts have probability 0.
    back = [p * math.exp(w) for p, w in zip(law, weight.tolist(), strict=True)]
    assert back == pytest.approx([probability(model, row) for row in rows], rel=1e-11)


def test_mask_law_is_the_model_on_tokens_that_can_still_end_in_time() -> None:
    model, rows = table_model(), every_text()
    wanted = []
    for row in rows:
        product = 1.0
        for i, token in enumerate(row):
            live = {other[i] for other in rows if other[:i] == row[:i]}
            p = model(row[:i])
            product *= float(p[token] / p[sorted(live)].sum())
        wanted.append(product)
    law, _ = forced(processor(None), model, rows)
    assert law == pytest.approx(wanted, abs=1e-14)


@pytest.mark.parametrize("prefix", [(), (0,), (3,), (2, 0), (0, 3), (1, 2, 3)])
def test_ratio_is_the_probability_of_the_constraint_under_the_guide(prefix: Prefix) -> None:
    rows = torch.tensor([[PROMPT]])
    how = processor(guide())
    got = how(rows, torch.zeros(1, V, dtype=torch.float64))
    for token in prefix:
        rows = torch.cat([rows, torch.tensor([[token]])], 1)
        got = how(rows, torch.zeros(1, V, dtype=torch.float64))
    wanted = [satisfaction(guide(), (*prefix, token)) for token in range(V)]
    assert got[0].exp().tolist() == pytest.approx(wanted, abs=1e-14)


def test_ratio_of_a_guide_of_one_state_does_not_depend_on_the_prefix() -> None:
    one = guide(3, states=1)
    behind = []
    for prefix in ((0, 2), (1, 2)):
        how = processor(one)
        ids = torch.tensor([[PROMPT]])
        for token in (*prefix, None):
            got = how(ids, torch.zeros(1, V, dtype=torch.float64))
            if token is not None:
                ids = torch.cat([ids, torch.tensor([[token]])], 1)
        behind.append(got)
    assert torch.equal(*behind)
    table, scale = Plan(constraint(), BUDGET, LEAST, one).messages(BUDGET - 3)
    state = constraint().next_state(0, 2)
    assert float(behind[0][0, 0]) == pytest.approx(float(table[state, 0].log() + scale[state]))


def test_constraint_that_allows_all_tokens_changes_no_bit_before_the_last_token() -> None:
    free = Constraint.from_edges([(0, t, 0) for t in range(4)], 0, {0}, V, EOS)
    how = ConstraintProcessor(free, max_new_tokens=3)
    ids, scores = torch.zeros(2, 1, dtype=torch.long), torch.randn(2, V)
    for step in range(3):
        got = how(ids, scores)
        if step < 2:
            assert torch.equal(got, scores)
        ids = torch.cat([ids, torch.ones(2, 1, dtype=torch.long)], 1)
    assert (got > -torch.inf).tolist() == [[False] * 4 + [True]] * 2


def test_prior_takes_the_prompt_into_account() -> None:
    whole, model = guide(), hmm_model(guide())
    prompt = (0, 3, 1)
    prior = whole.filter(torch.tensor([prompt]))
    rows = every_text()
    joint = [probability(lambda x: model((*prompt, *x)), row) for row in rows]
    law, _ = forced(processor(whole, prior=prior), lambda x: model((*prompt, *x)), rows)
    assert law == pytest.approx([p / sum(joint) for p in joint], abs=1e-13)


def test_padding_before_a_prompt_does_not_change_the_state_distribution() -> None:
    prompts = torch.tensor([[-1, -1, 0, 3], [1, 2, 0, 3]])
    laws = guide().filter(prompts)
    assert torch.allclose(laws[:1], guide().filter(torch.tensor([[0, 3]])), atol=1e-15)
    assert torch.allclose(laws[1:], guide().filter(prompts[1:]), atol=1e-15)


def test_token_that_is_impossible_for_the_guide_can_still_satisfy_the_constraint() -> None:
    whole = guide()
    emission = whole.emission.clone()
    emission[:, 2] = 0  # the required token
    emission /= emission.sum(1, keepdim=True)
    rows = every_text()
    law, _ = forced(
        processor(Guide(whole.initial, whole.transition, emission)), table_model(), rows
    )
    assert sum(law) == pytest.approx(1, abs=1e-13)  # Other texts have probability 0; none is NaN.


def test_float32_guide_keeps_allowed_tokens_through_a_long_budget() -> None:
    """Check a text of 299 tokens and an end token. The guide gives each required token probability
    0.001."""
    emission = torch.tensor([[0.001, 0.9989, 1e-4], [0.001, 0.9989, 1e-4]])
    whole = Guide(torch.tensor([0.5, 0.5]), torch.full((2, 2), 0.5), emission)
    zeros = Constraint.from_edges([(s, 0, s + 1) for s in range(299)], 0, {299}, 3, 2)
    how = ConstraintProcessor(zeros, whole, max_new_tokens=300)
    ids, drawn = torch.zeros(1, 1, dtype=torch.long), []
    for _ in range(300):
        law = how(ids, torch.zeros(1, 3)).softmax(-1)
        assert torch.isfinite(law).all()
        drawn.append(int(law.argmax()))
        ids = torch.cat([ids, torch.tensor([[drawn[-1]]])], 1)
    assert drawn == [0] * 299 + [2]


def test_tables_above_the_limit_are_recomputed_with_equal_values() -> None:
    from lora_ext.control import Limits

    many = Plan(constraint(), 40, 2, guide(), Limits(max_table_bytes=300))
    all_kept = Plan(constraint(), 40, 2, guide())
    assert many.messages._stride > 1 == all_kept.messages._stride
    for k in (40, 3, 17, 18, 0, 39, 7, 1):
        for got, wanted in zip(many.messages(k), all_kept.messages(k), strict=True):
            assert torch.equal(got, wanted)


def test_plans_of_equal_content_share_their_tables() -> None:
    whole = guide()
    first, second = Plan(constraint(), 9, 0, whole), Plan(constraint(), 30, 0, whole)
    assert first.messages is second.messages
    assert Plan(constraint(), 9, 1, whole).messages is not first.messages


def test_tables_of_a_small_budget_are_reused_for_a_large_one() -> None:
    whole = guide()
    small, large = Plan(constraint(), 3, 0, whole), Plan(constraint(), 30, 0, whole)
    alone = Plan(constraint(), 30, 0, guide())
    assert small.messages is large.messages  # Both plans use the same tables.
    for k in range(31):
        for got, wanted in zip(large.messages(k), alone.messages(k), strict=True):
            assert torch.equal(got, wanted)
