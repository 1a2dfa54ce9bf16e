"""``ConstraintProcessor`` in transformers' ``generate``, and its errors."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from control_toys import BUDGET, EDGES, EOS, H, V, constraint, guide, satisfies
from torch import Tensor

from lora_ext.control import Constraint, ConstraintProcessor, Guide

transformers = pytest.importorskip("transformers")


def tiny_model(vocab: int = V, seed: int = 0) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 20  # makes probabilities differ
    return model


def new_texts(tokens: Tensor, prompt: int) -> list[tuple[int, ...]]:
    """Return the new tokens of each row without the end token; raise if a row has no end token."""
    rows = [tuple(row[prompt:]) for row in tokens.tolist()]
    return [row[: row.index(EOS)] for row in rows]


@pytest.mark.parametrize("guided", [False, True])
def test_ten_thousand_samples_satisfy_the_constraint(guided: bool) -> None:
    how = ConstraintProcessor(
        constraint(), guide() if guided else None, max_new_tokens=BUDGET, min_new_tokens=1
    )
    torch.manual_seed(0)
    tokens = tiny_model().generate(
        torch.full((10_000, 2), 1),
        do_sample=True,
        top_k=0,
        max_new_tokens=BUDGET,
        logits_processor=[how],
    )
    found = new_texts(tokens, 2)
    assert all(map(satisfies, found))
    assert len(set(found)) > 30
    assert how.log_weight.shape == (10_000,)


@pytest.mark.slow
def test_resampling_by_the_weights_gives_the_model_given_the_constraint() -> None:
    """Compare weighted means of samples with sums over all texts."""
    from control_toys import texts

    model, rows = tiny_model(), list(texts(BUDGET, 0))
    ids = torch.tensor([[1, 1, *row, *[0] * (BUDGET - len(row))] for row in rows])
    with torch.no_grad():
        log_p = model(ids).logits.double().log_softmax(-1)
    p = torch.tensor(
        [sum(float(log_p[i, 1 + k, t]) for k, t in enumerate(row)) for i, row in enumerate(rows)]
    ).softmax(0)
    wanted = torch.stack(
        [p[[3 in row for row in rows]].sum(), p[[len(r) == 3 for r in rows]].sum()]
    )
    how = ConstraintProcessor(constraint(), guide(), max_new_tokens=BUDGET)
    torch.manual_seed(1)
    tokens = model.generate(
        torch.full((20_000, 2), 1),
        do_sample=True,
        top_k=0,
        max_new_tokens=BUDGET,
        logits_processor=[how],
    )
    found, weight = new_texts(tokens, 2), how.log_weight.softmax(0)
    got = torch.stack(
        [weight[[3 in row for row in found]].sum(), weight[[len(r) == 2 for r in found]].sum()]
    )
    effective = 1 / float((weight**2).sum())
    assert (got - wanted).abs().max() < 4 * 0.5 / effective**0.5


def test_greedy_and_beams_satisfy_the_constraint_and_beams_are_at_least_as_likely() -> None:
    model, ids = tiny_model(), torch.tensor([[1, 2], [3, 0]])
    best: dict[int, list[float]] = {}
    for beams in (1, 4):
        how = ConstraintProcessor(constraint(), guide(), max_new_tokens=BUDGET)
        out = model.generate(
            ids,
            do_sample=False,
            num_beams=beams,
            max_new_tokens=BUDGET,
            logits_processor=[how],
            length_penalty=0.0,
        )
        assert all(map(satisfies, new_texts(out, 2)))
        best[beams] = [len(t) for t in new_texts(out, 2)]
    assert len(best) == 2


def test_beams_have_the_automaton_states_of_the_rows_that_they_continue() -> None:
    """Compare the scores of each beam with those of a new processor for the beam's tokens."""

    class Watched(ConstraintProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            got = super().__call__(input_ids, scores)
            for i in range(len(input_ids)):
                if not bool((got[i] > -torch.inf).any()) or self._rows[i].lost:
                    continue
                alone = ConstraintProcessor(constraint(), guide(), max_new_tokens=BUDGET)
                for end in range(2, input_ids.shape[1] + 1):
                    one = alone(input_ids[i : i + 1, :end], scores[i : i + 1])
                assert torch.allclose(one[0], got[i], atol=1e-6, rtol=0)
            return got

    how = Watched(constraint(), guide(), max_new_tokens=BUDGET)
    out = tiny_model().generate(
        torch.tensor([[1, 2], [3, 0]]),
        do_sample=False,
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=BUDGET,
        logits_processor=[how],
    )
    assert all(map(satisfies, new_texts(out, 2)))


@pytest.mark.filterwarnings("ignore:ConstraintProcessor")  # Continuing a row after its end warns.
def test_rows_may_have_different_constraints_without_changing_other_rows() -> None:
    whole = guide()
    small = Guide(whole.initial.float(), whole.transition.float(), whole.emission.float())
    other = Constraint.from_edges([(0, 1, 1), (1, 3, 1)], 0, {1}, V, EOS)
    listed = [constraint(), None, other, constraint() | other] * 4
    torch.manual_seed(2)
    scores = torch.randn(3, 16, V)
    ids = torch.randint(0, 4, (16, 2))
    rows: list[list[Tensor]] = [[] for _ in listed]
    how = ConstraintProcessor(listed, small, max_new_tokens=BUDGET)
    drawn = []
    for step in range(3):
        got = how(torch.cat([ids, *drawn], 1), scores[step])
        drawn.append(got.argmax(1, keepdim=True))
        for i in range(16):
            rows[i].append(got[i])
    for i, c in enumerate(listed):
        alone = ConstraintProcessor(c, small, max_new_tokens=BUDGET)
        for step in range(3):
            one = alone(
                torch.cat([ids[i : i + 1], *(d[i : i + 1] for d in drawn[:step])], 1),
                scores[step, i : i + 1],
            )
            assert torch.equal(one[0], rows[i][step])
            if c is None:
                assert torch.equal(one[0], scores[step, i])


def test_one_processor_is_used_for_successive_calls() -> None:
    how = ConstraintProcessor(constraint(), max_new_tokens=BUDGET)
    model = tiny_model()
    for prompt in ([[1, 2]], [[1, 2]], [[0, 0, 3], [1, 1, 1]], [[2]]):
        out = model.generate(
            torch.tensor(prompt), do_sample=False, max_new_tokens=BUDGET, logits_processor=[how]
        )
        assert all(map(satisfies, new_texts(out, len(prompt[0]))))


@pytest.mark.parametrize("ends", ["early", "at the budget", "beside a row without a constraint"])
def test_run_after_reset_on_the_same_rows_has_a_new_budget(ends: str) -> None:
    early = ends == "early"
    one = Constraint.from_edges([(0, 2, 1)], 0, {1}, V, EOS) if early else constraint()
    listed = [one, None] if ends.startswith("beside") else one
    how = ConstraintProcessor(listed, max_new_tokens=BUDGET)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": BUDGET, "eos_token_id": EOS}
    model, rows = tiny_model(), torch.tensor([[1, 2], [0, 3]])
    for _ in range(3):
        start = rows.shape[1]
        alone = ConstraintProcessor(listed, max_new_tokens=BUDGET)
        wanted = model.generate(rows, logits_processor=[alone], **settings)
        how.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            rows = model.generate(rows, logits_processor=[how], **settings)
        assert torch.equal(rows, wanted) and torch.equal(how.log_weight, alone.log_weight)
        constrained = rows[:1] if ends.startswith("beside") else rows
        assert all(map(one.accepts, new_texts(constrained, start)))


def test_run_without_reset_on_the_same_rows_warns() -> None:
    how = ConstraintProcessor(constraint(), max_new_tokens=BUDGET)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": BUDGET, "eos_token_id": EOS}
    model = tiny_model()
    rows = model.generate(torch.tensor([[1, 2]]), logits_processor=[how], **settings)
    with pytest.warns(UserWarning, match=r"call reset\(\) first") as caught:
        model.generate(rows, logits_processor=[how], **settings)
    assert len(caught) == 1


@pytest.mark.filterwarnings("ignore:ConstraintProcessor")
def test_generate_without_eos_token_id_gives_one_text_followed_by_end_tokens() -> None:
    once = Constraint.from_edges([(0, 1, 1), (1, 2, 2), (2, 3, 3)], 0, {3}, V, EOS)
    how = ConstraintProcessor(once, max_new_tokens=10)
    model = tiny_model()
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor([[1, 1]]), do_sample=False, max_new_tokens=10, logits_processor=[how]
    )
    assert out[0, 2:].tolist() == [1, 2, 3] + [EOS] * 7


