"""The terms of the loss that MoD adds to the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_ext import ops
from lora_ext.layers import IGNORE, shift_labels

from ._head import Layers
from .config import ModConfig


def kept(values: Tensor, logits_to_keep: Any) -> Tensor:
    """The positions that transformers' argument of that name keeps.

    Args:
        values: ``(B, T, ...)``.
        logits_to_keep: a number of last positions, 0 for all; positions ``(n,)``, or ``(B, n)`` of
            each sequence; or a bool mask ``(B, T)``, of which the positions follow each other in
            one dimension.
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
    """Which positions count, of those whose logits are kept.

    Attributes:
        labels: ``(N,)``, under the positions that predict them, IGNORE elsewhere.
        counted: ``(N,)`` bool, where they are not IGNORE.
        mask: ``(N,)`` bool, where the distillation is taken.
        share: of the whole batch that these labels are, where the loss is divided by the number of
            its labels, as in gradient accumulation; else 1.
    """

    labels: Tensor
    counted: Tensor
    mask: Tensor
    share: Tensor | float

    @classmethod
    def of(
        cls, config: ModConfig, given: Mapping[str, Any], shape: torch.Size, device: torch.device
    ) -> Targets:
        """From the arguments of the model's forward, for hidden states ``(B, T)`` and a head on
        ``device``, which need not be that of the labels."""
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
    """Divergence of the late layers from the last, ``tau^2 KL``, a mean over both layers and
    positions; the last layer is not moved by it."""
    head, weight, bias, normed = layers
    mean = ops.chunked_kl(
        normed, weight, bias, config.tau, config.vocab_chunk, to.mask, head.softcap
    )
    return mean * to.share


def layer_losses(config: ModConfig, layers: Layers, to: Targets) -> Tensor:
    """Return the mean cross entropy of each layer's own prediction, ``(k,)``, by the targets'
    labels; no logits of the whole vocabulary are held."""
    head, weight, bias, normed = layers
    losses = [
        ops.chunked_cross_entropy(
            n, weight, bias, to.labels, config.vocab_chunk, IGNORE, head.softcap
        )
        for n in normed
    ]
    return torch.stack(losses)
