"""Constraints of requests in continuous batching, together with their adapters."""

from typing import Any

import pytest
import torch
from test_continuous_batching import MANY, alone, attached, batching, pool_of, prompts
from tiny import VOCAB

import lora_ext
from lora_ext.control import Constraint, ConstraintProcessor, Guide, Row, _rejection
from lora_ext.control._messages import Plan
from lora_ext.serving._constraining import Standing, constrained, drawn
from lora_ext.serving._sampling import Sampling

EOS, NEW = 2, 6


def three_of(allowed: tuple[int, ...]) -> Constraint:
    edges = [(s, t, s + 1) for s in range(3) for t in allowed]
    return Constraint.from_edges(edges, 0, {3}, VOCAB, EOS)


def guide(vocab: int = VOCAB) -> Guide:
    torch.manual_seed(0)
    return Guide(torch.ones(3) / 3, torch.ones(3, 3) / 3, torch.randn(3, vocab).softmax(-1))


def constrained_alone(model: Any, prompt: list[int], name: str | None, how: Any) -> list[int]:
    ids = torch.tensor([prompt])
    greedy = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": EOS}
    with lora_ext.adapters(name, pool=pool_of(model)):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), logits_processor=[how], **greedy
        )
    return out[0, len(prompt) :].tolist()


def texts_of(manager: Any, ids: list[str]) -> list[list[int]]:
    """Wait for all requests; return their new tokens in the order of ``ids``."""
    found: dict[str, list[int]] = {}
    while len(found) < len(ids):
        result = manager.get_result(timeout=60)
        if result is not None:
            assert result.error is None
            found[result.request_id] = result.generated_tokens
    return [found[i] for i in ids]


@pytest.mark.slow
def test_constrained_requests_in_a_mixed_batch_equal_single_requests() -> None:
    model, _ = attached()
    given, names = prompts(8), [*MANY[:7], None]
    constraints = [None if i % 3 == 0 else three_of((5 + i, 20, 21)) for i in range(len(given))]
    look = guide()
    guides = [look if i % 2 and c is not None else None for i, c in enumerate(constraints)]
    expected = []
    for prompt, name, c, g in zip(given, names, constraints, guides, strict=True):
        if c is None:
            expected.append(alone(model, prompt, name))
        else:
            how = ConstraintProcessor(c, g, max_new_tokens=NEW)
            expected.append(constrained_alone(model, prompt, name, how))
            assert c.accepts(expected[-1][:-1]) and expected[-1][-1] == EOS
    with model.continuous_batching_context_manager(**batching()) as manager:
        ids = [
            manager.add_request(
                prompt,
                adapter_name=name,
                constraint=c,
                guide=g,
                max_new_tokens=NEW,
                eos_token_id=-1 if c is None else EOS,
            )
            for prompt, name, c, g in zip(given, names, constraints, guides, strict=True)
        ]
        found = texts_of(manager, ids)
    assert found == expected


@pytest.mark.slow
def test_sampling_settings_and_a_constraint_may_be_combined() -> None:
    model, _ = attached()
    one = three_of((5, 20, 21))
    with model.continuous_batching_context_manager(**batching()) as manager:
        for seed in range(3):
            manager.add_request(
                prompts(1)[0],
                adapter_name="a1",
                sampling=Sampling(temperature=1.5, top_p=0.9, seed=seed),
                constraint=one,
                eos_token_id=EOS,
            )
            *text, end = manager.get_result(timeout=60).generated_tokens
            assert one.accepts(text) and end == EOS