def test_row_beyond_the_budget_changes_no_weight_of_other_rows() -> None:
    how = ConstraintProcessor([constraint(), None], max_new_tokens=3)
    rows, weights = torch.ones(2, 3, dtype=torch.long), []
    scores = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="found one after 3 new tokens") as caught:
        for _ in range(7):
            chosen = how(rows, scores).argmax(1)
            chosen[1] = 0
            rows = torch.cat([rows, chosen[:, None]], 1)
            weights.append(how.log_weight)
    assert len(caught) == 1
    assert rows[0, 6:].tolist() == [EOS] * 4
    assert all(torch.equal(each, weights[2]) for each in weights[3:]) and weights[2][0] != 0


def test_rows_that_do_not_continue_the_last_call_raise() -> None:
    how = ConstraintProcessor(constraint(), max_new_tokens=BUDGET)
    ids, scores = torch.tensor([[1, 2]]), torch.zeros(1, V)
    how(ids, scores)
    how(torch.tensor([[1, 2, 0]]), scores)
    how(torch.tensor([[1, 2, 0, 2]]), scores)
    with pytest.raises(ValueError, match=r"input_ids.*one more token each"):
        how(torch.tensor([[1, 2, 0]]), scores)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 1}, "max_new_tokens: expected at least 2.*found 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number, at least 1, found 0"),
        ({"max_new_tokens": 5, "min_new_tokens": 5}, "min_new_tokens: expected less than.*5"),
        ({"max_new_tokens": 5, "temperature": 0.0}, "temperature: expected a number above 0"),
        ({"max_new_tokens": 5, "prior": torch.ones(1, H) / H}, "prior: expected None, as"),
    ],
)
def test_settings_that_cannot_be_satisfied_raise_early(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ConstraintProcessor(constraint(), **settings)


def test_minimum_length_beyond_the_language_raises() -> None:
    short = Constraint.from_edges([(0, 1, 1)], 0, {1}, V, EOS)
    with pytest.raises(ValueError, match="min_new_tokens: expected an allowed text of 3 to 7"):
        ConstraintProcessor(short, max_new_tokens=8, min_new_tokens=3)


def test_vocabularies_and_rows_that_do_not_fit_raise() -> None:
    how = ConstraintProcessor(constraint(), max_new_tokens=BUDGET)
    with pytest.raises(ValueError, match="a vocab_size of 6, as in the scores, found 5"):
        how(torch.tensor([[1]]), torch.zeros(1, 6))
    how = ConstraintProcessor([constraint(), None], max_new_tokens=BUDGET)
    with pytest.raises(ValueError, match="divides the 3 rows, as one per prompt does, found 2"):
        how(torch.ones(3, 1, dtype=torch.long), torch.zeros(3, V))
    with pytest.raises(ValueError, match="guide: expected the constraint's vocab_size, 5"):
        ConstraintProcessor(constraint(), guide(vocab=7), max_new_tokens=BUDGET)


@pytest.mark.parametrize("guided", [False, True])
def test_lost_row_does_not_change_other_rows(guided: bool) -> None:
    """Check a row with a forbidden token, which is unconstrained afterwards."""
    look, scores = guide() if guided else None, torch.randn(2, V, dtype=torch.float64)
    both = ConstraintProcessor(constraint(), look, max_new_tokens=BUDGET)
    alone = ConstraintProcessor(constraint(), look, max_new_tokens=BUDGET)
    for text in (
        [[1], [1]],
        [[1, 3], [1, 2]],
        [[1, 3, 3], [1, 2, 0]],
        [[1, 3, 3, 1], [1, 2, 0, 1]],
    ):
        got = both(torch.tensor(text), scores)
        assert torch.allclose(got[1:], alone(torch.tensor(text[1:]), scores[1:]), atol=1e-14)
    assert torch.equal(got[0], scores[0])


def test_penalty_that_forbids_all_allowed_tokens_raises() -> None:
    how = ConstraintProcessor(constraint(), max_new_tokens=2)  # Only token 2 is allowed.
    scores = torch.zeros(1, V)
    scores[0, 2] = -torch.inf
    with pytest.raises(ValueError, match=re.escape("min_new_tokens, forbids all of them")):
        how(torch.tensor([[1]]), scores)


def test_edges_of_the_toy_language_are_the_smallest_automaton() -> None:
    assert constraint().num_states == len({s for s, _, _ in EDGES})
