"""RAT-SPNs as stacked einsum layers, a peer for the values and training of circuits."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext.circuits import Circuit
from lora_ext.circuits._regions import variables

DEPTH, REPETITIONS = 3, 4  # sizes of the RAT-SPN


def einsum_layers(leaf: Tensor, weights: list[Tensor], scopes: Tensor, x: Tensor) -> Tensor:
    """Evaluate a RAT-SPN layer by layer, with one einsum for all regions of the same depth.

    Args:
        leaf: Logits ``(R, n, U, V)`` of R input regions over n variables each.
        weights: Logits ``(G, O, U, U)`` of each layer's regions, with siblings next to each other.
            Those of the root, the last ones, are ``(1, repetitions, U, U)``: one sum over the pairs
            of all repetitions.
        scopes: Variables ``(R, n)`` of each input region.
        x: Values ``(B, N)``.
    """
    regions, n, _, values = leaf.shape
    index = torch.arange(regions * n).view(regions, n) * values + x[:, scopes]  # (B, R, n)
    table = leaf.log_softmax(3).transpose(2, 3).flatten(0, 2)
    val = torch.nn.functional.embedding(index, table).sum(2)  # (B, R, U)
    for w in weights[:-1]:
        w = w.flatten(2).softmax(2).view_as(w)
        a, b, top = _pairs(val)
        val = torch.einsum("bgi,bgj,goij->bgo", a, b, w).log() + top
    a, b, top = _pairs(val)
    w = weights[-1].flatten(1).softmax(1).view_as(weights[-1])
    each = torch.einsum("bgi,bgj,gij->bg", a, b, w[0]).log() + top[:, :, 0]
    return each.logsumexp(1)


def _pairs(val: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both siblings of every pair, divided by their maxima, and the sum of log maxima."""
    tops = [val[:, side::2].amax(2, keepdim=True) for side in (0, 1)]
    a, b = ((val[:, side::2] - tops[side]).exp() for side in (0, 1))
    return a, b, tops[0] + tops[1]


def layers_of(circuit: Circuit) -> tuple[Tensor, list[Tensor], Tensor]:
    """Copy a RAT-SPN's parameters for :func:`einsum_layers`."""
    graph = circuit.graph
    inputs = [variables(r.variables) for r in graph.regions if r.leaf is not None]
    units, n = graph.regions[0].units, len(inputs[0])
    logits = circuit.leaves[0]["logits"].detach().clone()
    leaf = logits.view(len(inputs), n, units, -1).requires_grad_()
    sizes = [len(inputs) // 2**level * units**3 for level in range(1, DEPTH)]
    parts = circuit.weights.detach().split([*sizes, REPETITIONS * units**2])
    shape = units, units, units
    weights = [w.clone().view(-1, *shape).requires_grad_() for w in parts[:-1]]
    weights.append(parts[-1].clone().view(1, REPETITIONS, units, units).requires_grad_())
    return leaf, weights, torch.tensor(inputs)
