"""Mixed logits of an ensemble's layers, and the terms that MoD adds to the loss.

Shape letters: ``B`` sequences, ``T`` positions, ``N`` positions of all sequences, ``d`` hidden
width, ``V`` vocabulary, ``k`` layers of the ensemble. Late layers are all layers of the ensemble
except the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._torch import evaluating
from lora_ext.layers import IGNORE, Head, recomputed, shift_labels

from .config import ModConfig


class Layers(NamedTuple):
    """Head of a model with its parameters, and the normed hidden states ``(..., d)`` of each layer
    of the ensemble in order, in the dtype of ``weight``."""

    head: Head
    weight: Tensor
    bias: Tensor | None
    normed: Sequence[Tensor]

    def flat(self) -> Layers:
        """Flatten the states of each layer to ``(N, d)``, with all N positions in one dimension."""
        return self._replace(normed=[n.flatten(0, -2) for n in self.normed])

    def late(self) -> Layers:
        """Return only the late layers."""
        return self._replace(normed=self.normed[:-1])


def mixed_logits(layers: Layers, weights: Tensor, chunk: int, probabilities: bool) -> Tensor:
    """Mix the logits of the layers, or compute the logarithm of their mixed probabilities.

    The result is ``sum_e w_e z_e``, or ``log sum_e w_e softmax(z_e)``, with the logits ``z_e`` of
    layer e. It is computed in chunks of the vocabulary, so that only one tensor ``(..., V)`` is in
    memory. The backward pass recomputes each chunk.

    Args:
        layers: the k layers.
        weights: weights of the layers, ``(..., k)``.
        chunk: number of columns per chunk.
        probabilities: whether to mix probabilities instead of logits.

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
    """Return a context manager in which an output layer and its adapters apply no dropout."""
    return nullcontext() if type(layer) is nn.Linear else evaluating(layer)


def kept(values: Tensor, logits_to_keep: Any) -> Tensor:
    """Select the positions that transformers' argument ``logits_to_keep`` keeps.

    Args:
        values: ``(B, T, ...)``.
        logits_to_keep: number of last positions, with 0 for all; indices of positions, ``(n,)`` for
            all sequences or ``(B, n)`` per sequence; or a bool mask ``(B, T)``, for which the
            result has all kept positions in one dimension.
    """
    if not isinstance(logits_to_keep, Tensor):
        return values[:, -logits_to_keep:] if logits_to_keep else values
    if logits_to_keep.dim() < 2:
        return values[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return values[logits_to_keep]
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, logits_to_keep]


@dataclass(frozen=True)
class Targets:
    """Targets of the loss terms at the N positions whose logits are kept.

    Attributes:
        labels: ``(N,)``, the label that each position predicts; IGNORE if there is none.
        counted: ``(N,)`` bool, True for labels other than IGNORE.
        mask: ``(N,)`` bool, True for positions that the distillation includes.
        share: fraction of the labels in ``num_items_in_batch`` (the labels of all micro-batches in
            gradient accumulation) that are in this call; 1 if this argument is not passed.
    """

    labels: Tensor
    counted: Tensor
    mask: Tensor
    share: Tensor | float

    @classmethod
    def of(
        cls, config: ModConfig, given: Mapping[str, Any], shape: torch.Size, device: torch.device
    ) -> Targets:
        """Return the targets of a model's forward.

        Args:
            config: settings of MoD.
            given: arguments of the forward by name.
            shape: ``(B, T)`` of the hidden states.
            device: device of the head; labels are moved to it.
        """
        shifted = given.get("shift_labels")
        labels: Tensor = shift_labels(given["labels"]) if shifted is None else shifted
        keep = given.get("logits_to_keep", 0)
        labels = labels.to(device).flatten()
        mask = counted = labels != IGNORE
        if config.distill_on == "all":
            mask = torch.ones(shape, dtype=torch.bool, device=device)
            attention = given.get("attention_mask")
            if isinstance(attention, Tensor) and attention.dim() == 2:
                mask = attention[:, -shape[1] :].to(device) != 0
            mask = kept(mask, keep).flatten()
        count, share = given.get("num_items_in_batch"), 1.0
        if count is not None:
            share = counted.sum() / (count.to(device) if isinstance(count, Tensor) else count)
        return cls(labels, counted, mask, share)


def distillation(config: ModConfig, layers: Layers, to: Targets) -> Tensor:
    """Compute ``tau^2 KL``, the divergence of the late layers from the last layer, averaged over
    layers and positions. The last layer gets no gradient."""
    head, weight, bias, normed = layers
    mean = ops.chunked_kl(
        normed, weight, bias, config.tau, config.vocab_chunk, to.mask, head.softcap
    )
    return mean * to.share


def layer_losses(config: ModConfig, layers: Layers, to: Targets) -> Tensor:
    """Compute the mean cross entropy of each layer's own prediction, ``(k,)``, without storing
    logits of the whole vocabulary."""
    head, weight, bias, normed = layers
    losses = [
        ops.chunked_cross_entropy(
            n, weight, bias, to.labels, config.vocab_chunk, IGNORE, head.softcap
        )
        for n in normed
    ]
    return torch.stack(losses)
