"""The compiled form of a region graph: flat int32 arrays in layers.

Values of all units lie in one buffer ``val (B, U)``, a row of data contiguous. Column 0 is a unit
that is always 1 (log 0), column 1 one that is always 0 (log -inf): padding. Then come leaf units,
inputs over several variables, and sums, stage by stage.

A stage holds regions of one depth (longest distance from the inputs) and one shape. Its products
are computed into a buffer of its own, of which each region owns consecutive columns, and are gone
after its sums: no product is ever kept, backward computes it again. Sums are block-CSR: row block r
has the tiles ``row_ptr[r] .. row_ptr[r + 1]``, equally many in each; tile t multiplies the product
columns from ``col_block[t] * block_k`` on with the weights ``w_off[t] + i * w_stride[t] + j``,
i < block_m, j < block_k; ``w_off`` -1 is a tile of zero weights. Offsets repeat where parameters
are tied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext.circuits.errors import PCStructureError, require
from lora_ext.circuits.leaves import Indicator, Joint, Leaf
from lora_ext.circuits.region_graph import RegionGraph
from lora_ext.circuits.regions import Partition
from lora_ext.circuits.scopes import variables

ONE, ZERO, FIRST_LEAF = 0, 1, 2
MAX_BLOCK = 128
_MAX_BINS = 4


@dataclass(frozen=True)
class InputLayer:
    """Where each leaf unit finds its data and parameters.

    ``var`` holds its variable, ``dist`` its family, ``row`` its row in the table of the family. Of
    a leaf over several variables, ``var`` has the last, for no two leaves of a walk share one.
    """

    var: Tensor
    dist: Tensor
    row: Tensor


class Family(NamedTuple):
    """A family of leaf units: its columns, rows of its table, and variables that a unit sees."""

    leaf: Leaf
    begin: int
    end: int
    rows: int
    size: int


@dataclass(frozen=True)
class ProductLayer:
    """``out[p] = sum of val[child_idx[child_ptr[p] : child_ptr[p + 1]]]``.

    ``kron`` is ``(n, m)`` where the columns are, n * m at a time, all pairs of n and m units.
    """

    child_ptr: Tensor
    child_idx: Tensor
    kron: tuple[int, int] | None = None


@dataclass(frozen=True)
class SumLayer:
    """The weights of a stage in block-CSR; its sums are written to ``val[:, out_off:]``."""

    block_m: int
    block_k: int
    out_off: int
    row_ptr: Tensor
    col_block: Tensor
    w_off: Tensor
    w_stride: Tensor


@dataclass(frozen=True)
class Stage:
    """Regions of one shape: ``units`` sums over ``width`` products each."""

    regions: tuple[int, ...]
    units: int
    width: int
    product: ProductLayer
    sum: SumLayer


@dataclass(frozen=True)
class Layered:
    """What circuits execute.

    Attributes:
        num_units: columns of ``val``.
        families: of the leaf units, in their order.
        indicator_values: of each leaf unit, the value that an indicator looks for.
        inputs: leaf units.
        factors: inputs over several variables, written to ``val`` after the leaf units.
        stages: in order of execution.
        first_unit: of each region, its first column.
        weight_off: of each region, its first weight, or -1; ``(units, products)`` row-major.
        num_weights: length of the weights.
        owner: of each column, its region, or the number of regions plus the variable of a leaf.
    """

    num_units: int
    families: tuple[Family, ...]
    indicator_values: Tensor
    inputs: InputLayer
    factors: ProductLayer
    stages: tuple[Stage, ...]
    first_unit: tuple[int, ...]
    weight_off: tuple[int, ...]
    num_weights: int
    owner: Tensor


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _block(size: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides ``size``."""
    return min(size & -size, most)


