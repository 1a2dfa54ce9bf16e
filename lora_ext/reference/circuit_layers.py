"""Evaluation of whole circuits, one node at a time, one formula per function.

A node is a group of sums with common terms, or an input over several variables.

Letters: ``B`` rows, ``N`` leaf units, ``U`` units, ``W`` weights, ``M`` blocks of leaf units.
"""

from itertools import islice

import torch
from torch import Tensor

from ._circuit import draw, log_softmax
from ._circuit_sum import log_einsum_exp


def circuit_table(table: Tensor, x: Tensor, row: Tensor, block: int, norm: str = "none") -> Tensor:
    """Compute the result of :func:`lora_ext.ops.circuit_table` by indexing.

    With ``norm="logits"``, the rows of the table are logits; with "none", they are
    log-probabilities.
    """
    table = log_softmax(table) if norm == "logits" else table
    rows = row[:, None] + torch.arange(block, device=row.device)  # (M, block)
    found = table[rows, x.clamp(min=0)[..., None]]  # (B, M, block)
    return torch.where(x[..., None] < 0, 0, found).flatten(1)


def circuit_layers(
    leaf: Tensor, w: Tensor, program: Tensor, norm: str = "logits", semiring: str = "sum"
) -> Tensor:
    """Compute the log-values of all units, one node at a time: products of children, then sums.

    ``program`` is int32, the ``numbers`` of the op's program in the layout of
    ``csrc/include/lora_ext/circuit_layers.h``. The other arguments are those of the op.
    """
    lists = _Lists(program)
    val = [leaf.new_zeros(len(leaf))] * lists.num_units
    val[1] = leaf.new_full((len(leaf),), -torch.inf)
    val[2 : 2 + leaf.shape[1]] = leaf.unbind(1)
    for node in lists.nodes:
        result = _terms(lists, val, node)
        if node[3] >= 0:
            weights = _weights(lists, w, node)
            if semiring == "sum":
                result = log_einsum_exp(weights, result, norm)
            else:
                result = log_einsum_exp(weights, result, norm, "max").values
        val[node[0] : node[0] + result.shape[1]] = result.unbind(1)
    return torch.stack(val, 1)


def circuit_layers_walk(
    val: Tensor, w: Tensor, program: Tensor, root: Tensor, uniforms: Tensor | None = None
) -> Tensor:
    """Walk from a root to the leaves, along one term of each sum and all factors of each product.

    With ``uniforms``, :func:`draw` draws the term; otherwise it is the largest term. ``program`` is
    as in :func:`circuit_layers`.
    """
    lists = _Lists(program)
    walks = len(root) if uniforms is None else len(uniforms)
    row = torch.arange(walks) // max(walks // max(len(root), 1), 1)
    leaves = torch.full((walks, lists.num_variables), -1)
    chosen = torch.full((walks, len(lists.nodes)), -1)  # unit of each node that a walk has reached

    def take(walk: int, owner: int, column: int) -> None:
        if owner < 0:
            leaves[walk, -1 - owner] = column
        else:
            chosen[walk, owner] = column - lists.nodes[owner][0]

    for m in range(walks):
        r = int(root[row[m]])
        take(m, lists.root_owners[r], lists.roots[r])
    units = list(val.unbind(1))
    for n, node in reversed(list(enumerate(lists.nodes))):
        walk = (chosen[:, n] >= 0).nonzero()[:, 0]
        term = chosen[walk, n]
        if node[3] >= 0:
            terms = _weights(lists, w, node)[term] + _terms(lists, units, node)[row[walk]]
            if uniforms is None:
                term = terms.max(1).indices
            else:
                p = (terms - terms.amax(1, keepdim=True)).exp()
                term = draw(p, uniforms[walk, lists.draws[n]])
        for m, i in zip([int(m) for m in walk], [int(i) for i in term], strict=True):
            part = [p for p in lists.parts[node[4] : node[5]] if p[0] <= i][-1]
            first, k = part[2], i - part[0]
            for c in range(first, part[3]):
                column, pairs = lists.children[c][0], lists.children[part[3] - 1][1]
                if not part[1]:
                    take(m, lists.owners[c], column + k)
                else:
                    take(m, lists.owners[c], column + (k // pairs if c == first else k % pairs))
    return leaves


class _Lists:
    def __init__(self, program: Tensor):
        rest = iter([int(n) for n in program])
        self.num_units, _, _, nodes, parts, children, matrices = islice(rest, 7)
        users, roots, stages = islice(rest, 3)

        def rows(count: int, width: int) -> list[list[int]]:
            return [list(islice(rest, width)) for _ in range(count)]

        self.nodes, self.parts = rows(nodes, 6), rows(parts, 4)
        self.children, self.matrices = rows(children, 2), rows(matrices, 6)
        _, self.roots, _ = (list(islice(rest, count)) for count in (users, roots, stages + 1))
        self.owners, self.root_owners, self.draws = (
            list(islice(rest, count)) for count in (children, roots, nodes)
        )
        self.num_variables = max((-owner for owner in self.owners + self.root_owners), default=0)


def _terms(lists: _Lists, val: list[Tensor], node: list[int]) -> Tensor:
    # (B, terms)
    terms: list[Tensor] = []
    for _, kronecker, begin, end in lists.parts[node[4] : node[5]]:
        factors = [torch.stack(val[c : c + n], 1) for c, n in lists.children[begin:end]]
        if kronecker:
            left, right = factors
            terms.append((left[:, :, None] + right[:, None]).flatten(1))
        else:
            terms.append(torch.stack(factors).sum(0))
    return torch.cat(terms, 1)


def _weights(lists: _Lists, w: Tensor, node: list[int]) -> Tensor:
    # (sums, terms)
    offset, sums, width, *_ = lists.matrices[node[3]]
    return w[offset : offset + sums * width].view(sums, width)
