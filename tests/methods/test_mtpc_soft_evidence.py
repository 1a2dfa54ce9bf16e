"""Circuit heads with soft evidence: one shared circuit times the logits of each row."""

from __future__ import annotations

import copy
import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from circuit_heads import DOUBLE, D, K, V, hidden, make, windows
from methods.test_mtpc_decoder import Enumerated, enumerate_paths
from methods.toy import make_draft, make_model, prompts, train
from torch import Tensor, nn

from lora_ext import reference
from lora_ext.layers import IGNORE
from lora_ext.methods import mtpc
from lora_ext.methods.mtpc import _evidence, layers
from lora_ext.methods.mtpc._emission import EMISSIONS
from lora_ext.nn import CircuitHead

KINDS = ("cp", "hmm", "btree")
SOFT: Any = {"evidence": "soft"}


def evidence_of(head: CircuitHead, h: Tensor) -> Tensor:
    """Return the logits ``(N, K, L)`` that the head computes from hidden states."""
    return head.leaves.logits(h)[:, :, 0]


def shared_law(head: CircuitHead, x: Tensor) -> Tensor:
    """Return the log-probability of windows under the shared circuit alone."""
    trans = head.trans_bias
    if trans is not None:
        trans = trans.expand(head.sums.num_transitions, -1, -1)[None]
    circuit = head.leaf[None], head.prior[:, 0][None], trans
    parts = [None if t is None else t.expand(len(x), *t.shape[1:]) for t in circuit]
    return reference.circuit_scan(head.kind, *parts, x).prefix[:, -1]


def law(head: CircuitHead, h: Tensor) -> Tensor:
    """Return the probabilities of all windows, given one hidden state ``(1, D)``."""
    x = windows(head.n_token)
    logits = evidence_of(head, h)[0]
    score = shared_law(head, x) + logits[torch.arange(head.n_token), x].sum(1)
    return score.softmax(0)


# -------------------------------------------------------------------------------------------------
# Distribution


def test_chain_with_integer_weights_has_the_probabilities_of_its_paths():
    head = CircuitHead(1, 2, 3, 2, "hmm", dtype=DOUBLE, **SOFT)
    prior, leaf = (1, 3), [[[1, 3], [2, 2]], [[3, 1], [1, 3]], [[2, 2], [3, 1]]]
    trans, evidence = [[[1, 1], [3, 1]], [[2, 2], [1, 3]]], [[1, 2], [5, 1], [2, 7]]
    with torch.no_grad():
        head.prior.copy_(torch.tensor(prior)[:, None].log())
        head.leaf.copy_(torch.tensor(leaf).log())
        head.trans_bias.copy_(torch.tensor(trans).log())
        head.emit.copy_(torch.tensor(evidence)[:, None, :, None].log())
    weights = dict.fromkeys(itertools.product(range(2), repeat=3), Fraction(0))
    for x in weights:
        for z in itertools.product(range(2), repeat=3):
            path = Fraction(prior[z[0]], sum(prior))
            for k in range(3):
                path *= Fraction(leaf[k][z[k]][x[k]], sum(leaf[k][z[k]])) * evidence[k][x[k]]
                if k:
                    row = trans[k - 1][z[k - 1]]
                    path *= Fraction(row[z[k]], sum(row))
            weights[x] += path
    expected = [float(weight / sum(weights.values())) for weight in weights.values()]
    x = torch.tensor(list(weights))
    found = head.log_prob(torch.ones(8, 1, dtype=DOUBLE), x)[:, -1].exp()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=DOUBLE))


@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize(("kind", "n"), [*((kind, K) for kind in KINDS), ("cp", 1), ("btree", 2)])
def test_probabilities_are_those_of_all_windows(kind: str, n: int, emission: str):
    head, h, x = make(kind, emission, n, **SOFT), hidden(1), windows(n)
    expected = law(head, h)
    log_prob = head.log_prob(h.expand(len(x), D), x)
    assert log_prob[:, -1].exp().sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(log_prob[:, -1].exp(), expected)
    table = expected.view([V] * n)
    for k in range(n):  # marginals of every prefix
        prefix = table.sum(tuple(range(k + 1, n))) if k + 1 < n else table
        torch.testing.assert_close(log_prob[:, k].exp(), prefix[tuple(x[:, : k + 1].T)])
        one = torch.full((V, n), IGNORE)
        one[:, k] = torch.arange(V)
        marginal = table.sum([j for j in range(n) if j != k]) if n > 1 else table
        torch.testing.assert_close(head.log_prob(h.expand(V, D), one)[:, -1].exp(), marginal)
    conditionals = head.conditionals(h.expand(len(x), D), x)
    torch.testing.assert_close(conditionals.cumsum(-1), log_prob)
    last = head.full_conditional(h.expand(len(x), D), x, n - 1)
    torch.testing.assert_close(last.gather(1, x[:, -1:])[:, 0], conditionals[:, -1])


