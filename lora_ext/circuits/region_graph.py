"""Structure of a circuit: regions of variables, split into smaller regions.

A region is a set of variables with a number of units, each a function of these variables. The units
of an input region are distributions; over several variables, a product of one per variable, or one
for all of them if the family is ``MultivariateGaussian``. Any other region has partitions, and each
of its units is a weighted sum over the product units of all of them:

* ``hadamard``: the children have equal unit counts, unit u of the product is the product of their
  units u;
* ``kronecker``: two children, unit ``u * n + v`` is the product of unit u of the first and unit v
  of the second, which has n.

With one unit everywhere a region is a sum unit and a partition a product unit: any circuit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_ext._checks import require

from . import _builders, _regions
from ._builders import Leaves
from ._leaves import Indicator
from ._regions import Input, Kind, Partition, Region
from ._scopes import PCStructureError, variables


@dataclass(frozen=True, repr=False)
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
    scopes: tuple[int, ...] = field(init=False, compare=False)
    roots: tuple[int, ...] = field(init=False, compare=False)
    num_variables: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        scopes: list[int] = []
        parentless = [True] * len(self.regions)
        ties: dict[str, tuple[Any, ...]] = {}
        for i, region in enumerate(self.regions):
            self._check_region(i, region)
            scope = region.variables
            for p in region.partitions:
                for c in p.children:
                    scope |= scopes[c]
                    parentless[c] = False
            scopes.append(scope)
            if region.tie is not None:  # its regions have parameters of one shape and meaning
                width = region.variables.bit_count() if region.leaf else self.num_products(region)
                shape = (region.leaf, region.units, width)
                first = ties.setdefault(region.tie, shape)
                where, name = f"unit {self.label(i)}", f"tie {region.tie!r}"
                expected = f"leaf, units and width of the regions tied to it, {first}"
                require(shape == first, where, name, expected, shape, PCStructureError)
        roots = tuple(i for i, free in enumerate(parentless) if free)
        require(bool(roots), "RegionGraph", "regions", "at least one", "none", PCStructureError)
        single = len(roots) == 1 or self.multi_root
        expected = "a single root (multi_root=True allows several)"
        found = f"{len(roots)}: units {', '.join(map(self.label, roots[:8]))}"
        require(single, "RegionGraph", "regions", expected, found, PCStructureError)
        union = 0
        for root in roots:
            union |= scopes[root]
        missing = variables(~union & ((1 << union.bit_length()) - 1))
        expected = f"all variables 0 .. {union.bit_length() - 1}"
        found = f"variables {missing[:12]} in no input region"
        require(not missing, "RegionGraph", "regions", expected, found, PCStructureError)
        object.__setattr__(self, "scopes", tuple(scopes))
        object.__setattr__(self, "roots", roots)
        object.__setattr__(self, "num_variables", union.bit_length())

    def label(self, i: int) -> str:
        """Name region ``i`` as errors and pictures do: its own name, or its index."""
        return self.regions[i].name or str(i)

    def partition_scope(self, partition: Partition) -> int:
        """Return the union of the scopes of the children of ``partition``, a bitset of
        variables."""
        scope = 0
        for c in partition.children:
            scope |= self.scopes[c]
        return scope

    def partition_units(self, partition: Partition) -> int:
        """Return how many product units a partition has: those of a child, or of a Kronecker
        product n times m."""
        counts = [self.regions[c].units for c in partition.children]
        return counts[0] if partition.kind == "hadamard" else counts[0] * counts[1]

    def num_products(self, region: Region) -> int:
        """Return how many product units each unit of a region sums over; 0 for an input."""
        return sum(self.partition_units(p) for p in region.partitions)

    def depths(self) -> list[int]:
        """Return the longest distance of each region from the inputs, which have 0."""
        found: list[int] = []
        for region in self.regions:
            below = (found[c] for p in region.partitions for c in p.children)
            found.append(1 + max(below, default=-1))
        return found

    def _check_region(self, i: int, region: Region) -> None:
        where = f"unit {self.label(i)}"

        def check(ok: bool, argument: str, expected: object, found: object) -> None:
            require(ok, where, argument, expected, found, PCStructureError)

        leaf, given = region.leaf, region.variables
        check(region.units >= 1, "units", "at least 1", region.units)
        if leaf is None:
            check(bool(region.partitions), "region", "either a leaf or partitions", "neither")
            check(not given, "variables", "none of its own beside partitions", variables(given))
        else:
            check(not region.partitions, "region", "either a leaf or partitions", "both")
            check(given > 0, "variables", "at least one of an input", "none")
            if isinstance(leaf, Indicator):
                found = len(leaf.values)
                check(found == region.units, "leaf", f"{region.units} values, one per unit", found)
        for p in region.partitions:
            before = bool(p.children) and all(0 <= c < i for c in p.children)
            check(before, "children", "regions that come before it", p.children)
            check(p.kind in ("hadamard", "kronecker"), "kind", "hadamard or kronecker", p.kind)
            if p.kind == "kronecker":
                number = len(p.children)
                check(number == 2, "children", "two of a kronecker product", number)
            else:
                counts = {self.label(c): self.regions[c].units for c in p.children}
                equal = len(set(counts.values())) == 1
                check(equal, "children", "equal unit counts in a hadamard product", counts)

    # --- builders: `leaf` is one family for all variables, or a list of one for each -------------
    @staticmethod
    def cp(num_variables: int, rank: int, leaf: Leaves) -> RegionGraph:
        """Build a mixture of ``rank`` fully factorised distributions: one latent for all variables.

        Args:
            num_variables: n. rank: states of the latent.
            leaf: the family of every variable, or one for each.

        Raises:
            PCStructureError: a size below 1, another number of families.
        """
        return RegionGraph(_builders.cp(num_variables, rank, leaf))

    @staticmethod
    def hmm(num_variables: int, rank: int, leaf: Leaves, homogeneous: bool = False) -> RegionGraph:
        """Build a hidden Markov model over ``num_variables`` steps with ``rank`` states.

        Args:
            num_variables, rank: above. leaf: the emissions' family, or one for each step.
            homogeneous: transitions, and emissions, are shared by all steps.

        Raises:
            PCStructureError: as :meth:`hclt`.
        """
        return RegionGraph(_builders.hmm(num_variables, rank, leaf, homogeneous))

    @staticmethod
    def hclt(
        parents: Sequence[int], rank: int, leaf: Leaves, homogeneous: bool = False
    ) -> RegionGraph:
        """Build a tree of latents, one per variable, each seen by its own variable.

        The region of variable v holds, per state of its parent, the distribution of all variables
        below: row s of its weights is ``p(state of v | s)``.

        Args:
            parents: of each variable, the variable above it; -1 for the one root.
            rank: states of a latent.
            leaf: family of every variable, or one for each.
            homogeneous: share transitions among all edges, and leaves among all variables.

        Source: hidden Chow-Liu trees, Liu and Van den Broeck 2021.
        """
        return RegionGraph(_builders.hclt(parents, rank, leaf, homogeneous))

    @staticmethod
    def btree(num_variables: int, rank: int, leaf: Leaves) -> RegionGraph:
        """Build the tree of ``reference.circuit_scan``: variables in their order, halved again and
        again.

        Args:
            num_variables: n. rank: units of every region but the root.
            leaf: the family of every variable, or one for each.

        Raises:
            PCStructureError: a size below 1, another number of families.
        """
        return RegionGraph(_builders.btree(num_variables, rank, leaf))

    @staticmethod
    def rat_spn(
        num_variables: int,
        depth: int,
        repetitions: int,
        num_sums: int,
        num_inputs: int,
        leaf: Leaves,
        seed: int = 0,
        num_roots: int = 1,
    ) -> RegionGraph:
        """Split the variables at random into halves to ``depth``, ``repetitions`` times, below
        common roots.

        Args:
            num_variables: n, at least 2. depth: of a repetition's tree. repetitions: trees.
            num_sums: units of a region of sums. num_inputs: units of an input region.
            leaf: the family of every variable, or one for each.
            seed: of the splits. num_roots: root units, one per class, say.

        Raises:
            PCStructureError: a size out of range, another number of families.

        Source: RAT-SPN, Peharz et al. 2019.
        """
        sizes = (num_variables, depth, repetitions, num_sums, num_inputs)
        return RegionGraph(_builders.rat_spn(*sizes, leaf, seed, num_roots))

    @staticmethod
    def poon_domingos(
        height: int, width: int, num_units: int, leaf: Leaves, delta: int = 1
    ) -> RegionGraph:
        """Build all rectangles of an image, and all their cuts at multiples of ``delta``.

        Variable ``y * width + x`` is the pixel at (y, x). A rectangle that has no cut is an input.

        Args:
            height, width: of the image, in pixels. num_units: of every rectangle but the whole
                image.
            leaf: the family of every pixel, or one for each. delta: of the cuts, in pixels.

        Raises:
            PCStructureError: a size below 1, another number of families.

        Source: Poon and Domingos 2011.
        """
        return RegionGraph(_builders.poon_domingos(height, width, num_units, leaf, delta))

    @staticmethod
    def join(graphs: Sequence[RegionGraph]) -> RegionGraph:
        """Join several graphs over the same variables into one of several roots, such as one per
        class.

        They share no parameters. Region ``name`` of graph i is ``i/name``.
        """
        return RegionGraph(_builders.join([g.regions for g in graphs]), multi_root=True)

    @staticmethod
    def from_edges(
        inputs: Mapping[str, Input],
        products: Iterable[tuple[str, Sequence[str]] | tuple[str, Sequence[str], Kind]],
        units: Mapping[str, int] | None = None,
        ties: Mapping[str, str] | None = None,
        multi_root: bool = False,
    ) -> RegionGraph:
        """Build any graph: input regions by name, and every product as (sum above it, factors,
        kind).

        Args:
            inputs: by name.
            products: ``(parent, children)`` or ``(parent, children, kind)``.
            units: of sums, 1 where none is given.
            ties: of sums.
            multi_root: allow several roots.

        Raises:
            PCStructureError: on a cycle, an unknown name, and all that the constructor refuses.
        """
        regions = _builders.from_edges(inputs, products, units or {}, ties or {})
        return RegionGraph(regions, multi_root)

    # --- text -------------------------------------------------------------------------------------
    def __repr__(self) -> str:
        return f"RegionGraph({', '.join(self.counts())})"

    def counts(self) -> list[str]:
        """Return what there is, in words: variables, inputs, sums, partitions, layers, roots,
        families."""
        inputs = sum(r.leaf is not None for r in self.regions)
        partitions = sum(len(r.partitions) for r in self.regions)
        families = list(dict.fromkeys(repr(r.leaf) for r in self.regions if r.leaf is not None))
        more = f" and {len(families) - 3} more" if len(families) > 3 else ""
        roots = sum(self.regions[r].units for r in self.roots)
        numbers = [
            (self.num_variables, "variable", "variables"),
            (inputs, "input", "inputs"),
            (len(self.regions) - inputs, "region of sums", "regions of sums"),
            (partitions, "partition", "partitions"),
            (1 + max(self.depths()), "layer", "layers"),
            (roots, "root unit", "root units"),
        ]
        words = [f"{n} {one if n == 1 else many}" for n, one, many in numbers]
        return [*words, f"leaves {', '.join(families[:3])}{more}"]

    def to_json(self) -> str:
        """Return a description that :meth:`from_json` reads."""
        return _regions.regions_to_json(self.regions, self.multi_root)

    @staticmethod
    def from_json(data: Any, where: str = "region graph") -> RegionGraph:
        """Read the graph of a parsed description, which is not trusted.

        Args:
            data: what ``json.loads`` made of :meth:`to_json`'s text. where: opens the message of an
                error.

        Raises:
            ValueError: naming the region and the field.
        """
        return RegionGraph(*_regions.regions_from_json(data, where))

    def to_dot(self) -> str:
        """Return the graph in Graphviz' language; a partition is a point."""
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