@pytest.mark.slow
def test_guided_requests_have_their_distribution_without_a_vocabulary_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = attached()
    edges = [(0, t, 1) for t in (5, 20, 21, 33)] + [(1, 20, 2), (1, 21, 2)]
    one, look = Constraint.from_edges(edges, 0, {1, 2}, VOCAB, EOS), guide()
    prompt, heat, many = prompts(1)[0], 1.3, 300
    how = ConstraintProcessor(one, look, max_new_tokens=3, temperature=heat)
    with torch.no_grad(), lora_ext.adapters("a1", pool=pool_of(model)):
        scores = model(torch.tensor([prompt])).logits[:, -1]
    wanted = (how(torch.tensor([prompt]), scores) / heat).softmax(-1)[0]

    def no_product(*_: object) -> None:
        raise AssertionError("expected no product with the whole vocabulary, found one")

    monkeypatch.setattr(Guide, "over_vocabulary", no_product)
    with model.continuous_batching_context_manager(**batching()) as manager:
        ids = [
            manager.add_request(
                prompt,
                adapter_name="a1",
                sampling=Sampling(temperature=heat, seed=seed % many),
                constraint=one,
                guide=look,
                max_new_tokens=3,
                eos_token_id=EOS,
            )
            for seed in range(many + 1)
        ]
        texts = texts_of(manager, ids)
    assert texts[-1] == texts[0]  # The first and the last request have the same seed.
    assert all(one.accepts(t[:-1]) and t[-1] == EOS for t in texts)
    share = torch.bincount(torch.tensor([t[0] for t in texts[:many]]), minlength=VOCAB) / many
    assert (share - wanted).abs().max() < 4 * 0.5 / many**0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 3}, "max_new_tokens: expected at least 4"),
        ({"eos_token_id": 3}, r"eos_token_id: expected the end tokens of the .*, \[2\]"),
        ({"constraint": None, "guide": guide(11)}, "guide: expected None without a constraint"),
        ({"guide": guide(11)}, "guide: expected"),
    ],
)
def test_requests_that_cannot_be_satisfied_fail_before_waiting(
    settings: dict[str, Any], message: str
) -> None:
    model, pool = attached(slots=2)
    given = {"constraint": three_of((5,)), "eos_token_id": EOS} | settings
    with model.continuous_batching_context_manager(**batching()) as manager:
        with pytest.raises(ValueError, match=message):
            manager.add_request(prompts(1)[0], adapter_name="a0", **given)
        manager.add_request(prompts(1)[0], adapter_name="a0")  # The error did not stop the manager.
        assert manager.get_result(timeout=60).error is None
    assert pool.stats()["pins"] == 0


def test_scores_without_a_token_and_a_tiny_temperature_do_not_raise() -> None:
    row = Row.first(Plan(three_of((5, 20, 21)), NEW, guide=guide()))
    scores = torch.randn(1, 3, VOCAB)
    # Another processor has forbidden the only tokens of the constraint.
    scores[0, 0, [5, 20, 21]] = -torch.inf
    scores[0, 1, 20] = 9.0
    rows = [
        Standing(i, row, heat, True, torch.Generator().manual_seed(i))
        for i, heat in enumerate((1.0, 1e-40, 1.0))
    ]
    tokens, left = drawn(scores, rows)
    assert tokens[1] == 20 and tokens[2] in (5, 20, 21) and left == rows[:1]
    ended = constrained(scores, rows)[0]  # No token is possible, so the request ends.
    assert ended[0].isfinite().nonzero()[:, 0].tolist() == [EOS]
    assert not ended[1:, EOS].isfinite().any() and not ended.isnan().any()


def test_bounds_of_each_row_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, look_up = [], _rejection.log_bound
    row = Row.first(Plan(three_of((5, 20, 21)), NEW, guide=guide()))
    monkeypatch.setattr(_rejection, "log_bound", lambda row: asked.append(row) or look_up(row))
    rows = [Standing(i, row, 0.7, True, torch.Generator().manual_seed(i)) for i in range(3)]
    tokens, left = drawn(torch.randn(1, 3, VOCAB), rows)
    assert len(tokens) == 3 and not left and len(asked) == 3


@pytest.mark.parametrize("temperature", [1e-50, 1e300])
def test_forbidden_tokens_are_impossible_at_any_temperature(temperature: float) -> None:
    plans = [Plan(three_of((5, 20, 21)), NEW, guide=g) for g in (None, guide())]
    rows = [Standing(i, Row.first(p), temperature, False, None) for i, p in enumerate(plans)]
    scores = constrained(torch.randn(1, 2, VOCAB), rows)[0]
    assert not scores.isnan().any()
    assert [s.isfinite().nonzero()[:, 0].tolist() for s in scores] == [[5, 20, 21]] * 2
