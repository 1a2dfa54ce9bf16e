"""Queries of circuits with multivariate Gaussian leaves, compared with torch and plain formulas."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from circuit_graphs import circuit_of, close
from gaussian_graphs import GRAPHS, LEAF, circuit, given, normals, rows_with_gaps
from torch.distributions import kl_divergence

from lora_ext.circuits import Circuit, Indicator, Input, MultivariateGaussian, RegionGraph


# --- queries with evidence ------------------------------------------------------------------------
def test_samples_given_evidence_follow_the_conditional():
    made = circuit_of(RegionGraph.cp(4, 1, LEAF), 8)
    with torch.no_grad():
        made.leaves[0]["lower"].normal_()
    x = torch.tensor([[math.nan, 0.5, math.nan, -1.0]], dtype=torch.float64)
    u = torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(0))
    rest = given(normals(made, 0), 0, x[0])[0]
    z = torch.special.ndtri(u[0, :, [1, 3]].double())  # u[..., 0] is used by the sum region
    got = made.sample(5, x, u)[0]
    close(got[:, [0, 2]], rest.mean + z @ rest.scale_tril.T)
    assert (got[:, [1, 3]] == x[0, [1, 3]]).all()
    assert torch.equal(got, made.sample(5, x, u)[0])


@pytest.mark.parametrize("name", ["rat_spn", "families"])
def test_moments_of_samples_equal_the_marginals(name):
    made = circuit(name, 9)
    evidence = made.sample(2, generator=torch.Generator().manual_seed(0))[0]
    evidence[0, [0, 3, 4]], evidence[1, [1, 2]] = math.nan, math.nan
    x = made.sample(20000, evidence, generator=torch.Generator().manual_seed(1))
    found = made.univariate_marginals(evidence)
    error = 5 * (found.variance / x.shape[1]).sqrt()  # five standard errors
    assert ((x.mean(1) - found.mean).abs() <= error + 1e-12).all()
    torch.testing.assert_close(x.var(1), found.variance, rtol=0.15, atol=1e-12)


def test_marginals_equal_a_mixture_of_conditionals():
    made, x = circuit("mixture", 10), rows_with_gaps(3, 20, seed=5)
    normal, prior = normals(made, 0), made.weights.detach().log_softmax(0)
    found = made.univariate_marginals(x)
    for b, row in enumerate(x):
        h = row.isnan()
        parts = [given(normal, u, row) for u in range(2)]
        weight = (prior + prior.new_tensor([p[1] for p in parts])).softmax(0)
        assert torch.equal(found.mean[b, ~h], row[~h]) and (found.variance[b, ~h] == 0).all()
        if h.any():
            mean = torch.stack([p[0].mean for p in parts])
            square = torch.stack([p[0].variance for p in parts]) + mean.square()
            close(found.mean[b, h], weight @ mean)
            close(found.variance[b, h], weight @ square - (weight @ mean).square(), 1e-9)
    assert found.log_prob.shape == (20, 3, 0)


def test_results_for_correlations_near_one_are_accurate_in_float32():
    """Check a conditional variance of 1 - 1 / (1 + 1e-6). A result computed from a float32
    covariance would have an error of several percent."""
    made = Circuit(RegionGraph.cp(2, 1, LEAF))
    with torch.no_grad():
        made.leaves[0]["lower"].fill_(1.0)
        made.leaves[0]["log_diagonal"].copy_(torch.tensor([0.0, math.log(1e-3)]))
    found = made.univariate_marginals(torch.tensor([[math.nan, 0.5]]))
    assert found.variance[0, 0].item() == pytest.approx(1e-6 / (1 + 1e-6), rel=1e-5)


def test_map_equals_the_best_component_at_its_conditional_mean():
    made, x = circuit("mixture", 11), rows_with_gaps(3, 20, seed=6)
    normal, prior = normals(made, 0), made.weights.detach().log_softmax(0)
    found = made.map(x)
    for b, row in enumerate(x):
        h, best = row.isnan(), []
        for u in range(2):
            full = row.clone()
            if h.any():
                full[h] = given(normal, u, row)[0].mean
            best.append((prior[u] + normal.log_prob(full)[u], full))
        value, full = max(best, key=lambda pair: pair[0])
        close(found.value[b], value)
        close(found.x[b], full)


def test_one_gaussian_has_the_entropy_and_divergence_of_torch():
    p, q = (circuit_of(RegionGraph.cp(3, 1, LEAF), seed) for seed in (12, 13))
    with torch.no_grad():
        p.leaves[0]["lower"].normal_()
        q.leaves[0]["log_diagonal"].normal_()
    close(p.entropy(), normals(p, 0).entropy()[0])
    close(p.kl_divergence(q), kl_divergence(normals(p, 0), normals(q, 0))[0])
    assert p.kl_divergence(p).abs() < 1e-12


def test_entropy_and_divergence_of_a_deterministic_mixture_of_gaussians_equal_the_formula():
    inputs = {f"is {v}": Input([0], Indicator((v,))) for v in range(2)}
    inputs |= {f"then {v}": Input([1, 2], LEAF) for v in range(2)}
    graph = RegionGraph.from_edges(inputs, [("s", [f"is {v}", f"then {v}"]) for v in range(2)])
    p, q = circuit_of(graph, 1), circuit_of(graph, 2)
    with torch.no_grad():
        next(t for t in p.leaves if "lower" in t)["lower"].normal_()
    first = next(i for i, r in enumerate(graph.regions) if r.leaf == LEAF)
    a, b = ([normals(c, first + v) for v in range(2)] for c in (p, q))
    u, w = (c.weights.detach().log_softmax(0) for c in (p, q))
    entropies = torch.cat([n.entropy() for n in a])
    distances = torch.cat([kl_divergence(*pair) for pair in zip(a, b, strict=True)])
    close(p.entropy(), u.exp() @ (entropies - u))
    close(p.kl_divergence(q), u.exp() @ (distances + u - w))


# --- files, copies and errors ---------------------------------------------------------------------
@pytest.mark.parametrize("name", GRAPHS)
def test_saved_copied_and_pickled_circuits_equal_the_original(name, tmp_path):
    made = circuit(name, 14)
    made.save(tmp_path / "c.safetensors")
    x = made.sample(5, generator=torch.Generator().manual_seed(0))[0]
    x[::2, 0] = math.nan
    again = [Circuit.load(tmp_path / "c.safetensors"), copy.deepcopy(made)]
    for other in [*again, pickle.loads(pickle.dumps(made))]:
        assert other.graph == made.graph
        assert torch.equal(other.log_prob(x), made.log_prob(x))
        assert torch.equal(other.map(x).x, made.map(x).x)
    narrow = made.float()
    torch.testing.assert_close(narrow.log_prob(x), again[1].log_prob(x).float(), rtol=1e-4, atol=0)


def test_rows_with_only_missing_values_have_results():
    made = circuit("rat_spn")
    empty = torch.empty(0, 6, dtype=torch.float64)
    assert made.log_prob(empty).shape == (0,)
    assert made.sample(2, empty).shape == (0, 2, 6)
    assert made.map(empty).x.shape == made.univariate_marginals(empty).mean.shape == (0, 6)
    whole = torch.full((2, 6), -1)  # In integer data, Gaussian variables can only be missing.
    close(made.log_prob(whole), torch.zeros(2, dtype=torch.float64))
    assert made.sample(1, whole).dtype == torch.float64


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="MultivariateGaussian: min_std: expected a positive numb"):
        MultivariateGaussian(-1.0)
    with pytest.raises(ValueError, match="k_best: graph: expected a chain, in which a latent's c"):
        circuit("chain").k_best(1)
    with pytest.raises(ValueError, match="entropy: graph: expected a deterministic circuit"):
        circuit("mixture").entropy()
    far = torch.full((1, 3), 1e200, dtype=torch.float64)
    with pytest.raises(ValueError, match="log_prob: x: variable 0: expected finite numbers"):
        circuit("mixture").log_prob(far)
