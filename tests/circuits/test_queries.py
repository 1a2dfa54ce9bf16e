"""Marginals of every variable, log_prob of a root, entropy and KL, compared with enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from circuit_graphs import GRAPHS, assignments, circuit_of, close, mixed, num_values
from torch import Tensor

from lora_ext.circuits import (
    Bernoulli,
    Binomial,
    Categorical,
    Circuit,
    External,
    Gaussian,
    Indicator,
    Input,
    RegionGraph,
)


def enumerated(circuit: Circuit, evidence: Tensor, root: int | None = None) -> Tensor:
    """Return ``p(x_v = value | evidence)``, ``(B, n, V)``, by summing over all assignments."""
    x = assignments(circuit)
    p = circuit.log_prob(x, root=root).exp().detach()
    out = torch.zeros(*evidence.shape, max(num_values(circuit)), dtype=torch.float64)
    for row, given in enumerate(evidence):
        fits = ((given < 0) | (x == given)).all(1)
        for v in range(circuit.num_variables):
            for value in range(out.shape[2]):
                out[row, v, value] = p[fits & (x[:, v] == value)].sum() / p[fits].sum()
    return out


def some_evidence(circuit: Circuit, seed: int = 0) -> Tensor:
    x = assignments(circuit)
    g = torch.Generator().manual_seed(seed)
    x = x[torch.randperm(len(x), generator=g)[:6]]
    x = x.masked_fill(torch.rand(x.shape, generator=g) < 0.6, -1)
    x[0] = -1
    return x


# --- marginals of every variable ------------------------------------------------------------------
@pytest.mark.parametrize("name", GRAPHS)
def test_marginals_of_every_variable_equal_the_table(name):
    circuit = circuit_of(GRAPHS[name](), seed=1)
    evidence = some_evidence(circuit)
    got = circuit.univariate_marginals(evidence)
    expected = enumerated(circuit, evidence)
    close(got.log_prob.exp(), expected)
    values = torch.arange(expected.shape[2], dtype=torch.float64)
    mean = expected @ values
    close(got.mean, mean)
    close(got.variance, expected @ values.square() - mean.square(), 1e-9)


def test_marginals_of_a_class_equal_those_of_its_root():
    circuit = circuit_of(RegionGraph.rat_spn(4, 2, 2, 2, 2, Bernoulli(), num_roots=3), seed=2)
    evidence = some_evidence(circuit, seed=1)[:3]
    root = torch.tensor([2, 0, 1])
    got = circuit.univariate_marginals(evidence, root=root)
    for row in range(3):
        expected = enumerated(circuit, evidence[row : row + 1], int(root[row]))
        close(got.log_prob[row].exp(), expected[0])
    with pytest.raises(ValueError, match=r"marginals: root: expected an index in 0 \.\. 2"):
        circuit.univariate_marginals(evidence)


def test_gaussian_has_moments_and_no_table():
    circuit = circuit_of(mixed(), seed=3)
    evidence = torch.tensor([[math.nan, 2, math.nan], [0.5, math.nan, 1]], dtype=torch.float64)
    got = circuit.univariate_marginals(evidence)
    posterior = circuit.flows(evidence).units[:, list(circuit.columns(0))]
    leaf = circuit.region_leaves(0)
    mean, variance = leaf["mean"].detach(), (2 * leaf["log_std"]).exp().detach()
    expected = posterior[0] @ mean
    close(got.mean[0, 0], expected)
    close(got.variance[0, 0], posterior[0] @ (variance + mean.square()) - expected.square())
    assert got.mean[1, 0] == 0.5 and got.variance[1, 0] == 0
    assert got.log_prob[:, 0].isnan().all()  # A density has no table of probabilities.
    assert got.log_prob[0, 1].exp().tolist() == [0, 0, 1, 0]
    close(got.log_prob[0, 2].exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_marginals_need_one_pass(monkeypatch):
    circuit = circuit_of(GRAPHS["hmm"](), seed=4)
    calls = []
    up = circuit._execution.up
    monkeypatch.setattr(circuit._execution, "up", lambda *a: calls.append(1) or up(*a))
    circuit.univariate_marginals(some_evidence(circuit))
    assert len(calls) == 1


def test_impossible_evidence_has_no_marginals():
    graph = RegionGraph.from_edges(
        {"a": Input([0], Indicator((0, 1)), 2), "b": Input([1], Categorical(2), 2)},
        [("s", ["a", "b"])],
    )
    circuit = circuit_of(graph)
    with torch.no_grad():
        circuit.weights.copy_(torch.tensor([0.0, -torch.inf]))
    got = circuit.univariate_marginals(torch.tensor([[1, -1], [-1, 1]]))
    assert (got.log_prob[0] == -torch.inf).all() and got.mean[0].isnan().all()
    assert got.log_prob[1].exp().tolist() == [[1, 0], [0, 1]]


def test_empty_batch_has_empty_marginals_even_for_indicator_leaves():
    graph = RegionGraph.from_edges(
        {"a": Input([0], Indicator((0, 1)), 2), "b": Input([1], Categorical(3), 2)},
        [("s", ["a", "b"])],
    )
    got = circuit_of(graph).univariate_marginals(torch.empty(0, 2, dtype=torch.long))
    assert got.log_prob.shape == (0, 2, 3) and got.mean.shape == got.variance.shape == (0, 2)


def test_external_leaves_have_no_marginals():
    graph = RegionGraph.cp(2, 2, External())
    with pytest.raises(ValueError, match="univariate_marginals: variable 0: expected a leaf with"):
        circuit_of(graph).univariate_marginals(torch.full((1, 2), -1))


# --- one root of several --------------------------------------------------------------------------
def test_log_prob_of_a_root_equals_its_column():
    circuit = circuit_of(RegionGraph.rat_spn(4, 2, 2, 2, 2, Bernoulli(), num_roots=3))
    x = assignments(circuit)[:6]
    every = circuit.log_prob(x)
    root = torch.tensor([0, 1, 2, 2, 1, 0])
    close(circuit.log_prob(x, root=1), every[:, 1])
    close(circuit.log_prob(x, root=root), every[torch.arange(6), root])
    close(circuit.marginal(x, [0, 2], root=1), circuit.marginal(x, [0, 2])[:, 1])
    circuit.log_prob(x, root=root).sum().backward()
    assert circuit.weights.grad is not None and circuit.weights.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"log_prob: root: expected an index in 0 \.\. 2"):
        circuit.log_prob(x, root=3)


# --- entropy and divergence -----------------------------------------------------------------------
def decision(seed: int = 0, categories: int = 3) -> Circuit:
    """Return a deterministic circuit in which x0 selects the distributions of x1 and x2."""
    inputs = {f"x0={v}": Input([0], Indicator((v,))) for v in range(3)}
    inputs |= {f"x1|{v}": Input([1], Categorical(categories)) for v in range(3)}
    inputs["x2"] = Input([2], Binomial(2))
    products = [("s", [f"x0={v}", f"x1|{v}"]) for v in range(3)]
    return circuit_of(RegionGraph.from_edges(inputs, [*products, ("root", ["s", "x2"])]), seed)


def test_entropy_of_a_deterministic_circuit_equals_the_table():
    circuit = decision()
    p = circuit.log_prob(assignments(circuit)).detach()
    close(circuit.entropy(), -(p.exp() * p).sum())
    factorised = circuit_of(RegionGraph.cp(3, 1, Bernoulli()), seed=1)
    p = factorised.log_prob(assignments(factorised)).detach()
    close(factorised.entropy(), -(p.exp() * p).sum())


def test_entropy_of_gaussians_is_differential():
    circuit = circuit_of(RegionGraph.cp(2, 1, Gaussian()))
    with torch.no_grad():
        circuit.leaves[0]["log_std"].copy_(torch.tensor([0.0, 1.0]))
    close(circuit.entropy(), torch.tensor(2.0 + math.log(2 * math.pi), dtype=torch.float64))


def test_divergence_of_deterministic_circuits_equals_the_tables():
    p, q = decision(1), decision(2)
    x = assignments(p)
    a, b = p.log_prob(x).detach(), q.log_prob(x).detach()
    close(p.kl_divergence(q), (a.exp() * (a - b)).sum())
    assert p.kl_divergence(p) == 0
    with torch.no_grad():
        q.region_weights(q.graph.roots[0] - 1)[0, 0] = -torch.inf
    assert p.kl_divergence(q) == torch.inf
    close(
        circuit_of(RegionGraph.cp(1, 1, Gaussian()), 3).kl_divergence(
            circuit_of(RegionGraph.cp(1, 1, Gaussian()), 3)
        ),
        torch.tensor(0.0, dtype=torch.float64),
    )


def test_divergence_of_gaussians_equals_the_known_formula():
    p, q = (circuit_of(RegionGraph.cp(1, 1, Gaussian())) for _ in range(2))
    with torch.no_grad():
        p.leaves[0]["mean"].fill_(1.0), p.leaves[0]["log_std"].fill_(0.0)
        q.leaves[0]["mean"].fill_(0.0), q.leaves[0]["log_std"].fill_(math.log(2))
    close(p.kl_divergence(q), torch.tensor(math.log(2) + 2 / 8 - 0.5, dtype=torch.float64))


def test_intractable_queries_raise():
    hmm, one = circuit_of(GRAPHS["hmm"]()), decision()
    message = "entropy: graph: expected a deterministic circuit, found a nondeterministic one"
    with pytest.raises(ValueError, match=message):
        hmm.entropy()
    with pytest.raises(ValueError, match="kl_divergence: graph: expected a deterministic circuit"):
        hmm.kl_divergence(hmm)
    with pytest.raises(ValueError, match="kl_divergence: other: expected a circuit of the same"):
        one.kl_divergence(decision(categories=4))
    with pytest.raises(ValueError, match="entropy: norm: expected a circuit with norm 'l"):
        circuit_of(one.graph, norm="none").entropy()
