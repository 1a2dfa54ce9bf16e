"""Whole circuits, node after node, one formula per function.

Letters: ``B`` rows, ``N`` leaf units, ``U`` units, ``W`` weights, ``M`` blocks of leaf units.
"""

import torch
from torch import Tensor

from lora_ext.reference.circuit import log_softmax
from lora_ext.reference.circuit_sum import log_einsum_exp


def circuit_table(table: Tensor, x: Tensor, row: Tensor, block: int, norm: str = "none") -> Tensor:
    """``out[b, m * block + j] = log p[row[m] + j, x[b, m]]``, 0 where ``x`` is -1.

    Args:
        table: ``(R, V)``.
        x: ``(B, M)`` int64.
        row: ``(M,)`` int64.
        block: leaf units of a block.
        norm: ``"logits"``: ``p`` is the softmax of a row of the table; ``"none"``: its exponential.

    Returns:
        ``(B, M * block)``.
    """
    table = log_softmax(table) if norm == "logits" else table
    rows = row[:, None] + torch.arange(block, device=row.device)  # (M, block)
    found = table[rows, x.clamp(min=0)[..., None]]  # (B, M, block)
    return torch.where(x[..., None] < 0, 0, found).flatten(1)


def circuit_layers(leaf: Tensor, w: Tensor, program: Tensor, norm: str = "logits") -> Tensor:
    """Log-values of all units: products of children, then sums, of one node after another.

    Args:
        leaf: ``(B, N)``.
        w: ``(W,)``.
        program: int32, as ``csrc/include/lora_ext/circuit_layers.h`` lays it out.
        norm: of the weights, as :func:`log_einsum_exp` takes it.

    Returns:
        ``(B, U)``: 0, ``-inf``, the leaves, then all other units.
    """
    numbers = [int(n) for n in program]
    nodes, parts, children, matrices = _lists(numbers)
    val = [leaf.new_zeros(len(leaf))] * numbers[0]
    val[1] = leaf.new_full((len(leaf),), -torch.inf)
    val[2 : 2 + leaf.shape[1]] = leaf.unbind(1)

    def units(child: list[int]) -> Tensor:
        return torch.stack(val[child[0] : child[0] + child[1]], 1)

    for out, _, _, matrix, first, last in nodes:
        terms: list[Tensor] = []
        for _, kronecker, begin, end in parts[first:last]:
            factors = [units(c) for c in children[begin:end]]
            if kronecker:
                left, right = factors
                terms.append((left[:, :, None] + right[:, None]).flatten(1))
            else:
                terms.append(torch.stack(factors).sum(0))
        result = torch.cat(terms, 1)
        if matrix >= 0:
            offset, sums, width, *_ = matrices[matrix]
            weights = w[offset : offset + sums * width].view(sums, width)
            result = log_einsum_exp(weights, result, norm)
        val[out : out + result.shape[1]] = result.unbind(1)
    return torch.stack(val, 1)


def _lists(numbers: list[int]) -> list[list[list[int]]]:
    """Nodes, parts, children and matrices of a program, a list of numbers each."""
    found: list[list[list[int]]] = []
    at = 10
    for count, width in zip(numbers[3:7], (6, 4, 2, 6), strict=True):
        found.append([numbers[at + i * width : at + (i + 1) * width] for i in range(count)])
        at += count * width
    return found
