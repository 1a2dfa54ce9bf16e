"""The layers of an ensemble, and mixes of their logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._torch import evaluating
from lora_ext.layers import Head, recomputed


class Layers(NamedTuple):
    """The head's parameters, and each layer's normed hidden states ``(..., d)``, the last layer's
    last, in the dtype of W."""

    head: Head
    weight: Tensor
    bias: Tensor | None
    normed: Sequence[Tensor]

    def flat(self) -> Layers:
        """Return the same with all positions in one dimension: states ``(N, d)``."""
        return self._replace(normed=[n.flatten(0, -2) for n in self.normed])

    def late(self) -> Layers:
        """Return the same without the last layer, from which the others are distilled."""
        return self._replace(normed=self.normed[:-1])


def mixed_logits(layers: Layers, weights: Tensor, chunk: int, probabilities: bool) -> Tensor:
    """The mix of the layers' own logits, or the logarithm of that of their probabilities.

    ``sum_e w_e z_e``, or ``log sum_e w_e softmax(z_e)``, a chunk of the vocabulary at a time: only
    one tensor of ``(..., V)`` stands in memory. The backward computes each chunk again.

    Args:
        layers: k of them. weights: ``(..., k)``. chunk: columns. probabilities: mix these.

    Returns:
        ``(..., V)`` in the dtype of the head.
    """
    head, weight, bias, normed = layers
    chunks = [
        (weight[start : start + chunk], None if bias is None else bias[start : start + chunk])
        for start in range(0, len(weight), chunk)
    ]

    def mix(columns: Tensor, bias: Tensor | None, w: Tensor, *hiddens: Tensor) -> Tensor:
        parts = [w[..., e, None] * head.logits(n, columns, bias) for e, n in enumerate(hiddens)]
        return torch.stack(parts).sum(0).to(columns.dtype)

    def normaliser(columns: Tensor, bias: Tensor | None, *hiddens: Tensor) -> Tensor:
        logits = (head.logits(n, columns, bias).to(weights.dtype) for n in hiddens)
        return torch.stack([z.logsumexp(-1) for z in logits], -1)

    def log_mix(columns: Tensor, bias: Tensor | None, shift: Tensor, *hiddens: Tensor) -> Tensor:
        logits = (head.logits(n, columns, bias).to(weights.dtype) for n in hiddens)
        parts = [shift[..., e, None] + z for e, z in enumerate(logits)]
        return torch.stack(parts).logsumexp(0).to(columns.dtype)

    if not probabilities:
        return torch.cat([recomputed(mix, *c, weights, *normed) for c in chunks], -1)
    lse = torch.stack([recomputed(normaliser, *c, *normed) for c in chunks]).logsumexp(0)
    least = torch.finfo(weights.dtype).tiny
    log_w = weights.clamp(min=least).log().where(weights > 0, -torch.inf)
    shift = log_w - lse  # (..., k)
    return torch.cat([recomputed(log_mix, *c, shift, *normed) for c in chunks], -1)


def still(layer: nn.Module) -> AbstractContextManager[None]:
    """A block in which an output layer draws no dropout, that of its adapters say."""
    return nullcontext() if type(layer) is nn.Linear else evaluating(layer)
