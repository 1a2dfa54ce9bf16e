"""Multivariate Gaussian leaves: densities and learning, compared with scikit-learn and torch."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from circuit_graphs import circuit_of, close
from gaussian_graphs import GRAPHS, LEAF, chain, circuit, given, normals, rows_with_gaps
from torch import Tensor

from lora_ext.circuits import Circuit, Gaussian, MultivariateGaussian, RegionGraph


# --- densities ------------------------------------------------------------------------------------
def test_every_marginal_of_a_mixture_equals_torch():
    made = circuit("mixture")
    normal, weight = normals(made, 0), made.weights.detach().log_softmax(0)
    point = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
    rows = [
        torch.where(torch.tensor(hide), math.nan, point)
        for hide in itertools.product([False, True], repeat=3)
    ]
    expected = [
        torch.logsumexp(weight + weight.new_tensor([given(normal, u, x)[1] for u in range(2)]), 0)
        for x in rows
    ]
    close(made.log_prob(torch.stack(rows)).detach(), torch.stack(expected))


@pytest.mark.parametrize("name", ["rat_spn", "images", "chain"])
def test_leaves_of_several_regions_with_gaps_equal_torch(name):
    made = circuit(name)
    x = rows_with_gaps(6, 40)
    values = made._leaf_values("test", x, None).detach()
    for i, region in enumerate(made.graph.regions):
        if region.leaf is None:
            continue
        scope = [v for v in range(6) if region.variables >> v & 1]
        normal = normals(made, i)
        for u, column in enumerate(made.columns(i)):
            expected = [given(normal, u, row)[1] for row in x[:, scope]]
            close(values[:, column - 2], torch.tensor(expected, dtype=torch.float64))


def test_multivariate_gaussian_of_one_variable_equals_a_gaussian():
    one = circuit_of(RegionGraph.hmm(4, 3, Gaussian()), 1)
    many = circuit_of(RegionGraph.hmm(4, 3, MultivariateGaussian()), 1)
    with torch.no_grad():
        one.leaves[0]["log_std"].normal_()
        many.weights.copy_(one.weights)
        many.leaves[0]["mean"].copy_(one.leaves[0]["mean"][:, None])
        many.leaves[0]["log_diagonal"].copy_(one.leaves[0]["log_std"][:, None])
    assert many.leaves[0]["lower"].shape == (12, 0)
    x = rows_with_gaps(4, 12)
    for c in (one, many):
        c.log_prob(x).sum().backward()
    close(one.log_prob(x), many.log_prob(x))
    close(one.weights.grad, many.weights.grad)
    close(one.leaves[0]["mean"].grad, many.leaves[0]["mean"].grad[:, 0])
    close(one.leaves[0]["log_std"].grad, many.leaves[0]["log_diagonal"].grad[:, 0])
    g = torch.rand(12, 3, 8, generator=torch.Generator().manual_seed(1))
    close(one.sample(3, x, g), many.sample(3, x, g))
    for query in ("map", "univariate_marginals", "flows"):
        for a, b in zip(getattr(one, query)(x), getattr(many, query)(x), strict=True):
            if isinstance(a, Tensor):
                torch.testing.assert_close(a, b, equal_nan=True)
    for a, b in zip(one.k_best(1, x), many.k_best(1, x), strict=True):
        close(a, b)
    for step in (1.0, 0.4):
        close(one.em_step(x, step), many.em_step(x, step))
        close(one.leaves[0]["mean"], many.leaves[0]["mean"][:, 0])
        close(one.leaves[0]["log_std"], many.leaves[0]["log_diagonal"][:, 0])


def test_gradients_with_gaps_equal_finite_differences():
    made = circuit("images", 2)
    x = rows_with_gaps(6, 4, seed=1)
    names = [k for k, _ in made.named_parameters()]

    def log_prob(*values: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(log_prob, tuple(made.parameters()))


# --- learning -------------------------------------------------------------------------------------
def clusters(rows: int, seed: int = 0) -> Tensor:
    """Return ``(rows, 3)`` points of two elongated clusters."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, 3, generator=g, dtype=torch.float64)
    turn = torch.tensor([[1.0, 0, 0], [0.9, 0.3, 0], [-0.5, 0.4, 0.6]], dtype=torch.float64)
    x = z @ turn.T
    x[::3] = x[::3] * 0.5 + torch.tensor([2.0, -1, 0.5], dtype=torch.float64)
    return x


def test_mixture_equals_scikit_learn_before_and_after_a_step():
    mixture = pytest.importorskip("sklearn.mixture", reason="compares with scikit-learn")
    x, made = clusters(200), circuit("mixture", 3)
    normal = normals(made, 0)
    peer = mixture.GaussianMixture(
        2,
        reg_covar=0,
        max_iter=1,
        weights_init=made.weights.detach().softmax(0).numpy(),
        means_init=normal.mean.numpy(),
        precisions_init=normal.precision_matrix.numpy(),
        init_params="random_from_data",
        random_state=0,
    )
    before = made.log_prob(x).mean()
    assert made.em_step(x, pseudocount=0) == pytest.approx(before.item())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns that one step does not converge.
        peer.fit(x.numpy())
    after = normals(made, 0)
    close(made.weights.detach().softmax(0), torch.from_numpy(peer.weights_))
    close(after.mean, torch.from_numpy(peer.means_))
    close(after.covariance_matrix, torch.from_numpy(peer.covariances_))
    close(made.log_prob(x).detach(), torch.from_numpy(peer.score_samples(x.numpy())), 1e-9)


