"""Circuits, compared with enumeration, a recursive evaluator, and the per-row formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from circuit_graphs import GRAPHS, assignments, circuit_of, close, evaluate, mixed, random_graph

from lora_ext import reference
from lora_ext.circuits import (
    Bernoulli,
    Categorical,
    Circuit,
    External,
    Gaussian,
    Indicator,
    Input,
    RegionGraph,
)
from lora_ext.circuits._sampling import best_values
from lora_ext.reference._circuit import draw, left_size

BIT = Bernoulli()


def table(values) -> torch.Tensor:
    return torch.tensor([*values], dtype=torch.float64)


# --- evaluation -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", GRAPHS)
def test_probabilities_of_all_assignments_sum_to_one(name):
    circuit = circuit_of(GRAPHS[name]())
    log_prob = circuit.log_prob(assignments(circuit))
    assert log_prob.logsumexp(0).abs() < 1e-12
    assert circuit.log_partition().abs() < 1e-12
    assert circuit.check().normalisation_error < 1e-12


@pytest.mark.parametrize("name", GRAPHS)
def test_marginals_and_conditionals_equal_the_table(name):
    circuit = circuit_of(GRAPHS[name](), seed=1)
    x = assignments(circuit)
    p = circuit.log_prob(x).exp().detach()
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:6]
    before = torch.ones(len(rows), dtype=torch.float64)
    conditionals = circuit.conditionals(x[rows])
    for k in range(circuit.num_variables):
        same = (x[None, :, : k + 1] == x[rows, None, : k + 1]).all(-1)
        prefix = (same * p).sum(1)
        close(conditionals[:, k], (prefix / before).log())
        before = prefix
    keep = list(range(0, circuit.num_variables, 2))
    same = (x[None, :, keep] == x[rows][:, None, keep]).all(-1)
    close(circuit.marginal(x[rows], keep), (same * p).sum(1).log())


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_graphs_agree_with_the_recursive_evaluator(first):
    for seed in range(first, first + 20):
        circuit = circuit_of(random_graph(seed), seed)
        g = torch.Generator().manual_seed(seed)
        x = assignments(circuit)
        x = x[torch.randint(len(x), (5,), generator=g)]
        x[torch.rand(x.shape, generator=g) < 0.3] = -1
        expected = table(evaluate(circuit, row.tolist()) for row in x).log()
        close(circuit.log_prob(x).detach(), expected)
        assert circuit.log_partition().abs() < 1e-12, seed


@pytest.mark.parametrize("name", ["hmm tied", "btree", "poon_domingos"])
def test_gradients_equal_finite_differences(name):
    circuit = circuit_of(GRAPHS[name](), seed=2)
    x = assignments(circuit)[::17][:4]
    x[1, 0] = -1
    names, parameters = zip(*circuit.named_parameters(), strict=True)

    def f(*values):
        return torch.func.functional_call(circuit, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, [p.detach().requires_grad_() for p in parameters])


@pytest.mark.parametrize("seed", range(40))
def test_gradients_of_random_graphs_have_no_nan_and_sum_to_zero(seed):
    """Check that the gradients of a sum's logits sum to zero: a constant shift changes nothing."""
    circuit = circuit_of(random_graph(seed), seed)
    log_prob = circuit.log_prob(assignments(circuit)[:20])
    log_prob[log_prob > -torch.inf].sum().backward()
    for i, region in enumerate(circuit.graph.regions):
        if region.partitions:
            first = circuit.layered.weight_off[i]
            shape = circuit.region_weights(i).shape
            rows = circuit.weights.grad[first : first + shape.numel()].view(shape)
            assert rows.sum(1).abs().max() < 1e-10


def test_result_of_a_row_does_not_depend_on_the_batch():
    circuit = circuit_of(GRAPHS["rat_spn"]()).float()
    x = assignments(circuit)
    together = circuit.log_prob(x)
    for i in (0, 5, 63):
        close(circuit.log_prob(x[i : i + 1]), together[i : i + 1], 1e-6)
    assert circuit.log_prob(x[:0]).shape == (0,)


