"""The losses of the clients of a step: a value for each, and the backward of their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ext._checks import require
from lora_ext.layers import IGNORE, shift_labels

from .batches import Segment
from .client_layers import BatchRows

#: ``loss_fn(output, batch)``: one client's rows of the logits, and its batch, to its mean loss.
LossFn = Callable[[Tensor, Any], Tensor]


class Losses(NamedTuple):
    """The losses of K clients, ``roots`` summed with ``weights`` being the sum of all of them."""

    values: Tensor  # (K,) float64, without a graph
    roots: Tensor  # rows first, or one a client
    weights: Tensor  # the shape of roots
    owners: Tensor  # (roots.shape[0],): which client's

    def gradients(self, leaves: Sequence[Tensor], going: Sequence[bool]) -> list[Tensor | None]:
        """Of the sum over the clients that ``going`` names, in each of the leaves."""
        if not (leaves and any(going) and self.roots.requires_grad):
            return [None] * len(leaves)
        weights = self.weights
        if not all(going):
            goes = torch.tensor(going, device=weights.device)[self.owners]
            goes = goes.view(-1, *[1] * (weights.dim() - 1))
            weights = torch.where(goes, weights, 0)
        return [*torch.autograd.grad(self.roots, leaves, weights, allow_unused=True)]


def cross_entropies(
    logits: Tensor, batches: Sequence[Any], segments: Sequence[Segment], rows: BatchRows, where: str
) -> Losses:
    """Each client's mean cross entropy: of the next token for mappings with ``labels``, of y for
    ``(x, y)``. All rows are done at once."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    parts = zip(batches, segments, strict=True)
    labels = torch.cat([_labels(logits, batch, segment, where) for batch, segment in parts])
    if isinstance(batches[0], Mapping):
        each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        each = each.view(labels.shape)  # (rows, ...)
    else:
        each = F.cross_entropy(logits, labels, reduction="none")
    counted = torch.ones_like(each) if labels.is_floating_point() else labels != IGNORE
    sizes, owners = rows.owners(each.device)
    sums, counts = (
        torch.segment_reduce(_by_row(t), "sum", lengths=sizes) for t in (each.detach(), counted)
    )
    shares = counts.reciprocal().to(each.dtype)[owners].view(-1, *[1] * (each.dim() - 1))
    return Losses(sums / counts, each, shares.expand_as(each), owners)


def own_losses(
    loss_fn: LossFn, outputs: Sequence[Tensor], batches: Sequence[Any], where: str
) -> Losses:
    """What a function of one client's rows of the logits makes of each client's."""
    found = [loss_fn(own, batch) for own, batch in zip(outputs, batches, strict=True)]
    for loss in found:
        scalar = isinstance(loss, Tensor) and loss.dim() == 0
        kind = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        require(scalar, where, "loss_fn", "a scalar tensor", kind)
    roots = torch.stack(found)
    owners = torch.arange(len(found), device=roots.device)
    return Losses(roots.detach().double(), roots, torch.ones_like(roots), owners)


def _labels(logits: Tensor, batch: Any, segment: Segment, where: str) -> Tensor:
    """One client's, under its rows of the logits."""
    if isinstance(batch, Mapping):
        require("labels" in batch, where, "batches", "labels, or a loss_fn", sorted(batch))
        labels = batch["labels"].to(logits.device)
        if logits.dim() == 3:  # of language models
            labels = shift_labels(labels)
            if segment.length is not None:
                labels = F.pad(labels, (0, logits.shape[1] - labels.shape[1]), value=IGNORE)
        return labels
    require(isinstance(batch, tuple | list), where, "batches", "(x, y), or a loss_fn", type(batch))
    return batch[1].to(logits.device)


def _by_row(each: Tensor) -> Tensor:
    return each.double().flatten(1).sum(1) if each.dim() > 1 else each.double()
