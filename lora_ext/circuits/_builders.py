"""Builders of the regions of well-known circuits."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_ext._checks import require
from lora_ext.reference import left_size

from ._leaves import Leaf
from ._regions import MAX_VARIABLE, Input, Kind, Partition, PCStructureError, Region, variables

if TYPE_CHECKING:
    from typing_extensions import Self

Regions = tuple[Region, ...]
# Leaf family of all variables, or a list with one family per variable.
Leaves = Leaf | Sequence[Leaf]


def _checked_leaves(builder: str, leaf: Leaves, count: int, /, **sizes: int) -> list[Leaf]:
    """Check the sizes and the number of leaf families; return one family per variable."""
    for name, size in sizes.items():
        require(size >= 1, builder, name, "at least 1", size, PCStructureError)
    if isinstance(leaf, Leaf):
        return [leaf] * count
    expected = f"one family, or one for each of {count} variables"
    found = len(leaf)
    require(found == count, builder, "leaf", expected, found, PCStructureError)
    return list(leaf)


def _inputs(units: int, leaves: Sequence[Leaf], scope: int, name: str = "") -> list[Region]:
    """Return one input region for each leaf family among the variables of a scope."""
    families: dict[Leaf, int] = {}
    for v in variables(scope):
        families[leaves[v]] = families.get(leaves[v], 0) | 1 << v
    return [Region(units, leaf=leaf, variables=s, name=name) for leaf, s in families.items()]


def _add_input(
    regions: list[Region], units: int, leaves: Sequence[Leaf], scope: int, name: str = ""
) -> int:
    """Append the input regions of a scope to ``regions``; return the index of the last region.

    If the variables have several families, the last region is a region of sums over the product of
    these inputs.
    """
    inputs = _inputs(units, leaves, scope, name)
    regions += inputs
    if len(inputs) > 1:
        children = tuple(range(len(regions) - len(inputs), len(regions)))
        regions.append(Region(units, (Partition(children),), name=name))
    return len(regions) - 1


def _children_first(
    inputs: Mapping[str, Input], parts: Mapping[str, list[tuple[tuple[str, ...], Kind]]]
) -> list[str]:
    """Return the names of all regions, each after the names of its children."""
    below = {name: [c for kids, _ in ps for c in kids] for name, ps in parts.items()}
    unknown = {c for kids in below.values() for c in kids} - inputs.keys() - parts.keys()
    where, expected = "from_edges", "children that are inputs or sums"
    found = f"unknown children: {', '.join(sorted(unknown)[:8])}"
    require(not unknown, where, "products", expected, found, PCStructureError)
    sorter = TopologicalSorter({**dict.fromkeys(inputs, ()), **below})
    try:
        return list(sorter.static_order())
    except CycleError as error:
        lost = ", ".join(sorted(set(error.args[1]))[:8])
        found = f"a cycle of units {lost}"
        raise PCStructureError(f"{where}: products: expected no cycle, found {found}") from None


@dataclass(frozen=True)
class Builders:
    """Base class of ``RegionGraph`` with its regions and the builders of well-known circuits.

    Children precede their parents. ``RegionGraph`` adds the checks. In the builders, ``leaf`` is
    one family for all variables, or a list with one family per variable.
    """

    regions: Regions
    multi_root: bool = False

    @classmethod
    def cp(cls, num_variables: int, rank: int, leaf: Leaves) -> Self:
        """Build a mixture of ``rank`` fully factorised distributions.

        Args:
            num_variables: Number of variables.
            rank: Number of components of the mixture.
            leaf: Family of all variables, or a list with one family per variable.

        Raises:
            PCStructureError: If a size is below 1, or the number of families is wrong.
        """
        leaves = _checked_leaves("cp", leaf, num_variables, num_variables=num_variables, rank=rank)
        inputs = _inputs(rank, leaves, (1 << num_variables) - 1, "leaves")
        root = Region(1, (Partition(tuple(range(len(inputs)))),), name="root")
        return cls((*inputs, root))

    @classmethod
    def hmm(cls, num_variables: int, rank: int, leaf: Leaves, homogeneous: bool = False) -> Self:
        """Build a hidden Markov model over ``num_variables`` steps with ``rank`` states.

        Args:
            num_variables: Number of steps.
            rank: Number of states.
            leaf: Family of all emissions, or a list with one family per step.
            homogeneous: Whether all steps share one transition matrix and one set of emissions.

        Raises:
            PCStructureError: See :meth:`hclt`.
        """
        leaves = _checked_leaves("hmm", leaf, num_variables, num_variables=num_variables, rank=rank)
        return cls.hclt([t - 1 for t in range(num_variables)], rank, leaves, homogeneous)

    @classmethod
    def hclt(
        cls, parents: Sequence[int], rank: int, leaf: Leaves, homogeneous: bool = False
    ) -> Self:
        """Build a hidden Chow-Liu tree: a tree of latent variables, each of which emits a variable.

        The region of sums of variable v has one unit per state s of the latent of v's parent. Unit
        s is the distribution of v and of all variables below v given s, and row s of the region's
        weights is ``p(state of v's latent | s)``.

        Args:
            parents: Parent of each variable, -1 for the root.
            rank: Number of states of a latent.
            leaf: Family of all variables, or a list with one family per variable.
            homogeneous: Whether all edges share one transition matrix, and all variables share
                their leaves.

        Raises:
            PCStructureError: If ``parents`` is not a tree, ``rank`` is below 1, the number of
                families is wrong, or a homogeneous circuit has several families.

        Source: Liu and Van den Broeck 2021.
        """
        leaves = _checked_leaves("hclt", leaf, len(parents), rank=rank)
        expected, found = "one family, because the circuit is homogeneous", len(set(leaves))
        one = not homogeneous or found <= 1
        require(one, "hclt", "leaf", expected, found, PCStructureError)
        below: list[list[int]] = [[] for _ in parents]
        expected = f"-1 or a variable in 0 .. {len(parents) - 1}"
        for v, parent in enumerate(parents):
            known, found = parent in range(-1, len(parents)), repr(parent)
            require(known, "hclt", f"parents[{v}]", expected, found, PCStructureError)
            if parent >= 0:
                below[parent].append(v)
        order = [v for v, parent in enumerate(parents) if parent < 0]
        one, found = len(order) == 1, f"{len(order)}: {order[:12]}"
        require(one, "hclt", "parents", "one variable with parent -1", found, PCStructureError)
        for v in order:  # The loop appends the children of each variable.
            order += below[v]
        lost = sorted(set(range(len(parents))) - set(order))
        found = f"a cycle: variables {lost[:12]} are not connected to the root"
        require(not lost, "hclt", "parents", "a tree", found, PCStructureError)
        regions: list[Region] = []
        latent_of: dict[int, int] = {}
        for v in reversed(order):
            tie = "leaf" if homogeneous else None
            regions.append(Region(rank, leaf=leaves[v], variables=1 << v, tie=tie, name=f"x{v}"))
            children = (len(regions) - 1, *(latent_of[c] for c in below[v]))
            is_root = parents[v] < 0
            latent_of[v] = len(regions)
            tie = "transition" if homogeneous and not is_root else None
            units = 1 if is_root else rank
            regions.append(Region(units, (Partition(children),), tie=tie, name=f"z{v}"))
        return cls(tuple(regions))

    @classmethod
    def btree(cls, num_variables: int, rank: int, leaf: Leaves) -> Self:
        """Build the balanced binary tree of ``reference.circuit_scan`` over the variables in order.

        Args:
            num_variables: Number of variables.
            rank: Number of units of every region except the root, which has one.
            leaf: Family of all variables, or a list with one family per variable.

        Raises:
            PCStructureError: If a size is below 1, or the number of families is wrong.
        """
        sizes = {"num_variables": num_variables, "rank": rank}
        leaves = _checked_leaves("btree", leaf, num_variables, **sizes)
        if num_variables == 1:
            return cls.cp(1, rank, leaves)
        regions: list[Region] = []

        def build(lo: int, hi: int, units: int) -> int:
            if hi - lo == 1:
                regions.append(Region(rank, leaf=leaves[lo], variables=1 << lo, name=f"x{lo}"))
            else:
                middle = lo + left_size(hi - lo)
                children = (build(lo, middle, rank), build(middle, hi, rank))
                regions.append(Region(units, (Partition(children),), name=f"{lo}:{hi}"))
            return len(regions) - 1

        build(0, num_variables, 1)
        return cls(tuple(regions))

    @classmethod
    def rat_spn(
        cls,
        num_variables: int,
        depth: int,
        repetitions: int,
        num_sums: int,
        num_inputs: int,
        leaf: Leaves,
        seed: int = 0,
        num_roots: int = 1,
    ) -> Self:
        """Build a RAT-SPN: a mixture of trees, each of which halves the variables at random.

        Args:
            num_variables: Number of variables, at least 2.
            depth: Depth of each tree.
            repetitions: Number of trees.
            num_sums: Number of units of a region of sums.
            num_inputs: Number of units of an input region.
            leaf: Family of all variables, or a list with one family per variable.
            seed: Seed of the random splits.
            num_roots: Number of root units, such as one per class.

        Raises:
            PCStructureError: If a size is out of range, or the number of families is wrong.

        Source: Peharz et al. 2019.
        """
        sizes = {"depth": depth, "repetitions": repetitions, "num_sums": num_sums}
        sizes |= {"num_inputs": num_inputs, "num_roots": num_roots}
        found = num_variables
        require(found >= 2, "rat_spn", "num_variables", "at least 2", found, PCStructureError)
        leaves = _checked_leaves("rat_spn", leaf, num_variables, **sizes)
        rng = random.Random(seed)
        regions: list[Region] = []

        def build(names: list[int], level: int) -> int:
            if level == 0 or len(names) == 1:
                return _add_input(regions, num_inputs, leaves, sum(1 << v for v in names))
            regions.append(Region(num_sums, (split(names, level),)))
            return len(regions) - 1

        def split(names: list[int], level: int) -> Partition:
            names = rng.sample(names, len(names))
            half = len(names) // 2
            children = (build(names[:half], level - 1), build(names[half:], level - 1))
            return Partition(children, "kronecker")

        tops = tuple(split(list(range(num_variables)), depth) for _ in range(repetitions))
        regions.append(Region(num_roots, tops, name="root"))
        return cls(tuple(regions))

    @classmethod
    def poon_domingos(
        cls, height: int, width: int, num_units: int, leaf: Leaves, delta: int = 1
    ) -> Self:
        """Build one region per rectangle of an image, cut at all multiples of ``delta`` pixels.

        Variable ``y * width + x`` is the pixel at (y, x). Rectangles without a cut are inputs.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            num_units: Number of units of every rectangle except the whole image, which has one.
            leaf: Family of all pixels, or a list with one family per pixel.
            delta: Distance between neighbouring cuts in pixels.

        Raises:
            PCStructureError: If a size is below 1, or the number of families is wrong.

        Source: Poon and Domingos 2011.
        """
        sizes = {"height": height, "width": width, "num_units": num_units, "delta": delta}
        leaves = _checked_leaves("poon_domingos", leaf, height * width, **sizes)
        regions: list[Region] = []
        known: dict[tuple[int, int, int, int], int] = {}

        def cuts(lo: int, hi: int) -> range:
            return range((lo // delta + 1) * delta, hi, delta)

        rows, columns = [*range(0, height, delta), height], [*range(0, width, delta), width]
        rectangles = [(*y, *x) for y in combinations(rows, 2) for x in combinations(columns, 2)]
        rectangles.sort(key=lambda r: (r[1] - r[0]) * (r[3] - r[2]))
        for top, bottom, left, right in rectangles:
            parts = [
                Partition((known[top, y, left, right], known[y, bottom, left, right]))
                for y in cuts(top, bottom)
            ] + [
                Partition((known[top, bottom, left, x], known[top, bottom, x, right]))
                for x in cuts(left, right)
            ]
            name = f"{top}:{bottom},{left}:{right}"
            whole = (bottom - top, right - left) == (height, width)
            if not parts:
                row = ((1 << (right - left)) - 1) << left
                scope = sum(row << (y * width) for y in range(top, bottom))
                inputs = _add_input(regions, num_units, leaves, scope, name)
                parts = [Partition((inputs,))] if whole else []
            if parts:
                regions.append(Region(1 if whole else num_units, tuple(parts), name=name))
            known[top, bottom, left, right] = len(regions) - 1
        return cls(tuple(regions))

    @classmethod
    def join(cls, graphs: Sequence[Builders]) -> Self:
        """Join graphs over the same variables, such as one per class; keep the roots of all.

        The graphs share no parameters. Region ``name`` of graph i is renamed to ``i/name``.
        """
        require(len(graphs) > 0, "join", "graphs", "at least one", "none", PCStructureError)
        joined: list[Region] = []
        for number, regions in enumerate(g.regions for g in graphs):
            first = len(joined)
            for region in regions:
                partitions = tuple(
                    replace(p, children=tuple(first + c for c in p.children))
                    for p in region.partitions
                )
                tie = None if region.tie is None else f"{number}/{region.tie}"
                name = region.name and f"{number}/{region.name}"
                joined.append(replace(region, partitions=partitions, tie=tie, name=name))
        return cls(tuple(joined), multi_root=True)

    @classmethod
    def from_edges(
        cls,
        inputs: Mapping[str, Input],
        products: Iterable[tuple[str, Sequence[str]] | tuple[str, Sequence[str], Kind]],
        units: Mapping[str, int] | None = None,
        ties: Mapping[str, str] | None = None,
        multi_root: bool = False,
    ) -> Self:
        """Build any graph from named input regions and a list of products.

        Args:
            inputs: Input regions by name.
            products: Products as tuples ``(parent, children)`` or ``(parent, children, kind)``.
                ``children`` are names of regions. ``parent`` is the name of the region of sums of
                which the product is a term.
            units: Number of units of each region of sums by name, 1 by default.
            ties: Tie of each region of sums by name. Regions with the same tie share their weights.
            multi_root: Whether several roots are allowed.

        Raises:
            PCStructureError: If there is a cycle or an unknown name, or if :class:`RegionGraph`
                raises it.
        """
        for name, given in inputs.items():
            wrong = [v for v in given.variables if not 0 <= v <= MAX_VARIABLE]
            where, expected = f"unit {name}", f"0 .. {MAX_VARIABLE}"
            require(not wrong, where, "variables", expected, wrong[:1], PCStructureError)
        units, ties = units or {}, ties or {}
        parts: dict[str, list[tuple[tuple[str, ...], Kind]]] = {}
        for parent, children, *kind in products:
            where, found = f"unit {parent}", "an input with children"
            require(parent not in inputs, "from_edges", where, "a sum", found, PCStructureError)
            parts.setdefault(parent, []).append((tuple(children), kind[0] if kind else "hadamard"))
        order = _children_first(inputs, parts)
        index = {name: i for i, name in enumerate(order)}
        regions: list[Region] = []
        for name in order:
            if name in inputs:
                given = inputs[name]
                scope = sum(1 << v for v in set(given.variables))
                regions.append(Region(given.units, (), given.leaf, scope, tie=given.tie, name=name))
                continue
            partitions = tuple(
                Partition(tuple(index[c] for c in kids), kind) for kids, kind in parts[name]
            )
            regions.append(Region(units.get(name, 1), partitions, tie=ties.get(name), name=name))
        return cls(tuple(regions), multi_root)


def chow_liu_parents(x: Tensor, num_categories: int) -> list[int]:
    """Find the tree with the largest total mutual information between neighbouring variables.

    Args:
        x: Integer tensor ``(B, n)`` of B rows and n variables without missing values.
        num_categories: Number of values ``0 .. num_categories - 1``.

    Returns:
        Parent of each variable, for ``RegionGraph.hclt``. Variable 0 is the root.

    Raises:
        ValueError: If ``x`` is not a tensor, not integer, not ``(B, n)``, empty or out of range.

    Source: Chow and Liu 1968.
    """
    where = "chow_liu_parents"
    remedy = f"{type(x).__module__}.{type(x).__name__}; convert it with torch.as_tensor(x)"
    require(isinstance(x, Tensor), where, "x", "a tensor", remedy)
    remedy = f"{x.dtype}; bin real numbers first, or call x.long() if all numbers are whole"
    require(not x.is_floating_point() and not x.is_complex(), where, "x", "integers", remedy)
    require(x.dim() == 2 and x.numel() > 0, where, "x", "a non-empty shape (B, n)", tuple(x.shape))
    x = x.long()
    low, high = int(x.min()), int(x.max())
    expected = f"values in 0 .. {num_categories - 1} without missing values"
    require(low >= 0 and high < num_categories, where, "x", expected, f"{low} .. {high}")
    one_hot = torch.nn.functional.one_hot(x, num_categories).double()  # (B, n, V)
    joint = torch.einsum("bnv,bmw->nmvw", one_hot, one_hot) / len(x)
    single = one_hot.mean(0)
    independent = single[:, None, :, None] * single[None, :, None, :]
    information = torch.xlogy(joint, joint) - torch.xlogy(joint, independent)
    gain = information.sum((2, 3))
    n = gain.shape[0]
    parents, best, link = [-1] * n, [-math.inf] * n, [0] * n
    outside, last = set(range(1, n)), 0
    while outside:
        for v in outside:
            if gain[last, v] > best[v]:
                best[v], link[v] = float(gain[last, v]), last
        last = max(sorted(outside), key=lambda v: best[v])
        parents[last] = link[last]
        outside.remove(last)
    return parents