@pytest.mark.parametrize("kind", ["cp", "hmm", "btree"])
@pytest.mark.parametrize("n_token", [1, 2, 5, 7])
def test_circuits_agree_with_circuit_scan(kind, n_token):
    rank, values = 3, 4
    graph = getattr(RegionGraph, kind)(n_token, rank, Categorical(values))
    circuit = circuit_of(graph, seed=n_token)
    names = {circuit.graph.label(i): i for i in range(len(graph.regions))}
    if kind == "cp" or "leaves" in names:
        leaf = circuit.region_leaves(0)["logits"].view(n_token, rank, values)
    else:
        leaf = torch.stack(
            [circuit.region_leaves(names[f"x{k}"])["logits"] for k in range(n_token)]
        )
    trans = None
    if kind == "hmm" and n_token > 1:
        trans = torch.stack([circuit.region_weights(names[f"z{k}"]) for k in range(1, n_token)])
    if kind == "btree" and n_token > 2:
        inner: list[torch.Tensor] = []

        def visit(lo: int, hi: int) -> None:
            if hi - lo == 1:
                return
            if hi - lo < n_token:
                inner.append(circuit.region_weights(names[f"{lo}:{hi}"]))
            middle = lo + left_size(hi - lo)
            visit(lo, middle)
            visit(middle, hi)

        visit(0, n_token)
        trans = torch.stack(inner)
    prior = circuit.region_weights(graph.roots[0])
    x = torch.randint(-1, values, (6, n_token), generator=torch.Generator().manual_seed(0))
    parts = (leaf[None], prior, None if trans is None else trans[None])
    expanded = (None if t is None else t.expand(6, *t.shape[1:]) for t in parts)
    scan = reference.circuit_scan(kind, *expanded, x)
    close(circuit.log_prob(x), scan.prefix[:, -1])
    full = x.clamp(min=0)
    expanded = (None if t is None else t.expand(6, *t.shape[1:]) for t in parts)
    scan = reference.circuit_scan(kind, *expanded, full)
    close(circuit.conditionals(full), scan.conditional.detach())


def test_several_roots_give_one_column_each():
    graph = RegionGraph.rat_spn(5, 2, 2, 3, 2, BIT, num_roots=3)
    circuit = circuit_of(graph)
    log_prob = circuit.log_prob(assignments(circuit))
    assert log_prob.shape == (32, 3)
    assert log_prob.logsumexp(0).abs().max() < 1e-12
    log_prob[:, 2].sum().backward()
    inputs = {"a": Input([0], BIT), "b": Input([1], BIT)}
    two = RegionGraph.from_edges(inputs, [("s", ["a", "b"])] * 2 + [("t", ["b"])], multi_root=True)
    assert circuit_of(two).log_prob(torch.zeros(3, 2, dtype=torch.long)).shape == (3, 2)


# --- impossible data ------------------------------------------------------------------------------
def test_impossible_data_is_minus_infinity_with_gradient_zero():
    inputs = {f"{v}{n}": Input([v], Indicator((n,))) for v in range(2) for n in range(2)}
    products = [("s", ["00", "10"]), ("s", ["01", "11"])]
    circuit = circuit_of(RegionGraph.from_edges(inputs, products))
    x = torch.tensor([[0, 0], [0, 1], [1, -1], [1, 1], [7, 7]])
    log_prob = circuit.log_prob(x)
    assert (log_prob == -torch.inf).tolist() == [False, True, False, False, True]
    log_prob.sum().backward()
    assert circuit.weights.grad.isfinite().all()
    impossible = circuit.flows(x[[1, 4]])
    assert not impossible.units.any() and not impossible.weights.any()
    assert circuit.conditionals(x[1:2]).tolist()[0][1] == -math.inf
    assert circuit.conditionals(x[4:5]).tolist() == [[-math.inf, -math.inf]]
    with pytest.raises(ValueError, match="evidence: row 1: expected a possible row"):
        circuit.sample(evidence=x[:2])
    assert circuit.map(torch.tensor([[-1, 1]])).x.tolist() == [[1, 1]]


