"""The parts of a region graph as dataclasses, and their conversion to and from untrusted JSON.

A scope is a set of variables, stored as a bitset in a Python integer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_ext._checks import require

from ._leaves import Bernoulli, Binomial, Categorical, External, Gaussian, Indicator, Leaf
from .multivariate import MultivariateGaussian

Kind = Literal["hadamard", "kronecker"]
_FAMILIES = (Categorical, Bernoulli, Binomial, Gaussian, MultivariateGaussian, Indicator, External)
FAMILIES: dict[str, type[Leaf]] = {family.__name__.lower(): family for family in _FAMILIES}
MAX_VARIABLE = 1 << 22
_MAX_SCOPE_BITS = 1 << 33


class PCStructureError(ValueError):
    """An error in the structure of a circuit; the message names the unit and the variables."""


def variables(scope: int) -> list[int]:
    """Return the variables of a scope, ascending."""
    found: list[int] = []
    while scope:
        low = scope & -scope
        found.append(low.bit_length() - 1)
        scope ^= low
    return found


def braces(scope: int) -> str:
    """Return a scope as text for messages, abbreviated after twelve variables."""
    shown = variables(scope)
    tail = ", ..." if len(shown) > 12 else ""
    return "{" + ", ".join(map(str, shown[:12])) + tail + "}"


@dataclass(frozen=True)
class Partition:
    """A product of regions.

    Attributes:
        children: Indices of the multiplied regions. Each is smaller than the index of the region
            that has the partition.
        kind: ``"hadamard"``: unit u of the product is the product of the units u of the children.
            ``"kronecker"``: the product units are all products of a unit of the first child and a
            unit of the second.
    """

    children: tuple[int, ...]
    kind: Kind = "hadamard"


@dataclass(frozen=True)
class Region:
    """A region: an input with ``leaf`` and ``variables``, or sums with ``partitions``.

    Attributes:
        units: Number of units.
        partitions: Products whose units are the terms of each sum; empty for an input.
        leaf: Family of an input.
        variables: Variables of an input, a bitset.
        tie: Name of a set of regions that share their parameters, which are the weights of sums or
            the distributions of inputs; None if they are not shared.
        name: Name for messages and pictures.
    """

    units: int
    partitions: tuple[Partition, ...] = ()
    leaf: Leaf | None = None
    variables: int = 0
    tie: str | None = None
    name: str = ""


@dataclass(frozen=True)
class Input:
    """An input region for :meth:`RegionGraph.from_edges`.

    Attributes:
        variables: Indices of the variables.
        leaf: Family of the distributions.
        units: Number of units: distributions per variable, or joint distributions.
        tie: Name of a set of input regions that share their parameters; None if they are not
            shared.
    """

    variables: Sequence[int]
    leaf: Leaf
    units: int = 1
    tie: str | None = None


# --- JSON of leaf families ------------------------------------------------------------------------
def leaf_to_json(leaf: Leaf) -> dict[str, Any]:
    """Return a leaf family as a dict for JSON; raise ValueError for families of other packages."""
    name = type(leaf).__name__.lower()
    known = FAMILIES.get(name) is type(leaf)
    require(known, "leaf", "family", f"one of {[*FAMILIES]}", type(leaf).__qualname__)
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(leaf).items()}
    return {"family": name, **fields}


def leaf_from_json(data: Any, where: str) -> Leaf:
    """Build a leaf family from an untrusted dict in the format of :func:`leaf_to_json`."""
    known = isinstance(data, dict) and data.get("family") in list(FAMILIES)
    require(known, where, "family", f"one of {[*FAMILIES]}", f"{data!r:.100}")
    family = FAMILIES[data["family"]]
    names = family.__dataclass_fields__.keys()
    same = data.keys() - {"family"} == names
    require(same, where, "leaf", f"the fields {[*names]}", f"{[*data]!r:.200}")
    values: dict[str, Any] = {}
    for name in names:
        value = data[name]
        if name == "values":
            good = isinstance(value, list) and all(_is_count(v, 0) for v in value)
            value, expected = tuple(value) if good else value, "a list of integers in [0, 2^31)"
        elif name == "min_std":
            good = type(value) in (int, float) and 0 < value < math.inf
            expected = "a positive number"
        else:
            good, expected = _is_count(value, 1), "a positive whole number below 2^31"
        require(good, where, name, expected, f"{value!r:.100}")
        values[name] = value
    return family(**values)


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**31


# --- JSON of regions ------------------------------------------------------------------------------
def regions_to_json(regions: tuple[Region, ...], multi_root: bool) -> str:
    """Return the regions as JSON text for :func:`regions_from_json`."""
    described = [
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
        for r in regions
    ]
    return json.dumps({"multi_root": multi_root, "regions": described})


def regions_from_json(data: Any, where: str) -> tuple[tuple[Region, ...], bool]:
    """Build regions and ``multi_root`` from an untrusted description parsed by ``json.loads``."""
    whole = isinstance(data, dict) and data.keys() == {"multi_root", "regions"}
    require(whole, where, "graph", "the fields multi_root and regions", f"{data!r:.100}")
    listed, multi_root = data["regions"], data["multi_root"]
    require(isinstance(listed, list), where, "regions", "a list", f"{listed!r:.100}")
    flag = isinstance(multi_root, bool)
    require(flag, where, "multi_root", "true or false", f"{multi_root!r:.100}")
    regions = tuple(_region_from_json(r, where, f"region {i}") for i, r in enumerate(listed))
    entries = sum(r.variables.bit_count() for r in regions)
    largest = max((r.variables.bit_length() for r in regions), default=0)
    fits = largest <= entries and largest * len(regions) <= _MAX_SCOPE_BITS
    expected = "an input for every variable, and scopes of at most 1 GiB"
    found = f"{largest} variables for {entries} inputs in {len(regions)} regions"
    require(fits, where, "variables", expected, found)
    return regions, multi_root


def _region_from_json(data: Any, where: str, name: str) -> Region:
    require(isinstance(data, dict), where, name, "an object", f"{data!r:.100}")
    fields = {"units", "name", "tie"}
    inner = fields | {"partitions"}
    known = data.keys() in (inner, fields | {"leaf", "variables"})
    expected = f"the fields {sorted(inner)}, or leaf and variables instead of partitions"
    require(known, where, name, expected, [*data])
    where = f"{where}: {name}"
    units, name, tie = data["units"], data["name"], data["tie"]
    require(_is_count(units, 1), where, "units", "an integer in [1, 2^31)", f"{units!r:.100}")
    require(isinstance(name, str), where, "name", "a string", f"{name!r:.80}")
    require(tie is None or isinstance(tie, str), where, "tie", "a string or null", f"{tie!r:.80}")
    if "leaf" in data:
        names = data["variables"]
        indices = isinstance(names, list) and all(
            type(v) is int and 0 <= v < MAX_VARIABLE for v in names
        )
        require(indices, where, "variables", f"indices below {MAX_VARIABLE}", f"{names!r:.100}")
        scope = 0
        for v in names:
            scope |= 1 << v
        return Region(units, (), leaf_from_json(data["leaf"], where), scope, tie, name)
    partitions: list[Partition] = []
    listed = data["partitions"]
    for p in listed if isinstance(listed, list) else [None]:
        good = (
            isinstance(p, list)
            and len(p) > 0
            and p[0] in ("hadamard", "kronecker")
            and all(type(c) is int for c in p[1:])
        )
        require(good, where, "partitions", "[kind, children...]", f"{p!r:.100}")
        assert isinstance(p, list)
        partitions.append(Partition(tuple(p[1:]), p[0]))
    return Region(units, tuple(partitions), tie=tie, name=name)
