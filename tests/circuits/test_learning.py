"""Flows equal posteriors, and expectation maximisation (EM) never decreases the likelihood."""

from __future__ import annotations

import math

import pytest
import torch
from circuit_graphs import GRAPHS, assignments, circuit_of, close, mixed

from lora_ext.circuits import (
    Bernoulli,
    Binomial,
    Categorical,
    Circuit,
    Gaussian,
    Indicator,
    Input,
    RegionGraph,
)
from lora_ext.circuits._program import FIRST_LEAF

BIT = Bernoulli()


@pytest.mark.parametrize("name", GRAPHS)
def test_flows_sum_to_one(name):
    """Check the sum over the leaf units of each variable and, if the circuit is a tree, of each
    region."""
    circuit = circuit_of(GRAPHS[name](), seed=8)
    x = assignments(circuit)[:20]
    x[1::2, 0] = -1
    flows = circuit.flows(x)
    ones = torch.ones(len(x), dtype=torch.float64)
    leaf = flows.units[:, FIRST_LEAF : FIRST_LEAF + len(circuit._var)]
    for v in range(circuit.num_variables):
        close(leaf[:, circuit._var == v].sum(1), ones)
    assert (flows.units >= 0).all() and (flows.weights >= 0).all()
    if name in ("cp", "hmm", "hmm tied", "btree", "hclt"):
        for i in range(len(circuit.graph.regions)):
            close(flows.units[:, list(circuit.columns(i))].sum(1), ones)


def test_flows_of_a_sum_equal_the_posterior_of_its_latent():
    circuit = circuit_of(GRAPHS["cp"](), seed=9)
    x = assignments(circuit)[:10]
    leaf = circuit.region_leaves(0)["logits"].view(4, 3, 3).log_softmax(2)
    joint = circuit.region_weights(1)[0].log_softmax(0).expand(10, 3)
    for v in range(4):
        joint = joint + leaf[v][:, x[:, v]].T
    posterior = joint.softmax(1).detach()
    flows = circuit.flows(x)
    close(flows.weights, posterior.sum(0))
    close(flows.units[:, list(circuit.columns(0))], posterior)


@pytest.mark.parametrize("name", [*GRAPHS, "mixed"])
def test_em_never_decreases_the_likelihood(name):
    graph = mixed() if name == "mixed" else GRAPHS[name]()
    circuit = circuit_of(graph, seed=10)
    other = circuit_of(graph, seed=11)
    x = other.sample(60, generator=torch.Generator().manual_seed(3))[0]
    x[::5, 0] = torch.nan if x.is_floating_point() else -1
    values = [circuit.em_step(x, pseudocount=0) for _ in range(50)]
    values.append(circuit.log_prob(x).mean())
    steps = torch.stack(values).diff()
    assert steps.min() > -1e-9
    assert values[-1] > values[0] + 1e-3


def test_em_uses_step_size_and_pseudocounts():
    circuit = circuit_of(GRAPHS["hmm"](), seed=12)
    with torch.no_grad():
        circuit.weights[0] = -torch.inf
    x = assignments(circuit)[::3]
    half = [circuit.em_step(x, 0.3, pseudocount=0, keep_zero=True) for _ in range(20)]
    assert torch.stack(half).diff().min() > -1e-9
    assert circuit.weights[0] == -torch.inf
    circuit.em_step(x, pseudocount=1.0, keep_zero=True)
    assert circuit.weights[0] == -torch.inf
    circuit.em_step(x, pseudocount=1.0)
    assert circuit.weights[0] > -torch.inf
    assert circuit.check().normalisation_error < 1e-12
    with pytest.raises(ValueError, match=r"step: expected a number in \(0, 1\], found 0"):
        circuit.em_step(x, step=0)


def test_rows_without_flow_keep_their_weights():
    inputs = {f"i{n}": Input([0], Indicator((n,))) for n in range(2)}
    inputs |= {"a": Input([1], BIT, 2), "b": Input([1], BIT, 2)}
    products = [("s", ["i0", "sa"]), ("s", ["i1", "sb"]), ("sa", ["a"]), ("sb", ["b"])]
    circuit = circuit_of(RegionGraph.from_edges(inputs, products), seed=13)
    names = {circuit.graph.label(i): i for i in range(len(circuit.graph.regions))}
    before = circuit.region_weights(names["sb"]).softmax(1).detach()
    leaf = circuit.region_leaves(names["b"])["logit"].detach().clone()
    circuit.em_step(torch.tensor([[0, 1], [0, 0]]))
    close(circuit.region_weights(names["sb"]).softmax(1).detach(), before)
    assert torch.equal(circuit.region_leaves(names["b"])["logit"].detach(), leaf)


