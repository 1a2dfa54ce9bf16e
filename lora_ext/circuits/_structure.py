"""What the structure of a circuit promises: smooth, decomposable, deterministic, and so on.

Scopes are bitsets in Python integers, so each check costs one pass over the edges.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Literal

from ._leaves import Indicator
from ._scopes import PCStructureError, braces, variables
from .region_graph import RegionGraph

Truth = Literal[True, False, "unknown"]


def check_smooth(graph: RegionGraph) -> None:
    """Every term of a sum has the scope of the sum."""
    for i, region in enumerate(graph.regions):
        scopes = [graph.partition_scope(p) for p in region.partitions]
        for scope in scopes[1:]:
            if scope != scopes[0]:
                raise PCStructureError(
                    f"not smooth: sum unit {graph.label(i)} mixes scopes {braces(scopes[0])} "
                    f"and {braces(scope)}"
                )


def check_decomposable(graph: RegionGraph) -> None:
    """The factors of a product share no variable."""
    for i, region in enumerate(graph.regions):
        for p in region.partitions:
            seen = 0
            for n, child in enumerate(p.children):
                shared = seen & graph.scopes[child]
                if shared:
                    other = next(c for c in p.children[:n] if graph.scopes[c] & shared)
                    raise PCStructureError(
                        f"not decomposable: a product of unit {graph.label(i)}: children "
                        f"{graph.label(other)} and {graph.label(child)} share {braces(shared)}"
                    )
                seen |= graph.scopes[child]


def passes(check: Callable[[RegionGraph], None], graph: RegionGraph) -> bool:
    """Return whether a graph passes one of the checks above."""
    try:
        check(graph)
    except PCStructureError:
        return False
    return True


def is_structured_decomposable(graph: RegionGraph) -> bool:
    """Whether all products split a scope in the same way: they then agree with one vtree."""
    if not passes(check_decomposable, graph):
        return False
    split: dict[int, frozenset[int]] = {}
    for region in graph.regions:
        for p in region.partitions:
            if len(p.children) == 1:
                continue
            parts = frozenset(graph.scopes[c] for c in p.children)
            if split.setdefault(graph.partition_scope(p), parts) != parts:
                return False
    return True


def is_deterministic(graph: RegionGraph) -> Truth:
    """Whether at most one term of each sum is nonzero on any input.

    A syntactic test. True: the terms of every sum differ in an indicator on a common variable.
    False: two terms of a sum are positive everywhere. Anything else is ``"unknown"``.
    """
    # For each unit, the variables that it restricts and the values that it allows, as a bitset.
    units: list[list[dict[int, int]]] = []
    verdict: Truth = True
    for region in graph.regions:
        if region.leaf is not None:
            allowed: list[dict[int, int]] = [{} for _ in range(region.units)]
            if isinstance(region.leaf, Indicator):
                for u, value in enumerate(region.leaf.values):
                    allowed[u] = {v: 1 << value for v in variables(region.variables)}
            units.append(allowed)
            continue
        terms: list[dict[int, int]] = []
        for p in region.partitions:
            children = [units[c] for c in p.children]
            if p.kind == "hadamard":
                terms += [_jointly(*parts) for parts in zip(*children, strict=True)]
            else:
                terms += [_jointly(a, b) for a in children[0] for b in children[1]]
        if sum(not t for t in terms) > 1:
            return False
        common = set.intersection(*map(set, terms))
        merged = {v: reduce(or_, (t[v] for t in terms)) for v in common}
        if not _disjoint(terms, merged):
            verdict = "unknown"
        # All units of a region weigh the same terms, so they allow the same values.
        units.append([merged] * region.units)
    return verdict


def _jointly(*parts: dict[int, int]) -> dict[int, int]:
    joint: dict[int, int] = {}
    for part in parts:
        for v, values in part.items():
            joint[v] = joint.get(v, values) & values
    return joint


def _disjoint(terms: list[dict[int, int]], merged: dict[int, int]) -> bool:
    """One variable tells all terms apart, or, among few, each pair has one that does; ``merged`` is
    what they allow of the variables that all of them restrict."""
    if any(sum(t[v].bit_count() for t in terms) == m.bit_count() for v, m in merged.items()):
        return True
    return len(terms) <= 64 and all(
        any(a[v] & b[v] == 0 for v in a.keys() & b.keys())
        for i, a in enumerate(terms)
        for b in terms[:i]
    )


def check_tractable(graph: RegionGraph, where: str) -> None:
    """Refuse a graph that is not smooth and decomposable: all queries but evaluation need it."""
    try:
        check_smooth(graph)
        check_decomposable(graph)
    except PCStructureError as error:
        raise PCStructureError(
            f"{where}: graph: expected a smooth and decomposable circuit, found one that is {error}"
        ) from None