class _Compiler:
    def __init__(self, graph: RegionGraph, block: int):
        self.graph, self.block = graph, block
        self.first_unit = [-1] * len(graph.regions)
        self.weight_off = [-1] * len(graph.regions)
        self.owner: list[int] = [-1, -1]
        self.num_weights = 0
        self.tied: dict[str, int] = {}

    def run(self) -> Layered:
        families, inputs, values, leaf_units = self.leaves()
        factors = self.factor_inputs(leaf_units)
        depth = [0] * len(self.graph.regions)
        layers: dict[int, list[int]] = {}
        for i, region in enumerate(self.graph.regions):
            if region.partitions:
                depth[i] = 1 + max(depth[c] for p in region.partitions for c in p.children)
                layers.setdefault(depth[i], []).append(i)
        stages = [s for level in sorted(layers) for s in self.layer(layers[level])]
        return Layered(
            len(self.owner),
            families,
            values,
            inputs,
            factors,
            tuple(stages),
            tuple(self.first_unit),
            tuple(self.weight_off),
            self.num_weights,
            _int32(self.owner),
        )

    def leaves(self):
        """Lay the leaf units out family by family.

        Returns families, layer, indicator values, and the first column of each variable by region.
        """
        grouped: dict[tuple[object, int], list[int]] = {}
        for i, region in enumerate(self.graph.regions):
            if region.leaf is not None:
                size = region.variables.bit_count() if isinstance(region.leaf, Joint) else 1
                key = Indicator if isinstance(region.leaf, Indicator) else region.leaf
                grouped.setdefault((key, size), []).append(i)
        var: list[int] = []
        dist: list[int] = []
        row: list[int] = []
        values: list[int] = []
        columns: dict[int, list[int]] = {}
        families: list[Family] = []
        for family, ((_, size), members) in enumerate(grouped.items()):
            begin, num_rows = FIRST_LEAF + len(var), 0
            leaf = self.graph.regions[members[0]].leaf
            assert leaf is not None
            for i in members:
                region = self.graph.regions[i]
                names = variables(region.variables)[size - 1 :]
                base = num_rows if region.tie is None else self.tied.get(region.tie, num_rows)
                if region.tie is not None:
                    self.tied[region.tie] = base
                num_rows = max(num_rows, base + len(names) * region.units)
                columns[i] = [FIRST_LEAF + len(var) + k * region.units for k in range(len(names))]
                for k, v in enumerate(names):
                    var += [v] * region.units
                    dist += [family] * region.units
                    row += range(base + k * region.units, base + (k + 1) * region.units)
                    self.owner += [len(self.graph.regions) + v] * region.units
                    values += (
                        region.leaf.values
                        if isinstance(region.leaf, Indicator)
                        else [0] * region.units
                    )
            families.append(Family(leaf, begin, FIRST_LEAF + len(var), num_rows, size))
        layer = InputLayer(_int32(var), _int32(dist), _int32(row))
        return tuple(families), layer, _int32(values), columns

    def factor_inputs(self, columns: dict[int, list[int]]) -> ProductLayer:
        children: list[list[int]] = []
        for i, firsts in columns.items():
            if len(firsts) == 1:
                self.first_unit[i] = firsts[0]
                continue
            units = self.graph.regions[i].units
            self.first_unit[i] = len(self.owner)
            self.owner += [i] * units
            children += [[first + u for first in firsts] for u in range(units)]
        return _products(children)

    def layer(self, regions: list[int]) -> list[Stage]:
        """Group the regions of one depth into stages of one shape, at most four of them."""

        def shape(i: int):
            region = self.graph.regions[i]
            parts = tuple(
                (p.kind, *(self.graph.regions[c].units for c in p.children))
                if p.kind == "kronecker"
                else (p.kind, self.graph.partition_units(p))
                for p in region.partitions
            )
            return region.units, self.graph.num_products(region), parts

        bins: dict[tuple[Any, ...], list[int]] = {}
        shapes = {i: shape(i) for i in regions}
        many = len(set(shapes.values())) > _MAX_BINS
        for i in regions:
            units, width, parts = shapes[i]
            padded = 1 << (width - 1).bit_length()
            bins.setdefault((units, padded) if many else (units, width, *parts), []).append(i)
        return [
            self.stage(members, key[0], key[1], exact=not many) for key, members in bins.items()
        ]

    def stage(self, regions: list[int], units: int, width: int, exact: bool) -> Stage:
        graph, children = self.graph, list[list[int]]()
        block_m = _block(units, self.block)
        block_k = _block(width, self.block) if exact else 1
        out_off = len(self.owner)
        row_ptr, col_block, w_off, w_stride = [0], list[int](), list[int](), list[int]()
        for n, i in enumerate(regions):
            region = graph.regions[i]
            self.first_unit[i] = len(self.owner)
            self.owner += [i] * units
            columns = [u for p in region.partitions for u in self.products(p)]
            own = len(columns)
            children += columns + [[ZERO]] * (width - own)
            self.weight_off[i] = self.weights(i, units * own)
            for top in range(0, units, block_m):
                for left in range(0, width, block_k):
                    inside = left < own
                    col_block.append((n * width + left) // block_k)
                    w_off.append(self.weight_off[i] + top * own + left if inside else -1)
                    w_stride.append(own)
                row_ptr.append(len(col_block))
        shapes = {
            (p.kind, *(graph.regions[c].units for c in p.children))
            for i in regions
            for p in graph.regions[i].partitions
        }
        kron = None
        if exact and len(shapes) == 1:
            kind, n, *rest = shapes.pop()
            kron = (n, rest[0]) if kind == "kronecker" else None
        return Stage(
            tuple(regions),
            units,
            width,
            _products(children, kron),
            SumLayer(
                block_m,
                block_k,
                out_off,
                _int32(row_ptr),
                _int32(col_block),
                _int32(w_off),
                _int32(w_stride),
            ),
        )

    def products(self, partition: Partition) -> list[list[int]]:
        firsts = [self.first_unit[c] for c in partition.children]
        if partition.kind == "hadamard":
            return [[f + u for f in firsts] for u in range(self.graph.partition_units(partition))]
        a, b = (self.graph.regions[c].units for c in partition.children)
        return [[firsts[0] + u, firsts[1] + v] for u in range(a) for v in range(b)]

    def weights(self, i: int, count: int) -> int:
        tie = self.graph.regions[i].tie
        if tie is not None and tie in self.tied:
            return self.tied[tie]
        offset = self.num_weights
        self.num_weights += count
        few = self.num_weights < 2**31
        require(few, "compile_graph: graph", "fewer than 2^31 weights", "more", PCStructureError)
        if tie is not None:
            self.tied[tie] = offset
        return offset


def _products(children: list[list[int]], kron: tuple[int, int] | None = None) -> ProductLayer:
    ptr = [0]
    for c in children:
        ptr.append(ptr[-1] + len(c))
    return ProductLayer(_int32(ptr), _int32([u for c in children for u in c]), kron)


def compile_graph(graph: RegionGraph, block: int = MAX_BLOCK) -> Layered:
    """The layered form of a graph.

    Args:
        graph: any region graph.
        block: largest side of a tile, a power of two up to 128; results do not depend on it.

    Raises:
        PCStructureError: if the circuit has 2^31 weights or more.
        ValueError: if ``block`` is no such power.
    """
    powers = (1, 2, 4, 8, 16, 32, 64, 128)
    require(block in powers, "compile_graph: block", "a power of two up to 128", block)
    return _Compiler(graph, block).run()