def test_tied_parameters_sum_gradients_and_flows_of_all_their_uses():
    tied = circuit_of(RegionGraph.hmm(5, 3, Categorical(4), homogeneous=True), seed=14)
    free = circuit_of(RegionGraph.hmm(5, 3, Categorical(4)), seed=15)
    t, f = ({c.graph.label(i): i for i in range(len(c.graph.regions))} for c in (tied, free))
    with torch.no_grad():
        for k in range(5):
            free.region_weights(f[f"z{k}"]).copy_(tied.region_weights(t[f"z{k}"]))
            free.region_leaves(f[f"x{k}"])["logits"].copy_(tied.region_leaves(t[f"x{k}"])["logits"])
    x = assignments(tied)[::50]
    a, b = tied.log_prob(x), free.log_prob(x)
    close(a, b)
    a.sum().backward()
    b.sum().backward()
    close(tied.leaves[0]["logits"].grad, free.leaves[0]["logits"].grad.view(5, 3, 4).sum(0))

    def gathered(values: torch.Tensor, circuit: Circuit, name: str, places) -> torch.Tensor:
        first = [circuit.layered.weight_off[places[f"z{k}"]] for k in range(1, 5)]
        return sum(values[o : o + 9] for o in (first if name == "free" else first[:1]))

    for got, expected in (
        (tied.weights.grad, free.weights.grad),
        (tied.flows(x).weights, free.flows(x).weights),
    ):
        close(gathered(got, tied, "tied", t), gathered(expected, free, "free", f))


def test_em_with_pseudocounts_never_decreases_likelihood_times_prior():
    """Check EM with the prior of ``em_step``: pseudocounts of c / I for each of I terms."""
    circuit = circuit_of(GRAPHS["hmm"](), seed=20)
    x = circuit_of(GRAPHS["hmm"](), seed=21).sample(60, generator=torch.manual_seed(0))[0]
    c = 2.0

    def objective() -> torch.Tensor:
        sums = [i for i, r in enumerate(circuit.graph.regions) if r.partitions]
        tables = [circuit.region_weights(i) for i in sums] + [circuit.leaves[0]["logits"]]
        prior = sum(c / t.shape[1] * t.log_softmax(1).sum() for t in tables)
        return (circuit.log_prob(x).sum() + prior).detach()

    values = [objective()]
    for _ in range(30):
        circuit.em_step(x, pseudocount=c)
        values.append(objective())
    assert torch.stack(values).diff().min() > -1e-9
    assert values[-1] > values[0] + 1


def test_default_pseudocount_keeps_held_out_rows_possible():
    circuit = circuit_of(RegionGraph.hmm(4, 3, Categorical(5)), seed=22).float()
    x = circuit_of(RegionGraph.hmm(4, 3, Categorical(5)), seed=23).sample(
        40, generator=torch.manual_seed(0)
    )[0]
    x[x == 4] = 3  # The training data do not contain the value 4.
    for _ in range(50):
        circuit.em_step(x)
    held_out = torch.full((1, 4), 4)
    assert circuit.log_prob(held_out).isfinite().all()
    # A pseudocount of 0.1 rows, shared by five values, changes learned probabilities very little.
    assert circuit.leaves[0]["logits"].softmax(1)[:, 4].max() < 0.02


# --- families -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [1.0, 0.5])
@pytest.mark.parametrize("leaf", [Bernoulli(), Binomial(3), Binomial(7)])
def test_parameters_stay_finite_for_columns_that_are_always_zero_or_the_maximum(leaf, step, dtype):
    total = leaf.num_values() - 1
    circuit = circuit_of(RegionGraph.cp(3, 2, leaf), seed=24).to(dtype)
    x = torch.tensor([[0, total, 0], [0, total, total], [0, total, 1], [0, total, 0]])
    values = [circuit.em_step(x, step, pseudocount=0) for _ in range(5)]
    values.append(circuit.log_prob(x).mean().detach())
    assert torch.stack(values).diff().min() > -1e-6
    log_prob = circuit.log_prob(x)
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert circuit.leaves[0]["logit"].grad.isfinite().all()
    if step == 1:
        other = torch.tensor([[total, total, 0], [0, 0, 0]])
        assert (circuit.log_prob(other) == -torch.inf).all()
        assert not circuit.log_prob(torch.tensor([[-1, -1, -1]])).isnan().any()


def test_rounded_shares_of_successes_stay_probabilities():
    """Check flows of 1/3 and 2/3: after float32 rounding, the successes may exceed the total."""
    for seed in range(50):
        circuit = circuit_of(RegionGraph.cp(2, 3, Binomial(7)), seed=seed).float()
        x = torch.full((33, 2), 7)
        x[::3, 1] = 0
        for _ in range(4):
            circuit.em_step(x, pseudocount=0)
        assert not circuit.leaves[0]["logit"].isnan().any()
        assert circuit.log_prob(x).isfinite().all()