def test_weights_of_minus_infinity_and_huge_logits_keep_probabilities():
    circuit = circuit_of(GRAPHS["hmm"](), seed=3)
    with torch.no_grad():
        circuit.weights[:2] = torch.tensor([-torch.inf, 1e4], dtype=torch.float64)
        circuit.weights[4] = -1e4
        circuit.leaves[0]["logits"][0, :2] = -torch.inf
        circuit.leaves[0]["logits"][5] *= 1e4
    x = assignments(circuit)
    log_prob = circuit.log_prob(x)
    expected = table(evaluate(circuit, row.tolist()) for row in x[::7])
    close(log_prob[::7].detach().exp(), expected)
    log_prob[log_prob > -torch.inf].sum().backward()
    for p in circuit.parameters():
        assert p.grad.isfinite().all()
    assert circuit.weights.grad[0] == 0


def test_log_partition_of_a_long_chain_stays_accurate():
    circuit = circuit_of(RegionGraph.hmm(500, 4, Categorical(3), homogeneous=True)).float()
    assert circuit.log_partition().abs() < 1e-3
    x = torch.zeros(1, 500, dtype=torch.long)
    exact = circuit_of(RegionGraph.hmm(500, 4, Categorical(3), homogeneous=True)).log_prob(x)
    # Step t has two roundings of a value of about |exact| t / 500, each with relative error 2^-24.
    assert (circuit.log_prob(x) - exact).abs() < 500 * 2.0**-24 * exact.abs()


# --- leaves ---------------------------------------------------------------------------------------
def test_families_equal_torch_distributions():
    circuit = circuit_of(mixed())
    x = torch.tensor([[0.3, 2, 3], [-1.2, 0, torch.nan], [torch.nan, 3, 1]]).double()
    g, k, c = (circuit.region_leaves(i) for i in range(3))
    d = torch.distributions
    d.Distribution.set_default_validate_args(False)  # Otherwise, torch would reject the NaN in x.
    each = [
        d.Normal(g["mean"], g["log_std"].exp()).log_prob(x[:, :1]),
        d.Binomial(3, logits=k["logit"]).log_prob(x[:, 1:2]),
        d.Categorical(logits=c["logits"]).log_prob(x[:, 2:].nan_to_num(0)),
    ]
    each = [torch.where(x[:, i : i + 1].isnan(), 0, e) for i, e in enumerate(each)]
    expected = (circuit.region_weights(3).log_softmax(1) + sum(each)).logsumexp(1)
    close(circuit.log_prob(x), expected)


def test_external_leaf_values_are_used_and_receive_gradients():
    inputs = {"e": Input([0], External(), 3), "b": Input([1], BIT, 3)}
    circuit = circuit_of(RegionGraph.from_edges(inputs, [("s", ["e", "b"])]))
    x = torch.tensor([[-1, 1], [0, 0]])
    given = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"external: expected shape \(2, 3\), found None"):
        circuit.log_prob(x)
    bit = circuit.region_leaves(1)["logit"]
    sign = torch.tensor([[1.0], [-1.0]])
    terms = circuit.region_weights(2).log_softmax(1) + given
    expected = (terms + torch.nn.functional.logsigmoid(sign * bit)).logsumexp(1)
    got = circuit.log_prob(x, given)
    close(got, expected)
    (a,), (b,) = (torch.autograd.grad(t.sum(), given) for t in (got, expected))
    close(a, b)
    with pytest.raises(ValueError, match="variable 0: expected a leaf with parameters"):
        circuit.sample()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3), r"expected shape \(B, 4\), found \(2, 3\)"),
        (torch.tensor([[0, 1, 3, 0]]), r"variable 2: expected values 0 .. 2, found 3 in row 0"),
        (torch.tensor([[0, 1, 0, -2]]), "variable 3: expected values 0 .. 2, found -2"),
        (torch.tensor([[0.5, 1, 0, 0]]), "variable 0: expected values 0 .. 2, found 0.5"),
    ],
)
def test_data_out_of_range_raises(x, message):
    circuit = circuit_of(GRAPHS["hmm"]())
    for query in (circuit.log_prob, circuit.conditionals, circuit.map, circuit.em_step):
        with pytest.raises(ValueError, match=message):
            query(x)


