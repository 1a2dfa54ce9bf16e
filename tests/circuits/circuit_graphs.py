"""Region graphs for tests, and a slow but simple evaluation of a circuit."""

from __future__ import annotations

import math
import random

import torch

from lora_ext.circuits import (
    Bernoulli,
    Binomial,
    Categorical,
    Circuit,
    Gaussian,
    Indicator,
    Input,
    Leaf,
    RegionGraph,
)

GRAPHS = {
    "cp": lambda: RegionGraph.cp(4, 3, Categorical(3)),
    "hmm": lambda: RegionGraph.hmm(4, 3, Categorical(3)),
    "hmm tied": lambda: RegionGraph.hmm(4, 3, Categorical(3), homogeneous=True),
    "btree": lambda: RegionGraph.btree(5, 3, Categorical(2)),
    "hclt": lambda: RegionGraph.hclt([-1, 0, 0, 1, 1], 2, Categorical(3)),
    "rat_spn": lambda: RegionGraph.rat_spn(6, 2, 3, 2, 3, Bernoulli()),
    "poon_domingos": lambda: RegionGraph.poon_domingos(2, 3, 2, Binomial(2)),
    "poon_domingos delta 2": lambda: RegionGraph.poon_domingos(2, 4, 2, Bernoulli(), 2),
}


def circuit_of(graph: RegionGraph, seed: int = 0, **options) -> Circuit:
    """Return a circuit with reproducible random parameters in float64."""
    torch.manual_seed(seed)
    return Circuit(graph, **options).double()


def mixed() -> RegionGraph:
    """Return a mixture over a Gaussian, a binomial and a categorical variable."""
    families = {"g": Gaussian(), "k": Binomial(3), "c": Categorical(4)}
    inputs = {k: Input([v], leaf, 2) for v, (k, leaf) in enumerate(families.items())}
    return RegionGraph.from_edges(inputs, [("s", list(families))])


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def num_values(circuit: Circuit) -> list[int]:
    """Return the number of values of each variable; for an indicator, its largest value plus 1."""
    sizes = [1] * circuit.num_variables
    for i, region in enumerate(circuit.graph.regions):
        if region.leaf is None:
            continue
        size = region.leaf.num_values()
        if isinstance(region.leaf, Indicator):
            size = max(region.leaf.values) + 1
        for v in range(circuit.num_variables):
            if circuit.graph.scopes[i] >> v & 1:
                sizes[v] = max(sizes[v], size)
    return sizes


def assignments(circuit: Circuit) -> torch.Tensor:
    """Return all assignments of values to the variables, one per row."""
    axes = [torch.arange(size) for size in num_values(circuit)]
    return torch.cartesian_prod(*axes).view(-1, len(axes))


def leaf_probability(leaf: Leaf, parameters: dict[str, torch.Tensor], row: int, x: int) -> float:
    if isinstance(leaf, Categorical):
        return parameters["logits"][row].softmax(0)[x].item()
    p = 1 / (1 + math.exp(-parameters["logit"][row].item()))
    n = leaf.total if isinstance(leaf, Binomial) else 1
    return math.comb(n, x) * p**x * (1 - p) ** (n - x)


def evaluate(circuit: Circuit, x: list[int]) -> float:
    """Return p(x) by recursion over units in plain Python. Variables with x = -1 are summed out."""
    graph = circuit.graph
    known: dict[tuple[int, int], float] = {}

    def value(i: int, unit: int) -> float:
        if (i, unit) not in known:
            known[i, unit] = compute(i, unit)
        return known[i, unit]

    def compute(i: int, unit: int) -> float:
        region = graph.regions[i]
        if region.leaf is not None:
            scope = [v for v in range(graph.num_variables) if region.variables >> v & 1]
            result = 1.0
            for k, v in enumerate(scope):
                if x[v] < 0:
                    continue
                if isinstance(region.leaf, Indicator):
                    result *= float(x[v] == region.leaf.values[unit])
                else:
                    parameters = circuit.region_leaves(i)
                    row = k * region.units + unit
                    result *= leaf_probability(region.leaf, parameters, row, x[v])
            return result
        products: list[float] = []
        for p in region.partitions:
            counts = [graph.regions[c].units for c in p.children]
            if p.kind == "hadamard":
                products += [math.prod(value(c, u) for c in p.children) for u in range(counts[0])]
            else:
                a, b = p.children
                products += [
                    value(a, u) * value(b, v) for u in range(counts[0]) for v in range(counts[1])
                ]
        weights = circuit.region_weights(i)[unit].detach()
        weights = weights.softmax(0) if circuit.norm == "logits" else weights.exp()
        return sum(w * p for w, p in zip(weights.tolist(), products, strict=True))

    return value(graph.roots[0], 0)


def random_graph(seed: int) -> RegionGraph:
    """Return a random smooth, decomposable graph with shared regions and both kinds of products."""
    rng = random.Random(seed)
    num_variables = rng.randint(1, 5)
    families: list[Leaf] = [
        rng.choice([Categorical(rng.randint(2, 3)), Bernoulli(), Binomial(2), Indicator(())])
        for _ in range(num_variables)
    ]
    inputs: dict[str, Input] = {}
    products: list[tuple[str, list[str], str]] = []
    units: dict[str, int] = {}
    ties: dict[str, str] = {}
    known: dict[tuple[frozenset[int], int], list[str]] = {}

    def leaf_for(scope: list[int], count: int) -> Leaf | None:
        family = families[scope[0]]
        if any(families[v] != family for v in scope):
            return None
        if isinstance(family, Indicator):
            return Indicator(tuple(rng.randint(0, 1) for _ in range(count)))
        return family

    def build(scope: list[int], count: int, top: bool = False) -> str:
        key = (frozenset(scope), count)
        if not top and key in known and rng.random() < 0.5:
            return rng.choice(known[key])
        name = f"r{len(inputs) + len(units)}"
        leaf = leaf_for(scope, count)
        if not top and leaf is not None and (len(scope) == 1 or rng.random() < 0.2):
            tie = f"tie{families.index(leaf)}" if leaf in families and len(scope) == 1 else None
            tie = f"{tie}/{count}" if tie and rng.random() < 0.3 else None
            inputs[name] = Input(scope, leaf, count, tie)
        else:
            units[name] = count
            for _ in range(rng.randint(1, 3)):
                products.append((name, *split(scope, count)))
        known.setdefault(key, []).append(name)
        return name

    def split(scope: list[int], count: int) -> tuple[list[str], str]:
        scope = rng.sample(scope, len(scope))
        if len(scope) == 1 or rng.random() < 0.1:  # a single child with the same scope
            leaf = leaf_for(scope, count)
            if leaf is not None:
                name = f"r{len(inputs) + len(units)}"
                inputs[name] = Input(scope, leaf, count)
                return [name], "hadamard"
        parts = rng.randint(2, min(3, len(scope)))
        cuts = sorted(rng.sample(range(1, len(scope)), parts - 1))
        pieces = [scope[a:b] for a, b in zip([0, *cuts], [*cuts, len(scope)], strict=True)]
        if parts == 2 and rng.random() < 0.5:
            return [build(p, rng.randint(1, 4)) for p in pieces], "kronecker"
        width = rng.choice([1, 2, 3, 5, 8])
        return [build(p, width) for p in pieces], "hadamard"

    root = build(list(range(num_variables)), 1, top=True)
    graph = RegionGraph.from_edges(inputs, products, units, ties)
    assert graph.label(graph.roots[0]) == root
    return graph
