"""The layered form as one list of int32, which ``ops.circuit_layers`` walks in one call.

It tells the same circuit as :mod:`lora_ext.circuits.layered`, by regions in place of tiles:

    header    units, leaf units, rows of all matrices, then how many there are of each list below
    nodes     first column of the results, sums, terms, matrix or -1, range of parts
    parts     first term, 1 if of pairs, range of children
    children  first column, units
    matrices  first weight, sums, terms, number of the first row, range of users
    users     the nodes that a matrix belongs to
    roots     columns
    stages    first node of each, and the number of nodes: a stage reads the stages before it
    owners    of each child, then of each root: its node, or -1 - the variable of a leaf
    draws     of each node with a matrix: the place of its region among the inner regions

A node without a matrix is its products: an input over several variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from lora_ext.circuits.layered import FIRST_LEAF, Layered
from lora_ext.circuits.region_graph import RegionGraph
from lora_ext.circuits.regions import Region
from lora_ext.ops import Program


def _inputs_of_many(graph: RegionGraph, layered: Layered) -> list[tuple[int, int, list[int]]]:
    """Inputs over several variables: first column, units, and the first column of each variable."""
    ptr, index = layered.factors.child_ptr.tolist(), layered.factors.child_idx.tolist()
    first = FIRST_LEAF + len(layered.inputs.var)
    found: list[tuple[int, int, list[int]]] = []
    for region, column in zip(graph.regions, layered.first_unit, strict=True):
        if region.leaf is not None and column >= first:
            begin, end = ptr[column - first : column - first + 2]
            found.append((column, region.units, index[begin:end]))
    return sorted(found)


def compile_program(graph: RegionGraph, layered: Layered, roots: Sequence[int]) -> Program:
    """The program of a compiled graph whose roots are the columns ``roots``."""
    nodes: list[list[int]] = []
    parts: list[list[int]] = []
    children: list[list[int]] = []
    matrices: list[list[int]] = []
    number: dict[int, int] = {}  # of the matrix that starts at a weight
    users: list[list[int]] = []
    stages = [0]
    owners: list[int] = []
    draws: list[int] = []
    rows = 0
    owner = layered.owner.tolist()
    node_of: dict[int, int] = {}  # of a region
    inner = [i for i, region in enumerate(graph.regions) if region.partitions]
    place = {region: k for k, region in enumerate(inner)}

    def owner_of(column: int) -> int:
        variable = owner[column] - len(graph.regions)
        return -1 - variable if variable >= 0 else node_of[owner[column]]

    def add_node(column: int, units: int, width: int, matrix: int, first_part: int) -> None:
        node_of[owner[column]] = len(nodes)
        draws.append(place.get(owner[column], -1))
        nodes.append([column, units, width, matrix, first_part, len(parts)])

    def add_part(term: int, kronecker: bool, columns: list[list[int]]) -> None:
        parts.append([term, int(kronecker), len(children), len(children) + len(columns)])
        children.extend(columns)
        owners.extend(owner_of(column) for column, _ in columns)

    def add_parts(region: Region) -> None:
        term = 0
        for p in region.partitions:
            columns = [[layered.first_unit[c], graph.regions[c].units] for c in p.children]
            add_part(term, p.kind == "kronecker", columns)
            term += graph.partition_units(p)

    for column, units, factors in _inputs_of_many(graph, layered):
        add_part(0, False, [[f, units] for f in factors])
        add_node(column, units, units, -1, len(parts) - 1)
    if nodes:
        stages.append(len(nodes))
    for stage in layered.stages:
        for i in stage.regions:
            region, offset = graph.regions[i], layered.weight_off[i]
            width = graph.num_products(region)
            if offset not in number:
                number[offset] = len(matrices)
                matrices.append([offset, region.units, width, rows])
                users.append([])
                rows += region.units
            users[number[offset]].append(len(nodes))
            first = len(parts)
            add_parts(region)
            add_node(layered.first_unit[i], region.units, width, number[offset], first)
        stages.append(len(nodes))
    used: list[int] = []
    for matrix, of in zip(matrices, users, strict=True):
        matrix += [len(used), len(used) + len(of)]
        used += of
    lists = [nodes, parts, children, matrices]
    num_leaves, num_stages = len(layered.inputs.var), len(stages) - 1
    header = [layered.num_units, num_leaves, rows, *(len(part) for part in lists)]
    header += [len(used), len(roots), num_stages]
    flat = [x for part in lists for item in part for x in item]
    tail = [*used, *roots, *stages, *owners, *(owner_of(r) for r in roots), *draws]
    numbers = torch.tensor(header + flat + tail, dtype=torch.int32)
    plan = [layered.num_units, num_leaves, rows, len(nodes), len(matrices), len(roots)]
    plan += [len(numbers), num_stages, graph.num_variables, len(inner)]
    for begin, end in pairwise(stages):
        members = nodes[begin:end]
        plan += [begin, end, max(n[1] for n in members), max(n[2] for n in members)]
    return Program(numbers, plan)


def matrices_of(program: Program) -> list[tuple[int, int, int]]:
    """First weight, sums and terms of each matrix, in the order of the weights."""
    nodes, parts, children, matrices = program.numbers[3:7].tolist()
    first = 10 + 6 * nodes + 4 * parts + 2 * children
    rows = program.numbers[first : first + 6 * matrices].view(-1, 6)
    return [(offset, sums, terms) for offset, sums, terms in rows[:, :3].tolist()]


def rows_of_one_width(program: Program) -> list[tuple[slice, int]]:
    """Ranges of the weights in which all sums have as many terms, and how many those are."""
    found: list[tuple[slice, int]] = []
    for first, sums, terms in matrices_of(program):
        end = first + sums * terms
        if found and found[-1][1] == terms:
            found[-1] = (slice(found[-1][0].start, end), terms)
        else:
            found.append((slice(first, end), terms))
    return found
