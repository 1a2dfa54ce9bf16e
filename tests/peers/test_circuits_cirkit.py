"""Circuits, compared with libcirkit circuits that have the same graph and parameters."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from circuit_graphs import GRAPHS, assignments, circuit_of, close, mixed

from lora_ext.circuits import (
    Bernoulli,
    Binomial,
    Categorical,
    Circuit,
    Gaussian,
    Partition,
    RegionGraph,
)
from lora_ext.circuits._regions import variables

_REASON = "libcirkit is not installed: pip install --no-build-isolation '.[peers]'"
pipeline = pytest.importorskip("cirkit.pipeline", reason=_REASON)
queries = pytest.importorskip("cirkit.backend.torch.queries", reason=_REASON)
symbolic = pytest.importorskip("cirkit.symbolic.circuit", reason=_REASON)
initializers = pytest.importorskip("cirkit.symbolic.initializers", reason=_REASON)
layers = pytest.importorskip("cirkit.symbolic.layers", reason=_REASON)
parameters = pytest.importorskip("cirkit.symbolic.parameters", reason=_REASON)
scope = pytest.importorskip("cirkit.utils.scope", reason=_REASON)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Set torch's default dtype, which libcirkit uses for parameters, to float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def constant(values: torch.Tensor):
    """Return a libcirkit parameter with the given values."""
    initializer = initializers.ConstantTensorInitializer(values.detach().numpy().astype(np.float64))
    node = parameters.TensorParameter(*values.shape, initializer=initializer)
    return parameters.Parameter.from_input(node)


class Translation:
    """Translation of a circuit to libcirkit layers: one layer per variable of an input, per product
    and per sum."""

    def __init__(self, circuit: Circuit):
        self.circuit, self.graph = circuit, circuit.graph
        self.inputs: dict[object, list[object]] = {}
        tops: list[object] = []
        for i, region in enumerate(self.graph.regions):
            if region.leaf is not None:
                factors = [self.leaf(i, k, v) for k, v in enumerate(variables(region.variables))]
                tops.append(self.product(factors, "hadamard", region.units))
                continue
            products = [self.partition(p, tops) for p in region.partitions]
            widths = {self.graph.partition_units(p) for p in region.partitions}
            assert len(widths) == 1, "expected sums whose inputs have one size, as in libcirkit"
            weight = constant(circuit.region_weights(i).softmax(1))
            width = widths.pop()
            top = layers.SumLayer(width, region.units, len(products), weight=weight)
            tops.append(self.add(top, products))
        root = tops[self.graph.roots[0]]
        self.circuit = symbolic.Circuit(list(self.inputs), self.inputs, [root])

    def add(self, layer: object, inputs: list[object]) -> object:
        self.inputs[layer] = inputs
        return layer

    def leaf(self, i: int, k: int, v: int) -> object:
        region = self.graph.regions[i]
        rows = slice(k * region.units, (k + 1) * region.units)
        table = {name: t[rows] for name, t in self.circuit.region_leaves(i).items()}
        where, leaf = (scope.Scope([v]), region.units), region.leaf
        if isinstance(leaf, Categorical):
            logits, size = constant(table["logits"].log_softmax(1)), leaf.num_categories
            return self.add(layers.CategoricalLayer(*where, num_categories=size, logits=logits), [])
        if isinstance(leaf, Gaussian):
            mean, stddev = constant(table["mean"]), constant(table["log_std"].exp())
            return self.add(layers.GaussianLayer(*where, mean=mean, stddev=stddev), [])
        assert isinstance(leaf, Bernoulli | Binomial)
        total = leaf.total if isinstance(leaf, Binomial) else 1
        logits = constant(table["logit"])
        return self.add(layers.BinomialLayer(*where, total_count=total, logits=logits), [])

    def partition(self, partition: Partition, tops: list[object]) -> object:
        children = [tops[c] for c in partition.children]
        return self.product(
            children, partition.kind, self.graph.regions[partition.children[0]].units
        )

    def product(self, children: list[object], kind: str, units: int) -> object:
        if len(children) == 1:
            return children[0]
        make = layers.HadamardLayer if kind == "hadamard" else layers.KroneckerLayer
        return self.add(make(units, len(children)), children)


def compiled(circuit: Circuit):
    """Return the compiled libcirkit circuit and the context that compiled it."""
    context = pipeline.PipelineContext("torch", semiring="lse-sum", fold=True, optimize=True)
    return context, context.compile(Translation(circuit).circuit)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", GRAPHS)
def test_log_probabilities_and_marginals_equal_libcirkit(name: str, seed: int) -> None:
    circuit = circuit_of(GRAPHS[name](), seed)
    context, peer = compiled(circuit)
    x = assignments(circuit)[::3]
    close(circuit.log_prob(x), peer(x)[:, 0, 0])
    keep = list(range(seed % 2, circuit.num_variables, 2))
    unseen = scope.Scope(set(range(circuit.num_variables)) - set(keep))
    if isinstance(circuit.layered.families[0][0], Categorical):  # libcirkit integrates the circuit.
        expected = context.integrate(peer, unseen)(x)
    else:  # libcirkit can integrate binomial leaves only in a query.
        expected = queries.IntegrateQuery(peer)(x, integrate_vars=unseen)
    close(circuit.marginal(x, keep), expected[:, 0, 0])


def test_mixed_leaves_and_gradients_equal_libcirkit() -> None:
    circuit = circuit_of(mixed(), seed=4)
    x = circuit.sample(50, generator=torch.Generator().manual_seed(0))[0]
    close(circuit.log_prob(x), compiled(circuit)[1](x)[:, 0, 0])
    circuit = circuit_of(RegionGraph.hmm(5, 4, Categorical(3)), seed=5)
    x = assignments(circuit)[::20]
    circuit.log_prob(x).sum().backward()
    _, peer = compiled(circuit)
    peer(x).sum().backward()
    ours, logits = circuit.leaves[0]["logits"].grad, circuit.leaves[0]["logits"].detach()
    leaves = [p for p in peer.parameters() if p.numel() == ours.numel()]
    assert len(leaves) == 1  # one fold with all leaves, in the order of lora_ext
    close(leaves[0].detach().view_as(ours), logits.log_softmax(1))
    theirs = leaves[0].grad.view_as(ours)
    close(ours, theirs - logits.softmax(1) * theirs.sum(1, keepdim=True))
