"""The k best pairs of states and values of a chain, compared with all pairs by enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from circuit_graphs import GRAPHS, circuit_of, close
from torch import Tensor

from lora_ext.circuits import (
    Categorical,
    Circuit,
    External,
    Gaussian,
    Indicator,
    Input,
    RegionGraph,
)

STEPS, RANK, VALUES = 4, 3, 3


def tables(circuit: Circuit) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the log prior, and the log transitions and log emissions of every step."""
    names = {circuit.graph.label(i): i for i in range(len(circuit.graph.regions))}
    weights = [circuit.region_weights(names[f"z{t}"]).detach().log_softmax(1) for t in range(STEPS)]
    leaves = [circuit.region_leaves(names[f"x{t}"])["logits"].detach() for t in range(STEPS)]
    return weights[0][0], weights[1:], [leaf.log_softmax(1) for leaf in leaves]


def enumerated(circuit: Circuit, given: list[int], length: int) -> list[tuple[float, tuple, tuple]]:
    """Return ``(value, states, x)`` for all pairs of states and x, the best one first."""
    prior, steps, leaves = tables(circuit)
    found = []
    for states in itertools.product(range(RANK), repeat=length):
        path = prior[states[0]] + sum(steps[t][states[t], states[t + 1]] for t in range(length - 1))
        choices = [range(VALUES) if v < 0 else [v] for v in given[:length]]
        for x in itertools.product(*choices):
            value = path + sum(leaves[t][states[t], x[t]] for t in range(length))
            found.append((float(value), states, x))
    return sorted(found, key=lambda item: -item[0])


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("k", [1, 4, 25])
def test_best_pairs_equal_those_of_the_enumeration(k, homogeneous):
    circuit = circuit_of(RegionGraph.hmm(STEPS, RANK, Categorical(VALUES), homogeneous), seed=k)
    evidence = torch.tensor([[0, 1, 2, 0], [-1, 1, -1, 2], [-1, -1, -1, -1], [2, -1, -1, -1]])
    lengths = torch.tensor([4, 4, 4, 2])
    got = circuit.k_best(k, evidence, lengths=lengths)
    assert got.x.shape == got.states.shape == (4, k, 4)
    for row in range(4):
        length = int(lengths[row])
        every = enumerated(circuit, evidence[row].tolist(), length)
        table = {(states, x): value for value, states, x in every}
        pairs = [
            ((*got.states[row, i, :length].tolist(),), (*got.x[row, i, :length].tolist(),))
            for i in range(k)
        ]
        # Pairs with equal values may have any order, but none is repeated.
        assert len({*pairs}) == k
        expected = torch.tensor([value for value, *_ in every[:k]], dtype=torch.float64)
        close(got.value[row], expected)
        close(torch.tensor([table[pair] for pair in pairs], dtype=torch.float64), expected)
        assert (got.x[row, :, length:] == -1).all() and (got.states[row, :, length:] == -1).all()


def test_best_pair_equals_the_map():
    circuit = circuit_of(GRAPHS["hmm"](), seed=5)
    evidence = torch.tensor([[-1, 1, -1, -1], [0, -1, 2, -1]])
    best, one = circuit.map(evidence), circuit.k_best(1, evidence)
    assert torch.equal(one.x[:, 0], best.x)
    close(one.value[:, 0], best.value)
    assert torch.equal(circuit.k_best(2).x[:, 0], circuit.map().x)


def test_entries_beyond_the_number_of_pairs_are_minus_infinity():
    circuit = circuit_of(RegionGraph.hmm(2, 2, Categorical(2)), seed=6)
    got = circuit.k_best(6, torch.tensor([[0, 1]]))  # Only four paths exist.
    assert got.value[0, :4].isfinite().all() and (got.value[0, 4:] == -torch.inf).all()
    assert (got.x[0, 4:] == -1).all() and (got.states[0, 4:] == -1).all()
    with torch.no_grad():
        circuit.weights.fill_(-torch.inf)
    assert (circuit.k_best(2, torch.tensor([[0, 1]])).value == -torch.inf).all()


def test_returned_values_are_int64_for_any_integer_dtype_of_the_evidence():
    """Check int8 evidence whose completion, 199, does not fit, and uint8, which cannot hold -1."""
    circuit = circuit_of(RegionGraph.hmm(2, 2, Categorical(200)))
    with torch.no_grad():
        circuit.region_leaves(0)["logits"][:, 199] = 50  # region 0 is variable 1
    for dtype in (torch.int8, torch.int32):
        evidence = torch.tensor([[0, -1]], dtype=dtype)
        for x in (
            circuit.sample(3, evidence)[0],
            circuit.map(evidence).x,
            circuit.k_best(1, evidence).x[0],
        ):
            assert x.dtype == torch.int64 and (x == torch.tensor([0, 199])).all()
    got = circuit.k_best(6, torch.tensor([[0, 1]], dtype=torch.uint8))  # Only four paths exist.
    assert (got.x[0, :4] == torch.tensor([0, 1])).all() and (got.x[0, 4:] == -1).all()


def test_chains_of_other_leaf_families_are_supported():
    circuit = circuit_of(RegionGraph.hmm(3, 2, Gaussian()), seed=7)
    x = torch.tensor([[0.5, -0.5, 1.0]], dtype=torch.float64)
    got = circuit.k_best(8, x)
    close(got.value.logsumexp(1), circuit.log_prob(x).detach())  # k = 8 covers all paths of states.
    close(got.x, x[:, None].expand(1, 8, 3))
    one = circuit.k_best(1)
    close(one.value[:, 0], circuit.map().value)
    with pytest.raises(ValueError, match="k_best: variable 1: expected evidence for a con"):
        circuit.k_best(2, torch.tensor([[0.5, torch.nan, 1.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match="k_best: variable 1: expected a leaf with parameters"):
        circuit_of(RegionGraph.hmm(2, 2, External())).k_best(1)


def test_markov_chains_of_indicators_have_a_value_per_state():
    inputs = {f"x{t}": Input([t], Indicator((0, 1)), 2) for t in range(3)}
    products = [("z2", ["x2"]), ("z1", ["x1", "z2"]), ("z0", ["x0", "z1"])]
    circuit = circuit_of(RegionGraph.from_edges(inputs, products, {"z1": 2, "z2": 2}), seed=8)
    got = circuit.k_best(8)
    assert torch.equal(got.x, got.states)
    close(got.value[0], circuit.log_prob(got.x[0]).detach())  # deterministic: one path per value
    close(got.value.logsumexp(1), torch.zeros(1, dtype=torch.float64))


def test_graph_that_is_not_a_chain_raises():
    message = "k_best: graph: expected a chain, .* found unit"
    for name in ("btree", "hclt", "rat_spn", "cp"):
        with pytest.raises(ValueError, match=message):
            circuit_of(GRAPHS[name]()).k_best(2)
    circuit = circuit_of(GRAPHS["hmm"]())
    for k in (0, 1.5, True):
        with pytest.raises(ValueError, match="k_best: k: expected a whole number, at least 1"):
            circuit.k_best(k)
    x = torch.zeros(2, 4, dtype=torch.long)
    wrong = (torch.tensor([1]), torch.tensor([0, 1]), torch.tensor([1, 5]), torch.ones(2).bool())
    for lengths in (*wrong, [1, 2]):
        with pytest.raises(ValueError, match="k_best: lengths: expected"):
            circuit.k_best(2, x, lengths=lengths)  # pyright: ignore[reportArgumentType]