def test_infinite_numbers_raise():
    circuit = Circuit(RegionGraph.cp(2, 2, Gaussian()))
    for query in (circuit.log_prob, circuit.conditionals, circuit.map, circuit.em_step):
        with pytest.raises(ValueError, match=r"variable 1: expected finite .*, found -inf"):
            query(torch.tensor([[0.5, -torch.inf]]))


def test_data_that_are_not_tensors_raise_with_the_remedy():
    circuit, x = circuit_of(GRAPHS["hmm"]()), np.zeros((1, 4), dtype=np.int64)
    for query in (
        circuit.log_prob,
        circuit.flows,
        circuit.em_step,
        circuit.conditionals,
        circuit.map,
        lambda x: circuit.marginal(x, [0]),
        lambda x: circuit.sample(1, x),
    ):
        with pytest.raises(ValueError, match=r"found numpy.ndarray; convert it"):
            query(x)
    with pytest.raises(ValueError, match=r"log_prob: x: expected a tensor, found builtins.list"):
        circuit.log_prob([[0, 0, 0, 0]])


def test_data_may_have_any_precision():
    """Check float64 data, numpy's default, which are converted to the dtype of the parameters."""
    circuit = circuit_of(mixed()).float()
    x = torch.tensor([[0.3, 2, 3], [-1.25, 0, torch.nan]])
    for dtype in (torch.float64, torch.float16):
        close(circuit.log_prob(x.to(dtype)), circuit.log_prob(x.to(dtype).float()))
    for query in (circuit.flows, circuit.em_step, circuit.conditionals, circuit.map):
        query(x.double())
    assert circuit.sample(2, x.double()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"variable 0: expected finite .* found inf in row 0"):
        circuit.log_prob(torch.tensor([[1e300, 2, 3]], dtype=torch.float64))


def test_numbers_far_from_the_mean_have_gradient_zero_without_nan():
    """Check numbers whose density underflows to 0, and errors if the square overflows."""
    circuit = circuit_of(mixed()).float()
    with torch.no_grad():
        circuit.leaves[0]["log_std"].fill_(-5)
    log_prob = circuit.log_prob(torch.tensor([[1.5e19, 2, 3], [-1.5e19, 0, 1]]))
    log_prob.sum().backward()
    assert (log_prob == -torch.inf).all()
    for p in circuit.parameters():
        assert p.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"variable 0: expected finite numbers, whose squares"):
        circuit.log_prob(torch.tensor([[1e30, 2, 3]]))


def test_empty_batch_has_empty_conditionals():
    assert circuit_of(GRAPHS["hmm"]()).conditionals(torch.zeros(0, 4)).shape == (0, 4)


# --- sampling and MAP -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["cp", "hmm", "btree", "rat_spn", "poon_domingos"])
def test_samples_follow_the_distribution(name):
    circuit = circuit_of(GRAPHS[name](), seed=4)
    x = assignments(circuit)
    p = circuit.log_prob(x).exp().detach()
    n = 20000
    samples = circuit.sample(n, generator=torch.Generator().manual_seed(0))[0]
    weights = torch.tensor([int(x[:, v].max()) + 1 for v in range(x.shape[1])])
    place = torch.cat([weights[1:].flip(0).cumprod(0).flip(0), torch.tensor([1])])
    counts = torch.bincount((samples * place).sum(1), minlength=len(x)).double()
    enough = p * n >= 5
    statistic = ((counts - p * n).square() / (p * n))[enough].sum()
    free = int(enough.sum())
    assert statistic < free + 4 * math.sqrt(2 * free)
    assert counts[~enough].sum() <= (p[~enough] * n).sum() * 2 + 20


