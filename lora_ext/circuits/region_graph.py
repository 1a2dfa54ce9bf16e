"""Structure of a circuit: regions of variables, split into smaller regions.

A region is a set of variables with a number of units. Each unit is a function of these variables.
The units of an input region are distributions. Over several variables a unit is a product of one
distribution per variable, or a joint distribution if the family is ``MultivariateGaussian``. Any
other region has partitions, and each of its units is a weighted sum over the product units of all
its partitions:

* ``hadamard``: the children have the same number of units; unit u of the product is the product of
  their units u;
* ``kronecker``: there are two children; unit ``u * n + v`` is the product of unit u of the first
  and unit v of the second, which has n units.

With one unit per region, a region is a sum unit and a partition is a product unit, so any circuit
can be described.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_ext._checks import require

from . import _regions
from ._builders import Builders
from ._leaves import Indicator
from ._regions import Partition, PCStructureError, Region, variables


@dataclass(frozen=True, repr=False)
class RegionGraph(Builders):
    """The regions of a circuit, children before parents.

    The graph does not have to be smooth or decomposable, see ``Circuit.check``.

    Attributes:
        regions: All regions.
        multi_root: Whether several regions without a parent are allowed.
        scopes: Scope of each region, a bitset: the union of the variables of the inputs below it.
        roots: Indices of the regions without a parent.
        num_variables: Number of variables, which are ``0 .. num_variables - 1``.

    Raises:
        PCStructureError: If a child does not precede its parent, the children of a product have
            numbers of units that do not match, a variable is missing, or there are several roots
            without ``multi_root``.
    """

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
            if region.tie is not None:  # Tied regions have the same family and parameter shape.
                width = region.variables.bit_count() if region.leaf else self.num_products(region)
                shape = (region.leaf, region.units, width)
                first = ties.setdefault(region.tie, shape)
                where, name = f"unit {self.label(i)}", f"tie {region.tie!r}"
                expected = f"(leaf, units, variables or terms) {first} as in the first region"
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
        """Return the name of region ``i``, or its index as text if it has no name."""
        return self.regions[i].name or str(i)

    def partition_scope(self, partition: Partition) -> int:
        """Return the union of the scopes of the children of a partition, a bitset."""
        scope = 0
        for c in partition.children:
            scope |= self.scopes[c]
        return scope

    def partition_units(self, partition: Partition) -> int:
        """Return the number of product units of a partition.

        This is the number of units of each child or, for a Kronecker product, the product of the
        two children's numbers of units.
        """
        counts = [self.regions[c].units for c in partition.children]
        return counts[0] if partition.kind == "hadamard" else counts[0] * counts[1]

    def num_products(self, region: Region) -> int:
        """Return the number of terms of each sum of a region; 0 for an input."""
        return sum(self.partition_units(p) for p in region.partitions)

    def depths(self) -> list[int]:
        """Return the length of the longest path from each region down to an input region."""
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
            check(not given, "variables", "none in a region of sums", variables(given))
        else:
            check(not region.partitions, "region", "either a leaf or partitions", "both")
            check(given > 0, "variables", "at least one variable in an input", "none")
            if isinstance(leaf, Indicator):
                found = len(leaf.values)
                check(found == region.units, "leaf", f"{region.units} values, one per unit", found)
        for p in region.partitions:
            before = bool(p.children) and all(0 <= c < i for c in p.children)
            check(before, "children", f"regions before region {i}", p.children)
            check(p.kind in ("hadamard", "kronecker"), "kind", "hadamard or kronecker", p.kind)
            if p.kind == "kronecker":
                number = len(p.children)
                check(number == 2, "children", "two children in a kronecker product", number)
            else:
                counts = {self.label(c): self.regions[c].units for c in p.children}
                equal = len(set(counts.values())) == 1
                check(equal, "children", "equal unit counts in a hadamard product", counts)

    # --- conversion to text, JSON and Graphviz ----------------------------------------------------
    def __repr__(self) -> str:
        return f"RegionGraph({', '.join(self.counts())})"

    def counts(self) -> list[str]:
        """Return a summary of the graph as a list of strings, such as "3 variables".

        The strings contain the numbers of variables, inputs, regions of sums, partitions, layers
        and root units, and the families of the leaves.
        """
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
        """Return the graph as JSON text; :meth:`from_json` reads the parsed text."""
        return _regions.regions_to_json(self.regions, self.multi_root)

    @staticmethod
    def from_json(data: Any, where: str = "region graph") -> RegionGraph:
        """Build a graph from an untrusted description that has been parsed.

        Args:
            data: Result of :meth:`to_json`, parsed by ``json.loads``.
            where: Prefix of error messages.

        Raises:
            ValueError: If the description is invalid; the message names the field and its region.
        """
        return RegionGraph(*_regions.regions_from_json(data, where))

    def to_dot(self) -> str:
        """Return the graph in the Graphviz language; circles are partitions."""
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
