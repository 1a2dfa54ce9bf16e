"""Region graphs: checks of their structure and the error messages."""

from __future__ import annotations

import ast
import json
import re
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
import torch
from circuit_graphs import GRAPHS

from lora_ext.circuits import (
    Bernoulli,
    Categorical,
    Circuit,
    Indicator,
    Input,
    Partition,
    PCStructureError,
    Region,
    RegionGraph,
    _structure,
    chow_liu_parents,
    compile_graph,
)

BIT = Bernoulli()


def build(products, inputs=None, **options) -> RegionGraph:
    inputs = inputs or {"a": Input([0], BIT), "b": Input([1], BIT), "c": Input([0], BIT)}
    return RegionGraph.from_edges(inputs, products, **options)


def test_sum_over_different_scopes_is_not_smooth():
    graph = build([("s", ["a", "b"]), ("s", ["c"])])
    problem = "not smooth: sum unit s mixes scopes {0, 1} and {0}"
    assert _structure.why_not_smooth(graph) == problem
    assert _structure.why_not_decomposable(graph) is None
    expected = "Circuit: graph: expected a smooth and decomposable circuit, found one that is "
    with pytest.raises(PCStructureError, match=re.escape(expected + problem)):
        Circuit(graph)


def test_product_over_a_shared_variable_is_not_decomposable():
    graph = build([("s", ["a", "b", "c"])])
    problem = _structure.why_not_decomposable(graph)
    assert problem is not None and "unit s: children a and c share {0}" in problem
    assert _structure.why_not_smooth(graph) is None
    with pytest.raises(PCStructureError, match="children a and c"):
        Circuit(graph)


@pytest.mark.parametrize(
    ("products", "options", "message"),
    [
        ([("s", ["a", "t"]), ("t", ["s", "b"])], {}, "found a cycle of units s, t"),
        ([("s", ["a", "b", "zebra"])], {}, "found unknown children: zebra"),
        ([("a", ["b"])], {}, "unit a: expected a sum, found an input"),
        ([("s", ["a", "b"])], {}, r"regions: expected a single root .*, found 2: units c, s"),
        ([("s", ["a", "b"]), ("t", ["c", "s"])], {"units": {"s": 2}}, "expected equal unit counts"),
        ([("s", ["a", "b", "c"], "kronecker")], {}, "expected two children in a kronecker"),
        ([("s", ["a", "b", "c"], "tensor")], {}, "kind: expected hadamard or kronecker"),
    ],
)
def test_invalid_graph_raises(products, options, message):
    with pytest.raises(PCStructureError, match=message):
        build(products, **options)


def test_gaps_among_the_variables_raise():
    with pytest.raises(PCStructureError, match=r"expected all .*, found variables \[0, 2\] in no"):
        build([("s", ["a", "b"])], {"a": Input([1], BIT), "b": Input([3], BIT)})


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([], "regions: expected at least one, found none"),
        ([Region(1)], "region: expected either a leaf or partitions, found neither"),
        ([Region(0, leaf=BIT, variables=1)], "units: expected at least 1, found 0"),
        ([Region(1, leaf=BIT)], "variables: expected at least one variable in an input"),
        ([Region(2, leaf=Indicator((1,)), variables=1)], "leaf: expected 2 values, one per unit"),
        ([Region(1, (Partition((0,)),))], "children: expected regions before region 0, found"),
        (
            [
                Region(2, leaf=BIT, variables=1, tie="t"),
                Region(3, leaf=BIT, variables=2, tie="t"),
                Region(1, (Partition((0, 1), "kronecker"),)),
            ],
            r"tie 't': expected \(leaf, units, variables .*, found",
        ),
    ],
)
def test_invalid_regions_raise(regions, message):
    with pytest.raises(PCStructureError, match=message):
        RegionGraph(tuple(regions))


def test_tree_of_variables_needs_one_root_and_no_cycle():
    with pytest.raises(PCStructureError, match=r"one variable with parent -1, found 2: \[0, 1\]"):
        RegionGraph.hclt([-1, -1], 2, BIT)
    with pytest.raises(PCStructureError, match=r"found a cycle: variables \[1, 2\]"):
        RegionGraph.hclt([-1, 2, 1], 2, BIT)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda leaf: RegionGraph.cp(0, 2, leaf), "cp: num_variables: expected at least 1"),
        (lambda leaf: RegionGraph.hmm(3, 0, leaf), "hmm: rank: expected at least 1"),
        (lambda leaf: RegionGraph.btree(0, 2, leaf), "btree: num_variables: expected at least 1"),
        (
            lambda leaf: RegionGraph.hclt([-1, 2], 2, leaf),
            r"hclt: parents\[1\]: expected -1 or .*, found 2",
        ),
        (lambda leaf: RegionGraph.hclt([-1, 0], -1, leaf), "rank: expected at least 1, found -1"),
        (lambda leaf: RegionGraph.rat_spn(4, 1, 0, 2, 2, leaf), "repetitions: expected at least 1"),
        (lambda leaf: RegionGraph.poon_domingos(2, 0, 2, leaf), "width: expected at least 1"),
        (lambda leaf: RegionGraph.poon_domingos(2, 2, 2, leaf, 0), "delta: expected at least 1"),
        (
            lambda leaf: RegionGraph.from_edges({"a": Input([-1], leaf)}, [("s", ["a"])]),
            r"unit a: variables: expected 0 .. .*, found \[-1\]",
        ),
    ],
)
def test_builders_raise_for_an_argument_out_of_range(build, message):
    with pytest.raises(PCStructureError, match=message):
        build(BIT)


