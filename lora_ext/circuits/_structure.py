"""Checks of the structure of a circuit: smooth, decomposable, deterministic and others.

Scopes are bitsets in Python integers, so each check needs one pass over the edges of the graph.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Literal

from lora_ext._checks import require

from ._leaves import Indicator
from ._regions import PCStructureError, braces, variables
from .region_graph import RegionGraph

Truth = Literal[True, False, "unknown"]


def why_not_smooth(graph: RegionGraph) -> str | None:
    """Return a message about a sum with terms of different scopes; None if the graph is smooth."""
    for i, region in enumerate(graph.regions):
        first, *others = [graph.partition_scope(p) for p in region.partitions] or [0]
        for scope in others:
            if scope != first:
                scopes = f"{braces(first)} and {braces(scope)}"
                return f"not smooth: sum unit {graph.label(i)} mixes scopes {scopes}"
    return None


def why_not_decomposable(graph: RegionGraph) -> str | None:
    """Return a message about a product with factors that share variables.

    Return None if the graph is decomposable.
    """
    for i, region in enumerate(graph.regions):
        for p in region.partitions:
            seen = 0
            for n, child in enumerate(p.children):
                if shared := seen & graph.scopes[child]:
                    other = next(c for c in p.children[:n] if graph.scopes[c] & shared)
                    children = f"children {graph.label(other)} and {graph.label(child)}"
                    product = f"a product of unit {graph.label(i)}"
                    return f"not decomposable: {product}: {children} share {braces(shared)}"
                seen |= graph.scopes[child]
    return None


def is_structured_decomposable(graph: RegionGraph) -> bool:
    """Return whether all products with the same scope split it into the same parts."""
    if why_not_decomposable(graph) is not None:
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
    """Return whether at most one term of each sum is nonzero on any input.

    The test is syntactic. True: the terms of each sum differ in an indicator on a common variable.
    False: two terms of a sum are positive everywhere. ``"unknown"``: all other cases.
    """
    # For each unit: the allowed values (a bitset) of every variable that the unit restricts.
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
        # All units of a region are sums over the same terms, so they allow the same values.
        units.append([merged] * region.units)
    return verdict


def _jointly(*parts: dict[int, int]) -> dict[int, int]:
    joint: dict[int, int] = {}
    for part in parts:
        for v, values in part.items():
            joint[v] = joint.get(v, values) & values
    return joint


def _disjoint(terms: list[dict[int, int]], merged: dict[int, int]) -> bool:
    """Return whether it is certain that the terms exclude each other.

    This is certain if one variable separates all terms, or if there are at most 64 terms and every
    pair has a variable that separates it. ``merged`` contains the values that any term allows, for
    each variable that all terms restrict.
    """
    if any(sum(t[v].bit_count() for t in terms) == m.bit_count() for v, m in merged.items()):
        return True
    return len(terms) <= 64 and all(
        any(a[v] & b[v] == 0 for v in a.keys() & b.keys())
        for i, a in enumerate(terms)
        for b in terms[:i]
    )


def check_tractable(graph: RegionGraph, where: str) -> None:
    """Raise PCStructureError unless a graph is smooth and decomposable."""
    problem = why_not_smooth(graph) or why_not_decomposable(graph)
    expected, found = "a smooth and decomposable circuit", f"one that is {problem}"
    require(problem is None, where, "graph", expected, found, PCStructureError)