@pytest.mark.parametrize("step", [1.0, 0.3])
def test_step_with_gaps_equals_the_plain_formula(step):
    """Compare with a formula per row: a missing value counts as its conditional mean, and its
    conditional covariance is added."""
    made = circuit_of(RegionGraph.cp(3, 1, LEAF), 4)
    with torch.no_grad():
        made.leaves[0]["lower"].normal_()
    normal, x = normals(made, 0), rows_with_gaps(3, 30, seed=2)
    filled, extra, count = [], torch.zeros(3, 3, dtype=torch.float64), 0
    for row in x:
        h = row.isnan()
        if h.all():
            continue
        full, count = row.clone(), count + 1
        if h.any():
            rest = given(normal, 0, row)[0]
            full[h] = rest.mean
            extra[h.nonzero(), h.nonzero()[:, 0]] += rest.covariance_matrix
        filled.append(full)
    full = torch.stack(filled)
    mean, old = full.mean(0), normal.mean[0]
    covariance = ((full - mean).T @ (full - mean) + extra) / count
    far = mean - old
    expected = (1 - step) * normal.covariance_matrix[0] + step * covariance
    expected = expected + step * (1 - step) * far[:, None] * far
    made.em_step(x, step)
    close(normals(made, 0).mean[0], (1 - step) * old + step * mean)
    close(normals(made, 0).covariance_matrix[0], expected)


@pytest.mark.parametrize("step", [1.0, 0.4])
@pytest.mark.parametrize("name", GRAPHS)
def test_em_with_gaps_never_decreases_the_likelihood(name, step):
    made, other = circuit(name, 5), circuit(name, 6)
    x = other.sample(60, generator=torch.Generator().manual_seed(3))[0]
    gaps = torch.rand(x.shape, generator=torch.Generator().manual_seed(4)) < 0.3
    x[gaps] = math.nan
    values = [made.em_step(x, step, pseudocount=0) for _ in range(15)]
    values.append(made.log_prob(x).detach().mean())
    assert torch.stack(values).diff().min() > -1e-9
    assert values[-1] > values[0] + 0.1


def test_standard_deviation_of_every_direction_stays_above_min_std():
    made = circuit_of(RegionGraph.cp(2, 1, MultivariateGaussian(min_std=0.01)))
    line = torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None] * torch.tensor([1.0, 1.0])
    values = [made.em_step(line) for _ in range(4)]
    assert torch.stack(values).diff().min() > -1e-9
    spread = torch.linalg.eigvalsh(normals(made, 0).covariance_matrix[0])
    close(spread, torch.stack([spread.new_tensor(1e-4), 2 * line[:, 0].square().mean()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_fits_data_far_away(dtype):
    made = Circuit(RegionGraph.cp(3, 1, LEAF)).to(dtype)
    x = clusters(500) - 30000
    made.em_step(x.to(dtype))
    found = normals(made, 0)
    near = torch.cov(x.T, correction=0)
    torch.testing.assert_close(found.mean[0].double(), x.mean(0), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.covariance_matrix[0].double(), near, atol=2e-3, rtol=0)


def test_tied_regions_learn_from_all_their_uses():
    tied = circuit("chain", 7)
    free = circuit_of(chain(tie=None), 7)
    names = {c: {c.graph.label(i): i for i in range(len(c.graph.regions))} for c in (tied, free)}
    with torch.no_grad():
        free.weights.copy_(tied.weights)
        for t in range(3):
            for k, v in free.region_leaves(names[free][f"x{t}"]).items():
                v.copy_(tied.region_leaves(names[tied]["x0"])[k])
    x = rows_with_gaps(6, 20)
    for c in (tied, free):
        c.log_prob(x).sum().backward()
    for k, p in tied.leaves[0].items():
        close(p.grad, free.leaves[0][k].grad.unflatten(0, (3, 2)).sum(0))
    again = circuit("chain", 7)
    again.em_step(x)
    once = torch.cat([x[:, 2 * t : 2 * t + 2] for t in range(3)])
    flows = tied.flows(x).units
    weight = torch.cat([flows[:, list(tied.columns(names[tied][f"x{t}"]))] for t in range(3)])
    leaf = {k: v.detach().clone() for k, v in tied.leaves[0].items()}
    LEAF.update(leaf, torch.arange(2), once[:, None], weight, 1.0, 0.0)
    for k, v in leaf.items():
        close(again.leaves[0][k].detach(), v)


def test_step_and_gradients_are_bitwise_equal_for_any_number_of_threads():
    graph = RegionGraph.rat_spn(24, 2, 4, 9, 9, MultivariateGaussian())
    state = Circuit(graph).state_dict()
    x = rows_with_gaps(24, 300, share=0.02).float()
    threads, seen = torch.get_num_threads(), set()
    try:
        for number in (1, 2, 3, 4, 2):
            torch.set_num_threads(number)
            made = Circuit(graph)
            made.load_state_dict(state)
            made.log_prob(x).sum().backward()
            results = [p.grad for p in made.parameters()] + [*made.flows(x)]
            results += [made.em_step(x) for _ in range(2)] + [*made.parameters()]
            seen.add(hash(b"".join(t.detach().numpy().tobytes() for t in results)))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1
