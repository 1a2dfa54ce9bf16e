"""Circuits of several root units: every query except ``log_prob`` needs the argument ``root``."""

from __future__ import annotations

import pytest
import torch
from circuit_graphs import assignments, circuit_of, close

from lora_ext.circuits import Bernoulli, Categorical, Circuit, Input, PCStructureError, RegionGraph


def classes(seed: int = 0, num_roots: int = 3) -> Circuit:
    """Return a RAT-SPN with one root unit per class."""
    return circuit_of(RegionGraph.rat_spn(5, 2, 2, 3, 2, Bernoulli(), num_roots=num_roots), seed)


def alone(circuit: Circuit, root: int) -> Circuit:
    """Return a circuit whose only root unit has the distribution of root unit ``root``."""
    graph = RegionGraph.rat_spn(5, 2, 2, 3, 2, Bernoulli())
    one = circuit_of(graph)
    width = circuit.graph.num_products(circuit.graph.regions[-1])
    first = circuit.layered.weight_off[len(circuit.graph.regions) - 1]
    assert one.layered.weight_off[len(graph.regions) - 1] == first
    with torch.no_grad():
        one.weights[:first] = circuit.weights[:first]
        one.weights[first:] = circuit.region_weights(len(circuit.graph.regions) - 1)[root]
        assert len(one.weights) == first + width
        one.leaves[0]["logit"].copy_(circuit.leaves[0]["logit"])
    return one


def test_queries_without_a_root_raise():
    circuit, x = classes(), torch.zeros(2, 5, dtype=torch.long)
    for query in (
        lambda: circuit.em_step(x),
        lambda: circuit.flows(x),
        lambda: circuit.conditionals(x),
        lambda: circuit.map(x),
        lambda: circuit.sample(2, x),
        lambda: circuit.sample(2),
    ):
        message = "root: expected an index in 0 .. 2, or one index per row, for 3 root units"
        with pytest.raises(ValueError, match=message):
            query()
    for root in (3, -1, 1.5, torch.tensor([0, 3]), torch.tensor([0.0, 1.0]), torch.tensor([0])):
        with pytest.raises(ValueError, match="flows: root: expected"):
            circuit.flows(x, root=root)


@pytest.mark.parametrize("root", [0, 2])
def test_root_equals_a_circuit_with_one_root(root):
    circuit = classes(seed=1)
    one = alone(circuit, root)
    x = assignments(circuit)[::3]
    close(circuit.log_prob(x)[:, root], one.log_prob(x))
    close(circuit.conditionals(x, root), one.conditionals(x))
    a, b = circuit.flows(x, root=root), one.flows(x)
    close(a.log_prob, b.log_prob)
    leaves = len(circuit._var)
    close(a.units[:, 2 : 2 + leaves], b.units[:, 2 : 2 + leaves])
    evidence = torch.tensor([[-1, 1, -1, 0, -1], [-1, -1, -1, -1, -1]])
    close(circuit.map(evidence, root).value, one.map(evidence).value)
    assert torch.equal(circuit.map(evidence, root).x, one.map(evidence).x)
    u = torch.rand(2, 50, sum(bool(r.partitions) for r in one.graph.regions) + 5)
    assert torch.equal(circuit.sample(50, evidence, u, root=root), one.sample(50, evidence, u))


def test_every_row_may_have_a_different_root():
    circuit = classes(seed=2)
    x = assignments(circuit)[::4]
    root = torch.arange(len(x)) % 3
    close(circuit.flows(x, root=root).log_prob, circuit.log_prob(x)[torch.arange(len(x)), root])
    mixed = circuit.conditionals(x, root)
    best = circuit.map(x.masked_fill(x == 1, -1), root)
    for r in range(3):
        close(mixed[root == r], circuit.conditionals(x, r)[root == r])
        alone = circuit.map(x.masked_fill(x == 1, -1), r)
        assert torch.equal(best.x[root == r], alone.x[root == r])
    u = torch.rand(3, 9, sum(bool(r.partitions) for r in circuit.graph.regions) + 5)
    together = circuit.sample(9, uniforms=u, root=torch.arange(3))
    for r in range(3):
        assert torch.equal(together[r], circuit.sample(9, uniforms=u[r : r + 1], root=r)[0])