@pytest.mark.parametrize("step", [1.0, 0.5, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_far_from_zero_stays_at_its_optimum(dtype, step):
    circuit = Circuit(RegionGraph.cp(1, 1, Gaussian())).to(dtype)
    x = 10000 + torch.randn(2000, 1, generator=torch.manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        circuit.leaves[0]["mean"][:] = x.mean()
        circuit.leaves[0]["log_std"][:] = x.std(correction=0).log()
    x = x.to(dtype)
    before = circuit.em_step(x, step)
    after = circuit.log_prob(x).mean()
    # In float32, means near 10000 are rounded by up to 2^-11. The log-likelihood falls by at most
    # half the square of this rounding error.
    assert abs(after - before) < 2.0**-22
    assert circuit.leaves[0]["mean"].item() == pytest.approx(10000, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_fits_data_far_away_in_one_step(dtype):
    circuit = Circuit(RegionGraph.cp(1, 1, Gaussian())).to(dtype)
    x = -30000 + 2 * torch.randn(500, 1, generator=torch.manual_seed(2), dtype=torch.float64)
    circuit.em_step(x.to(dtype))
    mean, log_std = circuit.leaves[0]["mean"].item(), circuit.leaves[0]["log_std"].item()
    assert mean == pytest.approx(x.mean().item(), abs=2e-3)
    assert math.exp(log_std) == pytest.approx(x.std(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Categorical(0), "Categorical: num_categories: expected a whole number"),
        (lambda: Categorical(2.5), "num_categories: expected a whole number, at least 1, found 2"),
        (lambda: Binomial(-1), "Binomial: total: expected"),
        (lambda: Gaussian(math.nan), "Gaussian: min_std: expected a positive number, found nan"),
        (lambda: Gaussian(0), "Gaussian: min_std: expected"),
        (lambda: Indicator((0, -1)), "Indicator: values: expected whole numbers, at least 0"),
    ],
)
def test_families_with_invalid_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- single rows and threads ----------------------------------------------------------------------
@pytest.mark.parametrize("name", ["rat_spn", "poon_domingos delta 2"])
def test_rows_one_by_one_equal_a_batch_for_multivariate_inputs(name):
    circuit = circuit_of(GRAPHS[name](), seed=25)
    x = assignments(circuit)[[5, 9]]
    both = circuit.flows(x)
    for i in range(2):
        alone = circuit.flows(x[i : i + 1])
        close(alone.units[0], both.units[i])
    circuit.log_prob(x).sum().backward()
    together = [p.grad.clone() for p in circuit.parameters()]
    circuit.zero_grad()
    for row in x.split(1):
        circuit.log_prob(row).sum().backward()
    for p, expected in zip(circuit.parameters(), together, strict=True):
        close(p.grad, expected)
    before = circuit.log_prob(x[:1]).item()
    assert circuit.em_step(x[:1]).item() == pytest.approx(before)
    assert circuit.log_prob(x[:1]).item() > before


@pytest.mark.parametrize(
    ("graph", "rows"),
    [
        (RegionGraph.hmm(12, 16, Categorical(32), homogeneous=True), 700),
        (RegionGraph.hmm(12, 17, Gaussian(), homogeneous=True), 700),
        (RegionGraph.rat_spn(24, 2, 8, 9, 33, Bernoulli()), 300),
        (RegionGraph.poon_domingos(4, 4, 5, Binomial(3)), 300),
        (RegionGraph.cp(1, 1, Gaussian()), 70000),
        (RegionGraph.cp(3, 40000, Categorical(3)), 3),
    ],
    ids=["tied chain", "gaussian chain", "rat_spn", "poon_domingos", "long sum", "wide sum"],
)
def test_steps_flows_and_gradients_are_bitwise_equal_for_any_number_of_threads(graph, rows):
    start = circuit_of(graph, seed=26).float()
    state = {k: t.clone() for k, t in start.state_dict().items()}
    x = start.sample(rows, generator=torch.manual_seed(3))[0]
    threads, seen = torch.get_num_threads(), set()
    try:
        for number in (1, 2, 3, 2, 4, 4, 2, 2):
            torch.set_num_threads(number)
            circuit = Circuit(graph)
            circuit.load_state_dict(state)
            # Use at most 30000 rows: for more, torch splits the gradient of a scalar parameter, as
            # in "long sum", among threads.
            circuit.log_prob(x[:30000]).sum().backward()
            results = [p.grad for p in circuit.parameters()] + [*circuit.flows(x)]
            results += [circuit.em_step(x) for _ in range(2)] + [*circuit.parameters()]
            seen.add(hash(b"".join(t.detach().numpy().tobytes() for t in results)))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1
