"""`window_loss`: cross entropy, distillation, gradients, shortlist and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuit_heads import DOUBLE, KINDS, D, K, V, hidden, make
from torch import Tensor

from lora_ext.layers.labels import IGNORE
from lora_ext.methods.mtpc import window_loss
from lora_ext.nn import CircuitHead


@pytest.mark.parametrize("kind", KINDS)
def test_loss_without_discount_equals_the_joint_likelihood(kind: str):
    head, h, x = make(kind), hidden(2, 3), torch.randint(0, V, (2, 3, K))
    loss, _ = window_loss(head, h, x, gamma=1.0)
    expected = -head.log_prob(h, x)[..., -1].mean() / K
    torch.testing.assert_close(loss, expected)


def test_loss_equals_the_formula_with_ignored_targets():
    head, h, x = make("hmm"), hidden(5), torch.randint(0, V, (5, K))
    x[0, 1] = x[1, 2:] = IGNORE
    x[:, 3] = IGNORE  # No target is valid, so the term is 0 instead of 0 / 0.
    loss, each = window_loss(head, h, x, gamma=0.5)
    c = head.conditionals(h, x)
    terms = [-c[:, k].sum() / max(1, int((x[:, k] != IGNORE).sum())) for k in range(K)]
    torch.testing.assert_close(each, torch.stack(terms))
    expected = sum(0.5**k * t for k, t in enumerate(terms)) / (1 + 0.5 + 0.25 + 0.125)
    torch.testing.assert_close(loss, expected)
    assert each[3] == 0


@pytest.mark.parametrize("leading", [(5,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_distillation_equals_the_divergence_from_the_teacher(kind: str, leading: tuple[int, ...]):
    head, h, x = make(kind), hidden(*leading), torch.randint(0, V, (*leading, K))
    x[0, ..., -1] = IGNORE
    teacher = torch.randn(*leading, K, V, dtype=DOUBLE)
    teacher[..., 0, 0] = -torch.inf  # a token forbidden by the teacher adds nothing
    _, each = window_loss(head, h, x, beta=1.0, teacher_logits=teacher)
    for k in range(K):
        q = head.full_conditional(h, x, k)
        p = teacher[..., k, :].softmax(-1)
        gap = torch.where(p > 0, p * (p.log() - q), 0).sum(-1)
        valid = x[..., k] != IGNORE
        torch.testing.assert_close(each[k], gap[valid].mean())
    half, _ = window_loss(head, h, x, beta=0.5, teacher_logits=teacher)
    whole, _ = window_loss(head, h, x, beta=1.0, teacher_logits=teacher)
    torch.testing.assert_close(half, (whole + window_loss(head, h, x)[0]) / 2)


@pytest.mark.parametrize(
    ("kind", "emission"), [*((k, "full") for k in KINDS), ("cp", "expander"), ("hmm", "adapter")]
)
def test_gradients_of_all_parameters_equal_finite_differences(kind: str, emission: str):
    head, h, x = (
        make(kind, emission, n_token=3),
        hidden(2),
        torch.tensor([[0, IGNORE, 2], [1, 1, 0]]),
    )
    names, values = zip(*head.named_parameters(), strict=True)
    h.requires_grad_()

    def loss(h: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(
            Loss(head), {f"head.{n}": p for n, p in given.items()}, (h, x)
        )

    assert torch.autograd.gradcheck(loss, (h, *values))


class Loss(torch.nn.Module):
    """Module with the loss as its forward, for functional_call."""

    def __init__(self, head: CircuitHead):
        super().__init__()
        self.head = head

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return window_loss(self.head, h, x)[0]


def test_windows_without_targets_have_zero_loss_and_gradient():
    head, x = make("btree"), torch.full((3, K), IGNORE)
    loss, _ = window_loss(head, hidden(3), x)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


def test_loss_does_not_depend_on_row_chunks(monkeypatch: pytest.MonkeyPatch):
    head, h, x = make("hmm", "adapter"), hidden(7), torch.randint(0, V, (7, K))
    teacher = torch.randn(7, K, V, dtype=DOUBLE)
    whole, _ = window_loss(head, h, x, beta=0.5, teacher_logits=teacher)
    monkeypatch.setattr("lora_ext.layers._chunks._ELEMENTS", 3 * K * 3 * D)
    parts, _ = window_loss(head, h, x, beta=0.5, teacher_logits=teacher)
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_tokens_outside_the_shortlist_are_marginalised(beta: float):
    small, listed = make("hmm"), torch.tensor([0, 3, 4])
    head = CircuitHead(D, 5, K, 3, "hmm", dtype=DOUBLE, shortlist=listed)
    head.load_state_dict({**small.state_dict(), "shortlist": listed})
    h, x = hidden(2, 5), torch.randint(0, V, (2, 5, K))
    teacher = torch.randn(2, 5, K, 5, dtype=DOUBLE)
    wide = listed[x]
    x[0, :3, 1], wide[0, :3, 1] = IGNORE, 2
    x[1, :, 0], wide[1, :, 0] = IGNORE, 1
    found = window_loss(head, h, wide, beta=beta, teacher_logits=teacher)
    expected = window_loss(small, h, x, beta=beta, teacher_logits=teacher[..., listed])
    torch.testing.assert_close(found, expected)
    found[0].backward()
    expected[0].backward()
    torch.testing.assert_close(head.emit.grad, small.emit.grad)


def test_teacher_that_forbids_the_shortlist_gives_finite_gradients():
    head = CircuitHead(D, 5, K, 3, "hmm", dtype=DOUBLE, shortlist=[0, 3])
    labels = torch.tensor([[0, 3, 1, 0]])
    teacher = torch.zeros(1, K, 5, dtype=DOUBLE)
    teacher[0, 1:3, [0, 3]] = -torch.inf  # The teacher forbids a valid and an ignored label.
    loss, each = window_loss(head, hidden(1), labels, beta=0.5, teacher_logits=teacher)
    loss.backward()
    assert each.isfinite().all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("shortlist", [None, [2, 0]])
@pytest.mark.parametrize("emission", ["full", "adapter"])
def test_loss_compiles_without_graph_breaks(emission: str, shortlist: list[int] | None):
    head, h = make("hmm", emission, shortlist=shortlist), hidden(3)
    labels = torch.randint(V, (3, K))
    labels[1, 2] = IGNORE
    compiled = torch.compile(
        lambda *t: window_loss(head, *t)[0], fullgraph=True, backend="aot_eager"
    )
    parameters = list(head.parameters())
    a, b = compiled(h, labels), window_loss(head, h, labels)[0]
    assert torch.equal(a, b)
    for mine, eager in zip(
        torch.autograd.grad(a, parameters), torch.autograd.grad(b, parameters), strict=True
    ):
        assert torch.allclose(mine, eager, rtol=1e-10, atol=1e-12)
    for wrong in (labels + V, labels.clamp(max=-7)):
        with pytest.raises(ValueError, match=r"emission_gather: x\[.*: expected"):
            compiled(h, wrong)


def test_empty_batch_has_zero_loss_and_gradients():
    head, h = make("hmm"), hidden(0)
    x, teacher = torch.empty(0, K, dtype=torch.int64), torch.empty(0, K, V, dtype=DOUBLE)
    loss, _ = window_loss(head, h, x, beta=0.5, teacher_logits=teacher)
    loss.backward()
    assert loss == 0


def test_errors_name_invalid_arguments():
    head, h, x = make("cp"), hidden(2, 3), torch.zeros(2, 3, K, dtype=torch.int64)
    wide = torch.zeros(2, 3, K, V + 1)
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"gamma: expected a number in \(0, 1\], found 0.0", {"gamma": 0.0}),
        ("gamma: .*found 1.1", {"gamma": 1.1}),
        (r"beta: expected a number in \[0, 1\], found -0.1", {"beta": -0.1}),
        ("teacher_logits: .*found none", {"beta": 0.5}),
        (r"teacher_logits: .*found \(2, 3, 4, 4\)", {"beta": 0.5, "teacher_logits": wide}),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=f"window_loss: {message}"):
            window_loss(head, h, x, **arguments)
    with pytest.raises(ValueError, match="tokens: expected shape"):
        window_loss(head, h, x[..., :-1])
