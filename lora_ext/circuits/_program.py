"""The compiled form of a region graph: the layout of its units and weights, and its execution.

The log-values of all units are in one buffer ``val (B, U)`` of ``B`` rows of data and ``U`` units.
Column 0 is a unit that is always 1 (log-value 0), and column 1 a unit that is always 0 (log-value
-inf). The next columns are the leaf units, the inputs over several variables, and the sums, stage
by stage. A stage is a set of regions of equal depth (longest distance from the inputs), so that no
region of a stage depends on another one. Products are not stored; the backward pass recomputes
them.

:class:`Layered` describes the layout. A program describes the computation: it is one list of int32
numbers that ``ops.circuit_layers`` executes in one call. Its parts, in order:

    header    numbers of units, leaf units and rows of all matrices, then the length of each list
    nodes     per node: first column of its results, number of sums, number of terms, index of its
              matrix or -1, range of its parts
    parts     per part: first term, 1 for a Kronecker product and otherwise 0, range of its children
    children  per child: first column, number of units
    matrices  per matrix: first weight, number of sums, number of terms, index of its first row
              among the rows of all matrices, range of its users
    users     nodes that use each matrix
    roots     column of each root unit
    stages    first node of each stage, then the number of nodes
    owners    node of each child, then of each root unit; -1 - v for a leaf unit of variable v
    draws     per node: index of its region among the regions of sums, -1 if it has no matrix

A node is a region, a part is a partition, and a matrix contains the weights of a region. A node
without a matrix is an input over several variables: its results are its products. Regions with tied
parameters share a matrix. A stage reads the results of earlier stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext import ops
from lora_ext._checks import require
from lora_ext.ops import Program

from ._leaves import Indicator, Leaf
from ._regions import PCStructureError, variables
from .multivariate import MultivariateGaussian
from .region_graph import RegionGraph

FIRST_LEAF = 2  # column of the first leaf unit; columns 0 and 1 are constants
_MAX_BINS = 4


class InputLayer(NamedTuple):
    """Variable, family and table row of each leaf unit, int32.

    Attributes:
        var: Variable; the last one for a leaf unit over several variables. A sample uses at most
            one leaf unit with a given value of ``var``.
        dist: Index of the family.
        row: Row in the table of the family.
    """

    var: Tensor
    dist: Tensor
    row: Tensor


class Family(NamedTuple):
    """A family of leaf units.

    Attributes:
        leaf: The family.
        begin: First column of its leaf units.
        end: Column after its last leaf unit.
        rows: Number of rows of its table.
        size: Number of variables of each leaf unit.
    """

    leaf: Leaf
    begin: int
    end: int
    rows: int
    size: int


@dataclass(frozen=True)
class Layered:
    """The layout of the units and weights of a circuit.

    Attributes:
        num_units: Number of columns of ``val``.
        families: Families in the order of their leaf units.
        indicator_values: Value at which an indicator is 1, for each leaf unit; 0 for other
            families.
        inputs: Variable, family and table row of the leaf units.
        first_leaves: First column of the leaf units of each variable, for each input region.
        stages: Regions of each stage, in order of execution.
        first_unit: First column of each region.
        weight_off: Index of the first weight of each region, or -1 for an input. The weights of a
            region are ``(units, products)`` in row-major order.
        num_weights: Number of weights.
    """

    num_units: int
    families: tuple[Family, ...]
    indicator_values: Tensor
    inputs: InputLayer
    first_leaves: dict[int, list[int]]
    stages: tuple[tuple[int, ...], ...]
    first_unit: tuple[int, ...]
    weight_off: tuple[int, ...]
    num_weights: int


def compile_graph(graph: RegionGraph) -> Layered:
    """Compute the layout of the units and weights of a graph.

    Raises:
        PCStructureError: If the circuit has 2^31 weights or more.
    """
    first_unit, weight_off = [-1] * len(graph.regions), [-1] * len(graph.regions)
    families, indicators, inputs, first_leaves = _leaves(graph)
    columns = FIRST_LEAF + len(inputs.var)

    def place(i: int) -> None:
        nonlocal columns
        first_unit[i] = columns
        columns += graph.regions[i].units

    for i, firsts in first_leaves.items():
        if len(firsts) == 1:
            first_unit[i] = firsts[0]
        else:
            place(i)
    stages = _stages(graph)
    num_weights, tied = 0, dict[str, int]()
    for i in (i for stage in stages for i in stage):
        region = graph.regions[i]
        place(i)
        weight_off[i] = num_weights if region.tie is None else tied.get(region.tie, num_weights)
        if weight_off[i] == num_weights:
            num_weights += region.units * graph.num_products(region)
        if region.tie is not None:
            tied[region.tie] = weight_off[i]
    few, expected = num_weights < 2**31, "fewer than 2^31 weights"
    require(few, "compile_graph", "graph", expected, num_weights, PCStructureError)
    units, offsets = tuple(first_unit), tuple(weight_off)
    return Layered(
        columns, families, indicators, inputs, first_leaves, stages, units, offsets, num_weights
    )


def _leaves(graph: RegionGraph) -> tuple[tuple[Family, ...], Tensor, InputLayer, dict[int, Any]]:
    """Compute the layout of a graph's leaf units, family by family.

    Returns:
        ``families``, ``indicator_values``, ``inputs`` and ``first_leaves`` of :class:`Layered`.
    """
    grouped: dict[tuple[object, int], list[int]] = {}
    for i, region in enumerate(graph.regions):
        if region.leaf is not None:
            joint = isinstance(region.leaf, MultivariateGaussian)
            size = region.variables.bit_count() if joint else 1
            key = Indicator if isinstance(region.leaf, Indicator) else region.leaf
            grouped.setdefault((key, size), []).append(i)
    var, dist, row, values = list[int](), list[int](), list[int](), list[int]()
    first_leaves: dict[int, list[int]] = {}
    families: list[Family] = []
    tied: dict[str, int] = {}
    for family, ((_, size), members) in enumerate(grouped.items()):
        begin, num_rows = FIRST_LEAF + len(var), 0
        leaf = graph.regions[members[0]].leaf
        assert leaf is not None
        for i in members:
            region = graph.regions[i]
            names, units = variables(region.variables)[size - 1 :], region.units
            base = num_rows if region.tie is None else tied.setdefault(region.tie, num_rows)
            num_rows = max(num_rows, base + len(names) * units)
            first_leaves[i] = [FIRST_LEAF + len(var) + k * units for k in range(len(names))]
            own = region.leaf.values if isinstance(region.leaf, Indicator) else [0] * units
            for k, v in enumerate(names):
                var += [v] * units
                dist += [family] * units
                row += range(base + k * units, base + (k + 1) * units)
                values += own
        families.append(Family(leaf, begin, FIRST_LEAF + len(var), num_rows, size))
    inputs = InputLayer(*(torch.tensor(t, dtype=torch.int32) for t in (var, dist, row)))
    return tuple(families), torch.tensor(values, dtype=torch.int32), inputs, first_leaves


def _stages(graph: RegionGraph) -> tuple[tuple[int, ...], ...]:
    """Return the stages, each of which contains the sum regions of one depth and one shape.

    If a depth has many shapes, its regions are grouped by their numbers of units and their rounded
    numbers of terms instead. The stages determine the order of the weights, on which files depend.
    """
    layers: dict[int, list[int]] = {}
    for i, depth in enumerate(graph.depths()):
        if depth:
            layers.setdefault(depth, []).append(i)

    def shape(i: int) -> tuple[Any, ...]:
        region = graph.regions[i]
        parts = tuple(
            (p.kind, *(graph.regions[c].units for c in p.children))
            if p.kind == "kronecker"
            else (p.kind, graph.partition_units(p))
            for p in region.partitions
        )
        return region.units, graph.num_products(region), parts

    stages: list[tuple[int, ...]] = []
    for level in sorted(layers):
        shapes = {i: shape(i) for i in layers[level]}
        many = len(set(shapes.values())) > _MAX_BINS
        bins: dict[tuple[Any, ...], list[int]] = {}
        for i, (units, width, parts) in shapes.items():
            key = (units, (width - 1).bit_length()) if many else (units, width, parts)
            bins.setdefault(key, []).append(i)
        stages += map(tuple, bins.values())
    return tuple(stages)


class _Writer:
    """Builder of a program, with the lists of which the program consists."""

    def __init__(self, graph: RegionGraph, layered: Layered):
        self.graph, self.layered = graph, layered
        self.nodes, self.parts = list[list[int]](), list[list[int]]()
        self.children, self.matrices = list[list[int]](), list[list[int]]()
        self.users, self.owners, self.draws = list[list[int]](), list[int](), list[int]()
        self.node_of = dict[int, int]()  # node of each region
        self.matrix_of = dict[int, int]()  # matrix by the index of its first weight
        self.stages, self.rows = [0], 0
        inner = (i for i, region in enumerate(graph.regions) if region.partitions)
        self.place = {region: k for k, region in enumerate(inner)}  # index among regions of sums

    def add_inputs(self) -> None:
        """Add the inputs over several variables as a stage."""
        for i, firsts in self.layered.first_leaves.items():
            region = self.graph.regions[i]
            if len(firsts) == 1:
                continue
            self.add_part(0, False, [(f, region.units) for f in firsts])
            self.owners += [-1 - v for v in variables(region.variables)]
            self.add_node(i, region.units, -1, len(self.parts) - 1)
            self.draws.append(-1)
        if self.nodes:
            self.stages.append(len(self.nodes))

    def add_stage(self, regions: Sequence[int]) -> None:
        """Add regions of sums as a stage."""
        for i in regions:
            region, offset = self.graph.regions[i], self.layered.weight_off[i]
            width = self.graph.num_products(region)
            matrix = self.matrix_of.setdefault(offset, len(self.matrices))
            if matrix == len(self.matrices):
                self.matrices.append([offset, region.units, width, self.rows])
                self.users.append([])
                self.rows += region.units
            self.users[matrix].append(len(self.nodes))
            first, term = len(self.parts), 0
            for p in region.partitions:
                columns = [
                    (self.layered.first_unit[c], self.graph.regions[c].units) for c in p.children
                ]
                self.add_part(term, p.kind == "kronecker", columns)
                self.owners += map(self.owner, p.children)
                term += self.graph.partition_units(p)
            self.add_node(i, width, matrix, first)
            self.draws.append(self.place[i])
        self.stages.append(len(self.nodes))

    def add_part(self, term: int, pairs: bool, columns: Sequence[tuple[int, int]]) -> None:
        end = len(self.children) + len(columns)
        self.parts.append([term, int(pairs), len(self.children), end])
        self.children.extend(map(list, columns))

    def add_node(self, i: int, width: int, matrix: int, first_part: int) -> None:
        self.node_of[i] = len(self.nodes)
        first, units = self.layered.first_unit[i], self.graph.regions[i].units
        self.nodes.append([first, units, width, matrix, first_part, len(self.parts)])

    def owner(self, region: int) -> int:
        """Return the node of a region, or ``-1 - v`` for an input of variable v without a node."""
        found = self.node_of.get(region)
        if found is None:
            found = -1 - max(variables(self.graph.regions[region].variables))
        return found


def compile_program(graph: RegionGraph, layered: Layered) -> Program:
    """Return the program of a compiled graph."""
    writer = _Writer(graph, layered)
    writer.add_inputs()
    for stage in layered.stages:
        writer.add_stage(stage)
    used: list[int] = []
    for matrix, of in zip(writer.matrices, writer.users, strict=True):
        matrix += [len(used), len(used) + len(of)]
        used += of
    roots = root_columns(graph, layered)
    root_owners = [writer.owner(r) for r in graph.roots for _ in range(graph.regions[r].units)]
    lists = [writer.nodes, writer.parts, writer.children, writer.matrices]
    num_leaves, num_stages = len(layered.inputs.var), len(writer.stages) - 1
    header = [layered.num_units, num_leaves, writer.rows, *(len(part) for part in lists)]
    header += [len(used), len(roots), num_stages]
    flat = [x for part in lists for item in part for x in item]
    tail = [*used, *roots, *writer.stages, *writer.owners, *root_owners, *writer.draws]
    numbers = torch.tensor(header + flat + tail, dtype=torch.int32)
    plan = [layered.num_units, num_leaves, writer.rows, len(writer.nodes), len(writer.matrices)]
    plan += [len(roots), len(numbers), num_stages, graph.num_variables, len(writer.place)]
    for begin, end in pairwise(writer.stages):
        members = writer.nodes[begin:end]
        plan += [begin, end, max(n[1] for n in members), max(n[2] for n in members)]
    return Program(numbers, plan)


def root_columns(graph: RegionGraph, layered: Layered) -> list[int]:
    """Return the columns of all root units."""
    firsts = [(layered.first_unit[r], graph.regions[r].units) for r in graph.roots]
    return [first + u for first, units in firsts for u in range(units)]


def matrices_of(program: Program) -> list[tuple[int, int, int]]:
    """Return the first weight and the numbers of sums and terms of each matrix."""
    nodes, parts, children, matrices = program.numbers[3:7].tolist()
    first = 10 + 6 * nodes + 4 * parts + 2 * children
    rows = program.numbers[first : first + 6 * matrices].view(-1, 6)
    return [(offset, sums, terms) for offset, sums, terms in rows[:, :3].tolist()]


def rows_of_one_width(program: Program) -> list[tuple[slice, int]]:
    """Return the weights (a slice) and the number of terms of each run of sums of equal width."""
    found: list[tuple[slice, int]] = []
    for first, sums, terms in matrices_of(program):
        end = first + sums * terms
        if found and found[-1][1] == terms:
            found[-1] = (slice(found[-1][0].start, end), terms)
        else:
            found.append((slice(first, end), terms))
    return found


class Weights(NamedTuple):
    """Flat weights of an evaluation, with their norm and the precision of the upward pass."""

    flat: Tensor
    norm: str
    precision: str = "fp32"


class Execution:
    """A program on a device, with methods for the upward, backward and downward passes."""

    def __init__(self, program: Program, roots: list[int]):
        self.program, self.roots = program, roots

    def to(self, device: torch.device) -> None:
        """Move the program to ``device`` if it is on another device."""
        if device != self.program.numbers.device:
            self.program = self.program.to(device)

    def up(self, leaf: Tensor, weights: Weights, semiring: str = "sum") -> Tensor:
        """Return the log-values ``(B, U)`` of all units from those of the leaves ``(B, N)``."""
        flat, norm, precision = weights
        with torch._C._AutoDispatchBelowAutograd():  # `Evaluate` computes the gradient.
            return ops.circuit_layers(leaf, flat, self.program, norm, semiring, precision)

    def down(
        self, droots: Tensor, val: Tensor, weights: Weights, need_weights: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute all gradients from ``droots (B, R)``, the gradients of the roots.

        Returns:
            The gradients of all units ``(B, U)``, of the leaves ``(B, N)`` and of the weights. The
            last one is empty if ``need_weights`` is False.
        """
        with torch._C._AutoDispatchBelowAutograd():
            grad, dflat = ops.circuit_layers_backward(
                droots, val, weights.flat, self.program, weights.norm, need_weights
            )
        return grad, grad[:, FIRST_LEAF : FIRST_LEAF + self.program.plan[1]], dflat

    def root_values(self, val: Tensor) -> Tensor:
        """Return a copy of the values of the roots, ``(B, R)``."""
        if len(self.roots) == 1:
            return val.narrow(1, self.roots[0], 1).clone()
        return val[:, self.roots]

    def walk(
        self, val: Tensor, weights: Weights, root: Tensor, uniforms: Tensor | None = None
    ) -> Tensor:
        """Choose one term of each sum, from a root unit down to the leaves, for M rows or draws.

        Return the column of the chosen leaf unit of each variable, ``(M, n)``, or -1 if there is
        none; see ``ops.circuit_layers_walk``.
        """
        with torch._C._AutoDispatchBelowAutograd():
            return ops.circuit_layers_walk(val, weights.flat, self.program, root, uniforms)


class Evaluate(torch.autograd.Function):
    """Autograd function that maps log-values of leaf units and weights to log-values of roots."""

    @staticmethod
    def forward(
        ctx: Any, leaf: Tensor, flat: Tensor, execution: Execution, norm: str, precision: str
    ) -> Tensor:
        """Return the log-values of the roots, ``(B, R)``."""
        ctx.weights = Weights(flat.detach(), norm, precision)
        val = execution.up(leaf, ctx.weights)
        ctx.save_for_backward(val, flat)
        ctx.execution = execution
        return execution.root_values(val)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of leaves and weights."""
        val, _ = ctx.saved_tensors  # raises if the weights were changed in place
        need = ctx.needs_input_grad[1]
        _, dleaf, dflat = ctx.execution.down(grads[0], val, ctx.weights, need)
        return dleaf, dflat if need else None, None, None, None
