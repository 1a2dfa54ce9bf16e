"""The prior head, which predicts the state of a guide from a hidden state of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from control_toys import BUDGET, H, V, constraint, guide
from torch import Tensor

from lora_ext.control import ConstraintProcessor, PriorHead


def places(count: int) -> tuple[Tensor, Tensor]:
    """Return hidden states (noisy one-hot states of the guide) and the next three tokens."""
    g, whole = torch.Generator().manual_seed(0), guide()
    state = torch.multinomial(whole.initial, count, replacement=True, generator=g)
    hidden = 2 * torch.eye(H, dtype=torch.float64)[state]
    hidden = hidden + 0.3 * torch.randn(count, H, generator=g, dtype=torch.float64)
    tokens = []
    for _ in range(3):
        tokens.append(torch.multinomial(whole.emission[state], 1, generator=g)[:, 0])
        state = torch.multinomial(whole.transition[state], 1, generator=g)[:, 0]
    return hidden, torch.stack(tokens, 1)


def test_log_prob_of_texts_equals_that_of_the_guide_with_the_prior_of_the_head() -> None:
    head = PriorHead(guide(), H)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    hidden, following = places(40)
    following[::3, 2], following[::4, 1:] = -1, -1
    wanted = guide().log_prob(following, head(hidden).detach())
    assert torch.allclose(head.log_prob(hidden, following), wanted, atol=1e-12)


def test_head_learns_the_state_of_hidden_states_and_gives_the_prior_of_a_run() -> None:
    hidden, following = places(2000)
    before = PriorHead(guide(), H).fit(hidden, following, steps=0)
    head = PriorHead(guide(), H)
    after = head.fit(hidden, following, steps=120)
    laws = head(torch.eye(H, dtype=torch.float64) * 2).detach()
    known = -float(guide().log_prob(following[-200:], torch.eye(H, dtype=torch.float64)[
        hidden[-200:].argmax(1)]).mean()) / 3  # fmt: skip
    assert known < before and after < before - 0.8 * (before - known)
    assert torch.equal(laws[:2].argmax(1), torch.arange(2))  # The third state is too rare.
    how = ConstraintProcessor(constraint(), guide(), max_new_tokens=BUDGET, prior=laws[:1])
    other = ConstraintProcessor(constraint(), guide(), max_new_tokens=BUDGET, prior=laws[1:2])
    ids, scores = torch.tensor([[1]]), torch.zeros(1, V, dtype=torch.float64)
    assert not torch.allclose(how(ids, scores), other(ids, scores))


def test_hidden_states_and_tokens_of_invalid_shapes_raise() -> None:
    head, (hidden, following) = PriorHead(guide(), H), places(4)
    for bad in ((hidden[:3], following), (hidden[:, :2], following), (hidden[:1], following[:1])):
        with pytest.raises(ValueError, match="PriorHead: hidden and following: expected"):
            head.fit(*bad)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"steps": -1}, "steps: expected an integer from 0"),
        ({"batch": 0}, "batch: expected an integer from 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number above 0"),
        ({"apart": 4}, "apart: expected an integer from 1 to 3"),
    ],
)
def test_numbers_out_of_range_raise(wrong: dict[str, Any], expected: str) -> None:
    head = PriorHead(guide(), H)
    with pytest.raises(ValueError, match=f"PriorHead: {expected}"):
        head.fit(*places(4), **wrong)
    assert not head.weight.any()


def test_guide_contains_its_head() -> None:
    whole = guide()
    with pytest.raises(ValueError, match=r"hidden_size: expected a number \(no guide.prior\)"):
        PriorHead(whole)
    whole.prior = torch.arange(3.0 * H, dtype=torch.float64).reshape(H, 3)
    assert torch.equal(PriorHead(whole).weight, whole.prior)
    with pytest.raises(ValueError, match="hidden_size: expected 3, as in guide"):
        PriorHead(whole, 4)