@pytest.mark.parametrize("shortlist", [None, [0, 2]])
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_decoding_have_the_same_distribution(kind: str, shortlist: list[int] | None):
    head, h = make(kind, shortlist=shortlist, **SOFT), hidden(2, 3)
    x = torch.randint(0, V, (2, 3, K), generator=torch.Generator().manual_seed(5))
    x[0, 1, 2] = IGNORE
    circuit, tokens = head.circuit(h), torch.where(x < 0, -1, x).view(-1, K)
    expected = reference.circuit_scan(kind, *circuit, tokens)
    torch.testing.assert_close(head.log_prob(h, x).view(-1, K), expected.prefix)


def test_chunks_of_rows_do_not_change_values_and_gradients(monkeypatch: pytest.MonkeyPatch):
    head, h, x = make("hmm", **SOFT), hidden(7), torch.randint(0, V, (7, K))
    found = []
    for rows in (100, 3):
        monkeypatch.setattr(_evidence, "rows_per_chunk", lambda _, rows=rows: rows)
        head.zero_grad()
        value = head.conditionals(h, x)
        value.sum().backward()
        found.append([value, *(p.grad for p in head.parameters())])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_circuit_gives_the_factorised_head(kind: str):
    head, plain = make(kind, **SOFT), make("ff")
    h, x = hidden(5), torch.randint(0, V, (5, K))
    with torch.no_grad():
        head.emit.copy_(plain.emit)
        head.leaf.zero_()
    torch.testing.assert_close(head.log_prob(h, x), plain.log_prob(h, x), rtol=0, atol=1e-13)
    torch.testing.assert_close(
        head.circuit(h).leaf.softmax(-1), plain.circuit(h).leaf.softmax(-1).expand(5, K, 3, V)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_without_evidence_the_head_is_the_shared_circuit(kind: str):
    head, x = make(kind, **SOFT), windows()
    expected = shared_law(head, x)
    for h in (torch.zeros(1, D, dtype=DOUBLE), hidden(1)):
        torch.testing.assert_close(head.log_prob(h.expand(len(x), D), x)[:, -1], expected)
        with torch.no_grad():
            head.emit.zero_()


def test_extreme_evidence_keeps_the_distribution():
    # The evidence contradicts every state by e^-200, which is zero in float32.
    head = make("hmm", n_token=3, dtype=torch.float32, **SOFT)
    with torch.no_grad():
        head.leaf.copy_(200.0 * torch.eye(3).roll(1, 1))
        head.leaf[:, :, 1] = -200 + torch.arange(3.0)
        head.emit.zero_()
        head.emit[:, :, 1] = 400 / D
    h, x = torch.ones(1, D), windows(3)
    exact = law(head.double(), h.double())
    head.float()
    found = head.log_prob(h.expand(len(x), D).requires_grad_(), x)[:, -1]
    # Logits up to 400 are rounded to 2^-16, and three of them are added.
    torch.testing.assert_close(found.exp().double(), exact, rtol=0, atol=6 * 400 * 2.0**-23)
    found[exact > 1e-20].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_logits_and_circuit_equal_differences(kind: str):
    head, x = make(kind, **SOFT), torch.randint(0, V, (2, K))
    x[1, 2] = IGNORE
    names = [name for name, _ in head.named_parameters()]

    def value(h: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(head, state, (h, x), strict=True)

    head.forward = head.conditionals  # pyright: ignore[reportAttributeAccessIssue]
    inputs = [hidden(2), *(p.detach().clone() for p in head.parameters())]
    assert {name.split(".")[-1] for name in names} >= {"emit", "leaf", "prior"}
    assert torch.autograd.gradcheck(value, [t.requires_grad_() for t in inputs])


# -------------------------------------------------------------------------------------------------
# Samples and verification


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_frequencies_of_the_distribution(kind: str):
    head, h, n = make(kind, n_token=2, **SOFT), hidden(1), 20_000
    p = law(head, h)
    tokens, conditional = head.sample(h.expand(n, D), generator=torch.Generator().manual_seed(1))
    found = torch.bincount(tokens[:, 0] * V + tokens[:, 1], minlength=V * V) / n
    # Hoeffding's inequality and a union bound: one of 9 frequencies exceeds this once in 10^6.
    assert (found - p).abs().max() < math.sqrt(math.log(2 * 9 * 1e6) / (2 * n))
    torch.testing.assert_close(conditional, head.conditionals(h.expand(n, D), tokens))


@pytest.mark.parametrize("window", ["condition", "restart"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_the_model(kind: str, window: Any):
    model, (ids, mask) = make_model("llama"), prompts(2)
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
    for fields in ({}, {"shortlist": torch.tensor([0, 1, 3])}, {"bridge": 4, "chain": 2}):
        if window == "restart" and "bridge" in fields:
            continue
        draft = make_draft(model, kind, **SOFT, **fields)
        found = draft.decoder(mode="greedy", window=window).generate(ids, mask, max_new_tokens=20)
        assert torch.equal(found.sequences, expected)


@pytest.mark.parametrize(("kind", "v", "n"), [("hmm", 3, 2), ("cp", 2, 2), ("btree", 2, 3)])
def test_sampled_tokens_have_the_distribution_of_the_model(kind: str, v: int, n: int):
    total, expected = enumerate_paths(Enumerated, "condition", kind, v, n, **SOFT)
    assert (total - expected).abs().sum().item() / 2 < 1e-12


# -------------------------------------------------------------------------------------------------
# Training, files and errors


@pytest.mark.parametrize("kind", ["hmm", "btree"])
def test_shared_circuit_learns_a_bigram_that_factors_cannot(kind: str):
    # The first of four tokens determines the rest: log 4 nats in total, at each position for ff.
    follows, x = torch.tensor([2, 3, 1, 0]), [torch.arange(4)]
    for _ in range(3):
        x.append(follows[x[-1]])
    torch.manual_seed(0)
    head = CircuitHead(2, 4, 4, 4, kind, **SOFT)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss, _ = mtpc.window_loss(head, torch.ones(4, 2), torch.stack(x, 1), gamma=1.0)
        loss.backward()
        optimizer.step()
    assert loss.item() < math.log(4) - 0.5


def test_distillation_trains_every_parameter():
    draft = make_draft(make_model("llama"), "hmm", beta=0.5, **SOFT)
    ids = torch.randint(0, 5, (2, 9))
    before = draft.loss(ids)[0].item()
    assert train(draft, ids, steps=20) < before
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in draft.head.parameters())


@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_draft_is_restored(tmp_path: Path, kind: str, emission: Any):
    model, (ids, mask) = make_model("llama"), prompts(2)
    draft = make_draft(model, kind, emission=emission, share_transitions=True, **SOFT)
    draft.save(tmp_path)
    found = mtpc.Draft.load(make_model("llama"), tmp_path)
    assert found.config == draft.config and found.config.evidence == "soft"
    assert torch.equal(found.loss(ids)[0], draft.loss(ids)[0])
    runs = [d.decoder().generate(ids, mask, max_new_tokens=9, seed=1) for d in (draft, found)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert draft.head.state_dict().keys() >= {"leaf", "prior"}
    state = make_draft(model, kind, emission=emission, share_transitions=True).head.state_dict()
    with pytest.raises(RuntimeError, match="leaf"):
        draft.head.load_state_dict(state)


def test_low_precision_parameters_give_results_near_float64():
    head, h, x = make("hmm", dtype=torch.bfloat16, **SOFT), hidden(9), torch.randint(0, V, (9, K))
    found = head.log_prob(h, x)
    assert found.dtype == torch.float32 and head.circuit(h).leaf.dtype == torch.float32
    h = h.bfloat16().double()
    exact = head.double().log_prob(h, x)
    # Logits are rounded to 8 bits; each of K positions adds twice the error of the largest one.
    largest = head.leaves.logits(h).abs().max().item()
    assert (found - exact).abs().max() < 2 * K * largest * 2**-8


def test_errors_name_evidence():
    with pytest.raises(ValueError, match="CircuitHead: evidence: expected 'none' for 'ff'"):
        CircuitHead(D, V, K, 1, "ff", evidence="soft")
    with pytest.raises(ValueError, match="MtpcConfig: evidence: expected 'none' for 'ff'"):
        mtpc.MtpcConfig(rank=1, kind="ff", evidence="soft")
    for value in ("no", True, None):
        with pytest.raises((TypeError, ValueError), match="evidence: expected one of"):
            mtpc.MtpcConfig(evidence=value)  # pyright: ignore[reportArgumentType]
        with pytest.raises((TypeError, ValueError), match="evidence: expected one of"):
            CircuitHead(D, V, K, 3, "hmm", evidence=value)  # pyright: ignore[reportArgumentType]
    assert "evidence='soft'" in repr(make("cp", **SOFT))


# -------------------------------------------------------------------------------------------------
# Kept probabilities and memory


@pytest.fixture
def eager(monkeypatch):
    """Return a function that computes the circuit of a head without kept probabilities."""

    def circuit(head: CircuitHead, h: Tensor) -> list[Tensor | None]:
        with monkeypatch.context() as patch:
            patch.setattr(_evidence, "_state", lambda _: None)
            return list(head.circuit(h))

    return circuit


def doubled(head: CircuitHead) -> dict[str, Tensor]:
    return {name: 2 * value for name, value in head.state_dict().items()}


CHANGES: dict[str, Any] = {
    "step": lambda head: torch.optim.SGD([head.leaf], lr=1.0).step(),
    "state": lambda head: head.load_state_dict(doubled(head)),
    "assigned": lambda head: head.load_state_dict(doubled(head), assign=True),
    "prior": lambda head: head.prior.mul_(2),
    "transitions": lambda head: None if head.trans_bias is None else head.trans_bias.mul_(2),
    "low precision": lambda head: head.bfloat16().double(),
    "data": lambda head: (head.leaf.data.mul_(2), head.eval()),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_changed_parameters_change_the_circuit(eager, kind: str, change: str, inference: bool):
    head, h = make(kind, **SOFT).eval(), hidden(2)
    head.leaf.grad = torch.randn_like(head.leaf)
    with torch.inference_mode(inference), torch.no_grad():
        head.circuit(h)
        fixed = head.sums._kept
        head.circuit(h)
        assert fixed is not None and head.sums._kept is fixed  # no new computation
        CHANGES[change](head)
        for found, expected in zip(head.circuit(h), eager(head, h), strict=True):
            assert found is expected is None or torch.equal(found, expected)


def test_probabilities_are_kept_only_if_changes_are_noticed():
    head, h = make("hmm", **SOFT), hidden(2)
    with torch.no_grad():
        head.circuit(h)
        assert head.sums._kept is None  # in training
        head.eval().circuit(h)
        assert head.sums._kept is not None
        assert copy.deepcopy(head).sums._kept is None and "_kept" not in str(head.state_dict())
    head.circuit(h)
    assert head.sums._kept is None  # with gradients
    with torch.no_grad():
        head.circuit(h)
        head.share_memory()  # another process could change the parameters
        head.circuit(h)
        assert head.sums._kept is None
    with torch.inference_mode():
        made = make("hmm", **SOFT).eval()
        made.circuit(h)
        assert made.sums._kept is None  # its parameters have no versions


def test_captured_graph_computes_the_probabilities_anew(monkeypatch):
    parameter = make("hmm", device="meta", **SOFT).leaf
    monkeypatch.setattr(nn.Parameter, "device", torch.device("cuda"), raising=False)
    monkeypatch.setattr(_evidence, "capturing", lambda device: device.type == "cuda")
    assert _evidence._state(parameter) is None


def test_shared_leaves_count_as_memory(monkeypatch):
    monkeypatch.setattr(layers, "free_bytes", lambda device: 50_000_000)
    CircuitHead(8, 49152, 8, 32, "hmm", emission="adapter", device="meta")
    with pytest.raises(ValueError, match=r"and 12582912 shared leaf logits, which takes 0\.1 GB"):
        CircuitHead(8, 49152, 8, 32, "hmm", emission="adapter", device="meta", **SOFT)