def test_samples_given_evidence_follow_the_posterior():
    circuit = circuit_of(GRAPHS["hmm"](), seed=5)
    evidence = torch.tensor([[-1, 2, -1, -1], [1, -1, -1, 0]])
    samples = circuit.sample(5000, evidence, generator=torch.Generator().manual_seed(1))
    assert (samples[0, :, 1] == 2).all()
    assert (samples[1][:, [0, 3]] == torch.tensor([1, 0])).all()
    for b, v in ((0, 2), (1, 1)):
        rows = evidence[b : b + 1].repeat(3, 1)
        rows[:, v] = torch.arange(3)
        p = circuit.log_prob(rows).softmax(0)
        got = torch.bincount(samples[b, :, v], minlength=3) / 5000
        assert (got - p).abs().max() < 0.03


def test_uniforms_determine_a_sample_by_inverse_cumulative_sums():
    """Compare with a chain sampled by hand, with one uniform per sum region, then one per
    variable."""
    n, rank = 4, 3
    circuit = circuit_of(RegionGraph.hmm(n, rank, Categorical(5)), seed=6)
    u = torch.rand(1, 50, n + n, generator=torch.Generator().manual_seed(2))
    got = circuit.sample(50, uniforms=u)[0]
    assert torch.equal(got, circuit.sample(50, uniforms=u)[0])
    names = {circuit.graph.label(i): i for i in range(len(circuit.graph.regions))}
    inner = [i for i, r in enumerate(circuit.graph.regions) if r.partitions]
    state = torch.zeros(50, dtype=torch.long)
    for k in range(n):
        region = names[f"z{k}"]
        rows = circuit.region_weights(region).softmax(1).detach()[state]
        state = draw(rows, u[0, :, inner.index(region)])
        leaf = circuit.region_leaves(names[f"x{k}"])["logits"].softmax(1).detach()
        assert torch.equal(got[:, k], draw(leaf[state], u[0, :, len(inner) + k]))


def test_samples_of_continuous_leaves_follow_the_distribution():
    circuit = circuit_of(mixed(), seed=7)
    x = circuit.sample(20000, generator=torch.Generator().manual_seed(0))[0]
    assert x.dtype == torch.float64
    w = circuit.region_weights(3).softmax(1)[0]
    mean = (w * circuit.region_leaves(0)["mean"]).sum()
    assert (x[:, 0].mean() - mean).abs() < 0.05
    given = torch.tensor([[0.25, torch.nan, 2]])
    y = circuit.sample(3, given)[0]
    assert (y[:, 0] == 0.25).all() and (y[:, 2] == 2).all()
    with pytest.raises(ValueError, match=r"uniforms: expected shape \(1, 3, 4\)"):
        circuit.sample(3, given, uniforms=torch.rand(1, 3, 5))


@pytest.mark.parametrize("seed", range(30))
def test_map_equals_the_best_tree(seed):
    """Compare with the recursive evaluator's maximum over all assignments and latents."""
    circuit = circuit_of(random_graph(seed), seed)
    x = assignments(circuit)
    nothing_missing = torch.zeros_like(x, dtype=torch.bool)
    root = circuit._execution.roots[0]
    result = circuit.map()
    close(result.value, best_values(circuit, x, nothing_missing)[:, root].max()[None].detach())
    close(best_values(circuit, result.x, nothing_missing[:1])[:, root], result.value)
    if result.exact:
        close(circuit.log_prob(result.x), circuit.log_prob(x).max()[None])


