"""Programs of whole circuits with random leaf values and weights, to test the ops that run them."""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_ext import ops
from lora_ext.circuits import Categorical, Circuit, RegionGraph

LEAF = Categorical(2)
GRAPHS: dict[str, Callable[[], RegionGraph]] = {
    "one sum": lambda: RegionGraph.cp(1, 1, LEAF),
    "chain": lambda: RegionGraph.hmm(4, 5, LEAF),
    "chain, tied, wider than a tile": lambda: RegionGraph.hmm(3, 67, LEAF, homogeneous=True),
    "tree": lambda: RegionGraph.hclt([-1, 0, 0, 1, 1, 1], 20, LEAF),
    "pairs": lambda: RegionGraph.rat_spn(7, 2, 3, 3, 4, LEAF, num_roots=2),
    "shared parts": lambda: RegionGraph.poon_domingos(2, 3, 2, LEAF),
    "a stage a launch": lambda: RegionGraph.hmm(3, 140, LEAF),
}
# Graphs that contain nodes with more than 2^14 weights. The ops sum the terms of such nodes in
# stages.
STAGED: dict[str, Callable[[], RegionGraph]] = {
    "tied, a stage a launch": lambda: RegionGraph.hmm(4, 130, LEAF, homogeneous=True),
    "pairs, a stage a launch": lambda: RegionGraph.rat_spn(4, 2, 2, 26, 26, LEAF, num_roots=2),
}


def case(name: str, rows: int, seed: int = 0) -> tuple[ops.Program, Tensor, Tensor, int]:
    """Return ``(program, leaf, w, number of roots)``, with ``leaf`` ``(rows, N)`` and ``w``
    ``(W,)``. A tenth of the entries of ``leaf`` and ``w`` are -inf."""
    circuit = Circuit({**GRAPHS, **STAGED}[name]())
    g = torch.Generator().manual_seed(seed)
    program = circuit._execution.program
    leaf = 4 * torch.randn(rows, program.plan[1], generator=g)
    w = 2 * torch.randn(len(circuit.weights), generator=g)
    leaf, w = (t.masked_fill(torch.rand(t.shape, generator=g) < 0.1, -torch.inf) for t in (leaf, w))
    return program, leaf, w, program.plan[5]


def roots_of(program: ops.Program) -> list[int]:
    first = offsets(program)["roots"]
    return program.numbers[first : first + program.plan[5]].tolist()


def offsets(program: ops.Program) -> dict[str, int]:
    nodes, parts, children, matrices, users, roots, stages = program.numbers[3:10].tolist()
    sizes = {
        "nodes": 6 * nodes,
        "parts": 4 * parts,
        "children": 2 * children,
        "matrices": 6 * matrices,
        "users": users,
        "roots": roots,
        "stages": stages + 1,
        "owners": children + roots,
        "draws": nodes,
    }
    found: dict[str, int] = {}
    at = 10
    for name, size in sizes.items():
        found[name] = at
        at += size
    return found


def spoiled(program: ops.Program, at: int, number: int) -> ops.Program:
    numbers = program.numbers.clone()
    numbers[at] = number
    return program._replace(numbers=numbers)