@pytest.mark.parametrize("name", GRAPHS)
def test_builders_are_smooth_and_decomposable(name):
    graph = GRAPHS[name]()
    _structure.check_tractable(graph, "test")
    structured = name not in ("rat_spn", "poon_domingos")
    assert _structure.is_structured_decomposable(graph) == structured
    assert _structure.is_deterministic(graph) is False
    assert RegionGraph.from_json(json.loads(graph.to_json())) == graph


def test_determinism_is_detected_if_indicators_separate_terms():
    def graph(*values: int) -> RegionGraph:
        inputs = {f"i{n}": Input([0], Indicator((v,))) for n, v in enumerate(values)}
        inputs |= {f"b{n}": Input([1], BIT) for n in range(len(values))}
        return build([("s", [f"i{n}", f"b{n}"]) for n in range(len(values))], inputs)

    assert _structure.is_deterministic(graph(0, 1, 2)) is True
    assert _structure.is_deterministic(graph(0, 1, 0)) == "unknown"
    # No single variable separates all three terms, but for each pair of terms there is one that
    # does.
    corner = {"a": ([0, 1], (0,)), "b": ([0], (1,)), "c": ([1], (0,)), "d": ([0, 1], (1,))}
    inputs = {k: Input(v, Indicator(values)) for k, (v, values) in corner.items()}
    products = [("s", ["a"]), ("s", ["b", "c"]), ("s", ["d"])]
    assert _structure.is_deterministic(build(products, inputs)) is True


def test_region_with_a_kronecker_product_counts_all_pairs():
    graph = build(
        [("s", ["a", "b"], "kronecker")], {"a": Input([0], BIT, 3), "b": Input([1], BIT, 4)}
    )
    assert graph.num_products(graph.regions[-1]) == 12


def test_tied_regions_share_their_weights_and_inputs_their_tables():
    layered = compile_graph(RegionGraph.hmm(4, 8, Categorical(3), homogeneous=True))
    assert layered.num_weights == 8 * 8 + 8
    assert [len(stage) for stage in layered.stages] == [1] * 4
    offsets = [layered.weight_off[i] for stage in layered.stages for i in stage]
    assert offsets == [0, 0, 0, 64]
    assert all(t.dtype == torch.int32 for t in layered.inputs)
    assert layered.inputs.row.tolist() == list(range(8)) * 4


def test_layer_with_many_shapes_needs_few_stages():
    inputs = {f"i{n}": Input([n], BIT) for n in range(9)}
    inputs |= {f"j{n}": Input([n], BIT) for n in range(9)}
    products = [(f"s{n}", [c]) for n in range(9) for c in ([f"i{n}", f"j{n}"] * 5)[: n + 2]]
    products.append(("root", [f"s{n}" for n in range(9)]))
    graph = build(products, inputs)
    widths = [max(graph.num_products(graph.regions[i]) for i in s)
              for s in compile_graph(graph).stages]  # fmt: skip
    assert widths == [2, 4, 8, 10, 1]


def test_chow_liu_finds_the_chain_of_the_data():
    g = torch.Generator().manual_seed(0)
    order, columns = [2, 0, 3, 1], {}
    last = torch.randint(2, (4000,), generator=g)
    for v in order:
        columns[v] = last
        last = torch.where(torch.rand(4000, generator=g) < 0.9, last, 1 - last)
    x = torch.stack([columns[v] for v in range(4)], 1)
    edges = {frozenset((v, p)) for v, p in enumerate(chow_liu_parents(x, 2)) if p >= 0}
    assert edges == {frozenset(e) for e in ((2, 0), (0, 3), (3, 1))}


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(5, 2), r"x: expected integers, found torch.float32; .* call x.long\(\)"),
        (np.zeros((5, 2)), r"x: expected a tensor, found numpy.ndarray; convert it"),
        (torch.tensor([[0, -1]]), r"x: expected values in 0 .. 1 without .*, found -1 .. 0"),
        (torch.tensor([[0, 2]]), r"x: expected values in 0 .. 1 without .*, found 0 .. 2"),
        (torch.zeros(3).long(), r"x: expected a non-empty shape \(B, n\), found \(3,\)"),
        (torch.zeros(0, 3).long(), r"x: expected a non-empty shape \(B, n\), found \(0, 3\)"),
    ],
)
def test_chow_liu_errors_contain_the_remedy(x, message):
    with pytest.raises(ValueError, match="chow_liu_parents: " + message):
        chow_liu_parents(x, 2)


def test_leaf_family_that_cannot_be_loaded_is_not_saved():
    class Categorical(Bernoulli):  # same name as a family of lora_ext
        pass

    with pytest.raises(ValueError, match="family: expected one of"):
        RegionGraph.cp(2, 2, Categorical()).to_json()


def test_modules_of_the_package_have_no_circular_imports():
    """Check also imports under ``TYPE_CHECKING``, which count as circular imports too."""
    room = Path(_structure.__file__).parent
    graph: dict[str, set[str]] = {}
    for path in room.glob("*.py"):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[path.stem] = {n.removeprefix("lora_ext.circuits.") for n in names}
    modules = graph.keys() - {"__init__"}
    order = TopologicalSorter({m: graph[m] & modules for m in modules}).static_order()
    assert set(order) == modules  # No CycleError was raised.


def test_dot_text_contains_all_edges():
    graph = RegionGraph.rat_spn(4, 1, 2, 2, 2, BIT)
    dot = graph.to_dot()
    assert dot.count("->") == sum(1 + len(p.children) for r in graph.regions for p in r.partitions)