def test_map_of_a_deterministic_circuit_equals_the_mode():
    inputs = {f"i{n}": Input([0], Indicator((n,))) for n in range(3)}
    inputs |= {f"c{n}": Input([1], Categorical(4)) for n in range(3)}
    products = [("s", [f"i{n}", f"c{n}"]) for n in range(3)]
    for seed in range(10):
        circuit = circuit_of(RegionGraph.from_edges(inputs, products), seed)
        x = assignments(circuit)
        result = circuit.map()
        assert result.exact
        assert torch.equal(result.x[0], x[circuit.log_prob(x).argmax()])
        evidence = torch.tensor([[-1, 2]])
        given = x[x[:, 1] == 2]
        assert torch.equal(circuit.map(evidence).x[0], given[circuit.log_prob(given).argmax()])


def test_unnormalised_circuits_have_a_log_partition():
    circuit = circuit_of(GRAPHS["btree"](), seed=16, norm="none")
    x = assignments(circuit)
    close(circuit.log_partition(), circuit.log_prob(x).logsumexp(0).detach())
    assert circuit.check().normalisation_error > 0.1
    total = (circuit.log_prob(x) - circuit.log_partition()).exp()
    samples = circuit.sample(20000, generator=torch.Generator().manual_seed(4))[0]
    place = torch.tensor([16, 8, 4, 2, 1])
    counts = torch.bincount((samples * place).sum(1), minlength=32) / 20000
    assert (counts - total).abs().max() < 0.02
    with pytest.raises(ValueError, match="em_step: norm: expected a circuit with norm"):
        circuit.em_step(x)


def test_uint8_data_is_valid():
    circuit = circuit_of(GRAPHS["hmm"]())
    x = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
    assert torch.equal(circuit.log_prob(x.byte()), circuit.log_prob(x))
    assert torch.equal(circuit.marginal(x.byte(), [0, 2]), circuit.marginal(x, [0, 2]))
    assert torch.equal(circuit.conditionals(x.byte()), circuit.conditionals(x))


def test_invalid_variables_and_pseudocounts_raise():
    circuit, x = circuit_of(GRAPHS["hmm"]()), torch.zeros(1, 4, dtype=torch.int64)
    for keep in ([-1], [4], [1.5]):
        with pytest.raises(ValueError, match="keep"):
            circuit.marginal(x, keep)
    with pytest.raises(ValueError, match="pseudocount"):
        circuit.em_step(x, pseudocount=math.nan)
    with pytest.raises(ValueError, match="at least one row"):
        circuit.em_step(x[:0])


def test_repr_contains_the_numbers_of_parts():
    graph = RegionGraph.hmm(4, 3, Categorical(5))
    shown = str(graph)
    assert shown.startswith("RegionGraph(4 variables, ") and len(shown) < 250
    sums = sum(bool(r.partitions) for r in graph.regions)
    inner = sum(len(r.partitions) for r in graph.regions)
    for part in (f"{len(graph.regions) - sums} inputs", f"{sums} regions of sums",
                 f"{inner} partitions", f"{1 + max(graph.depths())} layers", "1 root unit,",
                 "Categorical(num_categories=5)"):  # fmt: skip
        assert part in shown
    circuit = Circuit(graph, precision="high").double()
    shown = str(circuit)
    leaves = sum(p.numel() for p in circuit.leaves.parameters())
    for part in ("4 variables", f"{len(circuit.weights) + leaves} parameters", "float64 on cpu",
                 f"({len(circuit.weights)} of sums, {leaves} of leaves)", "norm 'logits'",
                 "precision 'high'", "'sum'", "'max'"):  # fmt: skip
        assert part in shown
    many = RegionGraph.join([RegionGraph.cp(2, 2, Categorical(k)) for k in range(2, 8)])
    assert "6 root units" in str(many) and "and 3 more" in str(many)
