"""Structure of a circuit: regions of variables, split into smaller regions.

A region is a set of variables with a number of units, each a function of these variables. The units
of an input region are distributions; over several variables, a product of one per variable. Any
other region has partitions, and each of its units is a weighted sum over the product units of all
of them:

* ``hadamard``: the children have equal unit counts, unit u of the product is the product of their
  units u;
* ``kronecker``: two children, unit ``u * n + v`` is the product of unit u of the first and unit v
  of the second, which has n.

With one unit everywhere a region is a sum unit and a partition a product unit: any circuit.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lora_ext.circuits.checks import PCStructureError, variables
from lora_ext.circuits.leaves import Indicator, Leaf, leaf_from_json, leaf_to_json
from lora_ext.reference.circuit import left_size

Kind = Literal["hadamard", "kronecker"]


@dataclass(frozen=True)
class Partition:
    """A product: child regions by index, and how their units are combined."""

    children: tuple[int, ...]
    kind: Kind = "hadamard"


@dataclass(frozen=True)
class Region:
    """Either ``leaf`` and ``variables`` (a bitset), or ``partitions``.

    Regions of one ``tie`` share their parameters: the weights of sums, the distributions of inputs.
    """

    units: int
    partitions: tuple[Partition, ...] = ()
    leaf: Leaf | None = None
    variables: int = 0
    tie: str | None = None
    name: str = ""


@dataclass(frozen=True)
class Input:
    """An input region of :meth:`RegionGraph.from_edges`."""

    variables: Sequence[int]
    leaf: Leaf
    units: int = 1
    tie: str | None = None


@dataclass(frozen=True)
class RegionGraph:
    """Regions, children before parents; whether it is smooth and so on is for ``checks``.

    Attributes:
        regions: all regions.
        multi_root: allow several regions that are nobody's child.
        scopes: of each region, the union of its inputs' variables, a bitset.
        roots: the regions that are nobody's child.
        num_variables: variables are ``0 .. num_variables - 1``.

    Raises:
        PCStructureError: if children do not come first, unit counts disagree, a variable is missing
            or there are several roots.
    """

    regions: tuple[Region, ...]
    multi_root: bool = False
    scopes: tuple[int, ...] = field(init=False, compare=False, repr=False)
    roots: tuple[int, ...] = field(init=False, compare=False, repr=False)
    num_variables: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        scopes: list[int] = []
        childless = [True] * len(self.regions)
        ties: dict[str, tuple[Any, ...]] = {}
        for i, region in enumerate(self.regions):
            self._check_region(i, region)
            scope = region.variables
            for p in region.partitions:
                for c in p.children:
                    scope |= scopes[c]
                    childless[c] = False
            scopes.append(scope)
            if region.tie is not None:
                shape = (
                    region.leaf,
                    region.units,
                    region.variables.bit_count(),
                    self.num_products(region),
                )
                if ties.setdefault(region.tie, shape) != shape:
                    raise PCStructureError(
                        f"unit {self.label(i)}: regions tied by {region.tie!r} must have equal "
                        f"leaves and unit counts, got {shape} and {ties[region.tie]}"
                    )
        roots = tuple(i for i, free in enumerate(childless) if free)
        if not roots:
            raise PCStructureError("a circuit needs a region")
        if len(roots) > 1 and not self.multi_root:
            raise PCStructureError(
                f"a single root is expected, got {len(roots)}: units "
                f"{', '.join(map(self.label, roots[:8]))}; multi_root=True allows several"
            )
        union = 0
        for root in roots:
            union |= scopes[root]
        missing = variables(~union & ((1 << union.bit_length()) - 1))
        if missing:
            raise PCStructureError(f"variables {missing[:12]} are in no input region")
        object.__setattr__(self, "scopes", tuple(scopes))
        object.__setattr__(self, "roots", roots)
        object.__setattr__(self, "num_variables", union.bit_length())

    def label(self, i: int) -> str:
        """How errors and pictures name a region."""
        return self.regions[i].name or str(i)

    def partition_scope(self, partition: Partition) -> int:
        """Union of the children's scopes."""
        scope = 0
        for c in partition.children:
            scope |= self.scopes[c]
        return scope

    def partition_units(self, partition: Partition) -> int:
        """Product units of one partition."""
        counts = [self.regions[c].units for c in partition.children]
        return counts[0] if partition.kind == "hadamard" else counts[0] * counts[1]

    def num_products(self, region: Region) -> int:
        """Product units over which each unit of the region sums; 0 for an input."""
        return sum(self.partition_units(p) for p in region.partitions)

    def _check_region(self, i: int, region: Region) -> None:
        where = f"unit {self.label(i)}"
        if region.units < 1:
            raise PCStructureError(f"{where}: expected at least one unit, got {region.units}")
        if (region.leaf is None) == (not region.partitions):
            raise PCStructureError(f"{where}: expected either a leaf or partitions")
        if region.leaf is not None:
            if region.variables <= 0:
                raise PCStructureError(f"{where}: an input region needs variables")
            if isinstance(region.leaf, Indicator) and len(region.leaf.values) != region.units:
                raise PCStructureError(
                    f"{where}: expected one indicator value per unit, {region.units}, "
                    f"got {len(region.leaf.values)}"
                )
        elif region.variables:
            raise PCStructureError(f"{where}: an inner region has no variables of its own")
        for p in region.partitions:
            late = [c for c in p.children if not 0 <= c < i]
            if late or not p.children:
                raise PCStructureError(f"{where}: children must come before it, got {p.children}")
            counts = {self.regions[c].units for c in p.children}
            if p.kind == "hadamard" and len(counts) > 1:
                raise PCStructureError(
                    f"{where}: a hadamard product needs equal unit counts, got "
                    f"{[self.regions[c].units for c in p.children]} of children "
                    f"{', '.join(map(self.label, p.children))}"
                )
            if p.kind == "kronecker" and len(p.children) != 2:
                raise PCStructureError(
                    f"{where}: a kronecker product needs two children, got {len(p.children)}"
                )
            if p.kind not in ("hadamard", "kronecker"):
                raise PCStructureError(f"{where}: unknown product {p.kind!r}")

    # --- builders ---------------------------------------------------------------------------------
    @staticmethod
    def cp(num_variables: int, rank: int, leaf: Leaf) -> RegionGraph:
        """A mixture of ``rank`` fully factorised distributions: one latent for all variables."""
        _require_positive("cp", num_variables=num_variables, rank=rank)
        return RegionGraph(
            (
                Region(rank, leaf=leaf, variables=(1 << num_variables) - 1, name="leaves"),
                Region(1, (Partition((0,)),), name="root"),
            )
        )

    @staticmethod
    def hmm(num_variables: int, rank: int, leaf: Leaf, homogeneous: bool = False) -> RegionGraph:
        """A hidden Markov model; ``homogeneous`` shares transitions and emissions over time."""
        _require_positive("hmm", num_variables=num_variables, rank=rank)
        return RegionGraph.hclt([t - 1 for t in range(num_variables)], rank, leaf, homogeneous)

    @staticmethod
    def hclt(
        parents: Sequence[int], rank: int, leaf: Leaf, homogeneous: bool = False
    ) -> RegionGraph:
        """A tree of latents, one per variable, each seen by its own variable.

        The region of variable v holds, per state of its parent, the distribution of all variables
        below: row s of its weights is ``p(state of v | s)``.

        Args:
            parents: of each variable, the variable above it; -1 for the one root.
            rank: states of a latent.
            leaf: family of every variable.
            homogeneous: share transitions among all edges, and leaves among all variables.

        Source: hidden Chow-Liu trees, Liu and Van den Broeck 2021.
        """
        _require_positive("hclt", rank=rank)
        below: list[list[int]] = [[] for _ in parents]
        for v, parent in enumerate(parents):
            if parent not in range(-1, len(parents)):
                raise PCStructureError(
                    f"hclt: parents must be -1 or variables 0 .. {len(parents) - 1}, got "
                    f"{parent!r} above variable {v}"
                )
            if parent >= 0:
                below[parent].append(v)
        order = [v for v, parent in enumerate(parents) if parent < 0]
        if len(order) != 1:
            raise PCStructureError(f"a tree needs one variable with parent -1, got {order}")
        for v in order:  # grows while it is read: parents first
            order += below[v]
        if len(order) != len(parents):
            lost = sorted(set(range(len(parents))) - set(order))
            raise PCStructureError(f"cyclic: variables {lost[:12]} do not hang from the root")
        regions: list[Region] = []
        region_of: dict[int, int] = {}
        for v in reversed(order):
            regions.append(
                Region(
                    rank,
                    leaf=leaf,
                    variables=1 << v,
                    tie="leaf" if homogeneous else None,
                    name=f"x{v}",
                )
            )
            children = (len(regions) - 1, *(region_of[c] for c in below[v]))
            is_root = parents[v] < 0
            region_of[v] = len(regions)
            regions.append(
                Region(
                    1 if is_root else rank,
                    (Partition(children),),
                    tie="transition" if homogeneous and not is_root else None,
                    name=f"z{v}",
                )
            )
        return RegionGraph(tuple(regions))

    @staticmethod
    def btree(num_variables: int, rank: int, leaf: Leaf) -> RegionGraph:
        """Recursive halving in variable order, the tree of ``reference.circuit_scan``."""
        _require_positive("btree", num_variables=num_variables, rank=rank)
        if num_variables == 1:
            return RegionGraph.cp(1, rank, leaf)
        regions: list[Region] = []

        def build(lo: int, hi: int, units: int) -> int:
            if hi - lo == 1:
                regions.append(Region(rank, leaf=leaf, variables=1 << lo, name=f"x{lo}"))
            else:
                middle = lo + left_size(hi - lo)
                children = (build(lo, middle, rank), build(middle, hi, rank))
                regions.append(Region(units, (Partition(children),), name=f"{lo}:{hi}"))
            return len(regions) - 1

        build(0, num_variables, 1)
        return RegionGraph(tuple(regions))

    @staticmethod
    def rat_spn(
        num_variables: int,
        depth: int,
        repetitions: int,
        num_sums: int,
        num_inputs: int,
        leaf: Leaf,
        seed: int = 0,
        num_roots: int = 1,
    ) -> RegionGraph:
        """Random binary splits to ``depth``, ``repetitions`` times, below one root.

        Source: RAT-SPN, Peharz et al. 2019.
        """
        _require_positive(
            "rat_spn",
            repetitions=repetitions,
            num_sums=num_sums,
            num_inputs=num_inputs,
            num_roots=num_roots,
        )
        rng = random.Random(seed)
        regions: list[Region] = []

        def build(names: list[int], level: int) -> int:
            if level == 0 or len(names) == 1:
                scope = sum(1 << v for v in names)
                regions.append(Region(num_inputs, leaf=leaf, variables=scope))
            else:
                regions.append(Region(num_sums, (split(names, level),)))
            return len(regions) - 1

        def split(names: list[int], level: int) -> Partition:
            names = rng.sample(names, len(names))
            half = len(names) // 2
            children = (build(names[:half], level - 1), build(names[half:], level - 1))
            return Partition(children, "kronecker")

        if depth < 1 or num_variables < 2:
            raise PCStructureError(
                f"rat_spn needs depth >= 1 and two variables, got {depth} and {num_variables}"
            )
        tops = tuple(split(list(range(num_variables)), depth) for _ in range(repetitions))
        regions.append(Region(num_roots, tops, name="root"))
        return RegionGraph(tuple(regions))

    @staticmethod
    def poon_domingos(
        height: int, width: int, num_units: int, leaf: Leaf, delta: int = 1
    ) -> RegionGraph:
        """All rectangles of an image and all their cuts at multiples of ``delta``.

        Variable ``y * width + x`` is the pixel at (y, x). A rectangle that has no cut is an input.

        Source: Poon and Domingos 2011.
        """
        _require_positive(
            "poon_domingos", height=height, width=width, num_units=num_units, delta=delta
        )
        regions: list[Region] = []
        known: dict[tuple[int, int, int, int], int] = {}

        def cuts(lo: int, hi: int) -> range:
            return range((lo // delta + 1) * delta, hi, delta)

        def rectangles() -> Iterable[tuple[int, int, int, int]]:
            rows = [*range(0, height, delta), height]
            columns = [*range(0, width, delta), width]
            spans = [
                (a, b, c, d)
                for i, a in enumerate(rows)
                for b in rows[i + 1 :]
                for j, c in enumerate(columns)
                for d in columns[j + 1 :]
            ]
            return sorted(spans, key=lambda s: (s[1] - s[0]) * (s[3] - s[2]))

        for top, bottom, left, right in rectangles():
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
                regions.append(Region(num_units, leaf=leaf, variables=scope, name=name))
                parts = [Partition((len(regions) - 1,))] if whole else []
            if parts:
                regions.append(Region(1 if whole else num_units, tuple(parts), name=name))
            known[top, bottom, left, right] = len(regions) - 1
        return RegionGraph(tuple(regions))

    @staticmethod
    def from_edges(
        inputs: Mapping[str, Input],
        products: Iterable[tuple[str, Sequence[str]] | tuple[str, Sequence[str], Kind]],
        units: Mapping[str, int] | None = None,
        ties: Mapping[str, str] | None = None,
        multi_root: bool = False,
    ) -> RegionGraph:
        """Any graph: input regions by name, and every product as (sum above it, factors, kind).

        Args:
            inputs: by name.
            products: ``(parent, children)`` or ``(parent, children, kind)``.
            units: of sums, 1 where none is given.
            ties: of sums.
            multi_root: allow several roots.

        Raises:
            PCStructureError: on a cycle, an unknown name, and all that the constructor refuses.
        """
        for name, given in inputs.items():
            if bad := [v for v in given.variables if not 0 <= v <= _MAX_VARIABLE]:
                raise PCStructureError(
                    f"unit {name}: variables must be in 0 .. {_MAX_VARIABLE}, got {bad[0]}"
                )
        parts: dict[str, list[tuple[tuple[str, ...], Kind]]] = {}
        for parent, children, *kind in products:
            if parent in inputs:
                raise PCStructureError(f"unit {parent} is an input and cannot have children")
            parts.setdefault(parent, []).append((tuple(children), kind[0] if kind else "hadamard"))
        waiting = {n: {c for kids, _ in ps for c in kids} for n, ps in parts.items()}
        unknown = {c for kids in waiting.values() for c in kids} - inputs.keys() - parts.keys()
        if unknown:
            raise PCStructureError(f"unknown children: {', '.join(sorted(unknown)[:8])}")
        above: dict[str, list[str]] = {}
        for name, kids in waiting.items():
            for c in kids:
                above.setdefault(c, []).append(name)
        order: list[str] = list(inputs)
        for name in order:  # grows while it is read
            for parent in above.get(name, ()):
                waiting[parent].discard(name)
                if not waiting[parent]:
                    order.append(parent)
        if len(order) != len(inputs) + len(parts):
            lost = sorted(set(parts) - set(order))
            raise PCStructureError(f"cyclic: units {', '.join(lost[:8])} wait for each other")
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
            regions.append(
                Region(
                    (units or {}).get(name, 1),
                    partitions,
                    tie=(ties or {}).get(name),
                    name=name,
                )
            )
        return RegionGraph(tuple(regions), multi_root)

    # --- text -------------------------------------------------------------------------------------
    def to_json(self) -> str:
        """A description that :meth:`from_json` reads."""
        regions = [
            {
                "units": r.units,
                "name": r.name,
                "tie": r.tie,
                **(
                    {"leaf": leaf_to_json(r.leaf), "variables": variables(r.variables)}
                    if r.leaf
                    else {"partitions": [[p.kind, *p.children] for p in r.partitions]}
                ),
            }
            for r in self.regions
        ]
        return json.dumps({"multi_root": self.multi_root, "regions": regions})

    @staticmethod
    def from_json(data: Any, where: str = "region graph") -> RegionGraph:
        """The graph of a parsed description, which is not trusted.

        Raises:
            ValueError: naming the region and the field.
        """
        if not isinstance(data, dict) or data.keys() != {"multi_root", "regions"}:
            raise ValueError(f"{where}: expected multi_root and regions, found {data!r:.100}")
        listed = data["regions"]
        if not isinstance(listed, list) or not isinstance(data["multi_root"], bool):
            raise ValueError(f"{where}: expected a list of regions and a flag")
        regions = [_region_from_json(r, f"{where}: region {i}") for i, r in enumerate(listed)]
        entries = sum(r.variables.bit_count() for r in regions)
        largest = max((r.variables.bit_length() for r in regions), default=0)
        if largest > entries or largest * len(regions) > _MAX_SCOPE_BITS:
            raise ValueError(
                f"{where}: {largest} variables in {entries} entries of {len(regions)} regions: "
                "expected every variable, and scopes of at most 1 GiB"
            )
        return RegionGraph(tuple(regions), data["multi_root"])

    def to_dot(self) -> str:
        """The graph in Graphviz' language; a partition is a point."""
        lines = ["digraph circuit {", "  rankdir=BT; node [fontsize=10];"]
        for i, region in enumerate(self.regions):
            shape = "box" if region.leaf else "ellipse"
            text = f"{self.label(i)}\\n{region.units} units".replace('"', "'")
            lines.append(f'  r{i} [shape={shape}, label="{text}"];')
            for n, p in enumerate(region.partitions):
                mark = "&#8855;" if p.kind == "kronecker" else "&#8857;"
                lines.append(f'  p{i}_{n} [shape=circle, width=0.2, label="{mark}"];')
                lines.append(f"  p{i}_{n} -> r{i};")
                lines += [f"  r{c} -> p{i}_{n};" for c in p.children]
        return "\n".join([*lines, "}"])


def _require_positive(builder: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise PCStructureError(f"{builder}: {name} must be at least 1, got {size}")


_MAX_VARIABLE = 1 << 22
_MAX_SCOPE_BITS = 1 << 33


def _region_from_json(data: Any, where: str) -> Region:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, found {data!r:.100}")
    fields = {"units", "name", "tie"}
    inner = fields | {"partitions"}
    if data.keys() not in (inner, fields | {"leaf", "variables"}):
        raise ValueError(
            f"{where}: expected {sorted(inner)}, or leaf and variables, found {[*data]}"
        )
    units, name, tie = data["units"], data["name"], data["tie"]
    if type(units) is not int or not 1 <= units < 2**31:
        raise ValueError(f"{where}: units: expected a positive number, found {units!r:.100}")
    if not isinstance(name, str) or not (tie is None or isinstance(tie, str)):
        raise ValueError(f"{where}: expected text as name and tie, found {name!r:.80}, {tie!r:.80}")
    if "leaf" in data:
        names = data["variables"]
        if not isinstance(names, list) or not all(
            type(v) is int and 0 <= v < _MAX_VARIABLE for v in names
        ):
            raise ValueError(f"{where}: variables: expected indices, found {names!r:.100}")
        scope = 0
        for v in names:
            scope |= 1 << v
        return Region(units, (), leaf_from_json(data["leaf"], where), scope, tie, name)
    partitions: list[Partition] = []
    listed = data["partitions"]
    for p in listed if isinstance(listed, list) else [None]:
        if (
            not isinstance(p, list)
            or not p
            or p[0] not in ("hadamard", "kronecker")
            or not all(type(c) is int for c in p[1:])
        ):
            raise ValueError(f"{where}: partitions: expected [kind, children...], found {p!r:.100}")
        partitions.append(Partition(tuple(p[1:]), p[0]))
    return Region(units, tuple(partitions), tie=tie, name=name)


def chow_liu_parents(x: Tensor, num_categories: int) -> list[int]:
    """The tree of largest total mutual information between observed variables.

    Args:
        x: ``(B, n)`` integer tensor without missing values.
        num_categories: values run over ``0 .. num_categories - 1``.

    Returns:
        Parents for :meth:`RegionGraph.hclt`; variable 0 is the root.

    Source: Chow and Liu 1968.
    """
    one_hot = torch.nn.functional.one_hot(x.long(), num_categories).double()  # (B, n, V)
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