def test_em_trains_each_root_on_its_rows():
    """Check data of two classes: the likelihood of labelled rows never decreases, and EM learns the
    labels."""
    circuit = classes(seed=3, num_roots=2)
    g = torch.Generator().manual_seed(0)
    label = torch.arange(200) % 2
    chance = torch.where(label[:, None] == 1, 0.8, 0.2).expand(200, 5)
    x = torch.bernoulli(chance, generator=g).long()
    values = [circuit.em_step(x, pseudocount=0, root=label) for _ in range(20)]
    values.append(circuit.log_prob(x).gather(1, label[:, None]).mean().detach())
    assert torch.stack(values).diff().min() > -1e-9
    assert (circuit.log_prob(x).argmax(1) == label).double().mean() > 0.9


def test_variables_outside_the_scope_of_a_root_stay_missing():
    inputs = {"a": Input([0], Bernoulli()), "b": Input([1], Categorical(3))}
    products = [("s", ["a", "b"]), ("t", ["b"])]
    circuit = circuit_of(RegionGraph.from_edges(inputs, products, multi_root=True))
    names = [circuit.graph.label(r) for r in circuit.graph.roots]
    samples = circuit.sample(20, root=names.index("t"))
    assert (samples[0, :, 0] == -1).all() and (samples[0, :, 1] >= 0).all()
    assert (circuit.sample(20, root=names.index("s")) >= 0).all()


def test_joined_graphs_are_roots_of_one_circuit():
    """Check two joined graphs, whose region names and tied parameters stay separate. Each root must
    equal the circuit of its graph."""
    graphs = [
        RegionGraph.hmm(3, 2, Categorical(3), homogeneous=True),
        RegionGraph.cp(3, 4, Categorical(3)),
    ]
    joined = circuit_of(RegionGraph.join(graphs), seed=5)
    assert [joined.graph.label(r) for r in joined.graph.roots] == ["0/z0", "1/root"]
    x, first = assignments(joined), 0
    for root, graph in enumerate(graphs):
        one = circuit_of(graph, seed=6)
        with torch.no_grad():
            for i, region in enumerate(graph.regions):
                there = first + i
                if region.leaf is None:
                    one.region_weights(i).copy_(joined.region_weights(there))
                else:
                    one.region_leaves(i)["logits"].copy_(joined.region_leaves(there)["logits"])
        close(joined.log_prob(x, root=root), one.log_prob(x))
        first += len(graph.regions)
    with pytest.raises(PCStructureError, match="join: graphs: expected at least one, found none"):
        RegionGraph.join([])


def test_invalid_roots_and_numbers_of_samples_raise():
    circuit = classes()
    x = assignments(circuit)[:2]
    for root in (True, False, 0.0, "", []):
        with pytest.raises(ValueError, match=r"log_prob: root: expected an index in 0 \.\. 2"):
            circuit.log_prob(x, root=root)
    for number in (-1, 1.5, True):
        with pytest.raises(ValueError, match="sample: num_samples: expected a whole number"):
            circuit.sample(number, root=0)  # pyright: ignore[reportArgumentType]


def test_invalid_uniforms_raise():
    circuit = classes()
    shape = (1, 2, sum(bool(r.partitions) for r in circuit.graph.regions) + 5)
    for uniforms, message in (
        ([[0.5]], "a tensor, found builtins.list"),
        (torch.rand(shape)[:, :1], "shape"),
        (torch.rand(shape).half(), "float32 or float64, found torch.float16"),
        (torch.zeros(shape, dtype=torch.long), "float32 or float64, found torch.int64"),
        (torch.rand(shape, device="meta"), "cpu, found meta"),
        (torch.rand(shape) - 1, r"numbers in \[0, 1\], found -0\."),
        (torch.ones(shape).index_fill(2, torch.tensor(shape[2] - 1), 1.5), ".*, found 1.5"),
        (torch.full(shape, torch.nan), ".*, found nan"),
    ):
        with pytest.raises(ValueError, match=f"sample: uniforms: expected {message}"):
            circuit.sample(2, uniforms=uniforms, root=0)  # pyright: ignore[reportArgumentType]
