"""Concatenation of several clients' batches for one forward, and each client's output and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ext._checks import require
from lora_ext.layers import IGNORE, shift_labels

#: ``loss_fn(output, batch)`` returns the mean loss of one client, from its rows of the logits and
#: its batch.
LossFn = Callable[[Tensor, Any], Tensor]

WHERE = "BatchedClients"
_MASK, _IDS = "attention_mask", "input_ids"


class Segment(NamedTuple):
    """Consecutive rows of the concatenated batch that belong to one client."""

    rows: int  # number of rows
    length: int | None  # length of the client's sequences; None if all clients have equal lengths


def rows_in(batch: Any, where: str) -> int:
    """Return the number of rows of a client's batch."""
    return next(iter(_inputs(batch, where).values())).shape[0]


def merged(batches: Sequence[Any], where: str) -> tuple[dict[str, Tensor] | Tensor, list[Segment]]:
    """Concatenate the batches of several clients.

    Sequences of a mapping may differ in length between clients. Shorter sequences are padded on the
    right with zeros, and masked in ``attention_mask``.

    Returns:
        the model's keyword arguments, or its only argument x; and the segment of each client.

    Raises:
        ValueError: If the batches differ in type, names or shapes.
    """
    kinds = {isinstance(batch, Mapping) for batch in batches}
    require(len(kinds) == 1, where, "batches", "only mappings, or no mappings", "both")
    inputs = [_inputs(batch, where) for batch in batches]
    names = [*inputs[0]]
    rows: list[int] = []
    for each in inputs:
        require([*each] == names, where, "batches", f"tensors {names}, as in the first", [*each])
        counts = {t.shape[0] for t in each.values()}
        require(
            len(counts) == 1, where, "batches", "the same number of rows in each tensor", counts
        )
        rows.append(counts.pop())
    lengths = [each[_IDS].shape[1] for each in inputs] if _IDS in names else [None] * len(inputs)
    padded = len(set(lengths)) > 1
    if padded and _MASK not in names:
        for each in inputs:
            each[_MASK] = torch.ones_like(each[_IDS])
    whole: dict[str, Tensor] = {}
    for name in inputs[0]:
        parts = [each[name] for each in inputs]
        if padded:
            longest = max(length for length in lengths if length is not None)
            parts = [_padded(t, length, longest) for t, length in zip(parts, lengths, strict=True)]
        shapes = {(tuple(t.shape[1:]), t.dtype, t.device) for t in parts}
        require(len(shapes) == 1, where, f"batches: {name}", "rows of one shape and dtype", shapes)
        whole[name] = torch.cat(parts)
    pairs = zip(rows, lengths, strict=True)
    segments = [Segment(count, length if padded else None) for count, length in pairs]
    return (whole if kinds.pop() else whole["x"]), segments


def logits_of(output: Any, segments: Sequence[Segment], where: str) -> Tensor:
    """Return ``output.logits``, or ``output`` itself if it has no logits.

    Raises:
        ValueError: If the result would not be a tensor with the rows of all segments.
    """
    logits = getattr(output, "logits", output)
    require(isinstance(logits, Tensor), where, "model", "logits or a tensor", type(output).__name__)
    rows = sum(segment.rows for segment in segments)
    holds = logits.dim() > 0 and logits.shape[0] == rows
    require(holds, where, "model", f"an output of {rows} rows", f"shape {list(logits.shape)}")
    return logits


def own_outputs(logits: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """Return each client's rows of the logits, cut to the length of its sequences.

    The logits are split once for all clients, so that the backward allocates the gradient of the
    whole tensor once and not once per client.
    """
    return [
        own if segment.length is None or own.dim() < 3 else own[:, : segment.length]
        for own, segment in zip(logits.split([s.rows for s in segments]), segments, strict=True)
    ]


def _inputs(batch: Any, where: str) -> dict[str, Tensor]:
    """Return the inputs of the model by name; an input without a name is called ``x``."""
    if isinstance(batch, Mapping):
        found = {name: value for name, value in batch.items() if name != "labels"}
    else:
        found = {"x": batch[0] if isinstance(batch, tuple | list) else batch}
    for name, value in found.items():
        rows = isinstance(value, Tensor) and value.dim() > 0
        require(rows, where, f"batches: {name}", "a tensor with dim() > 0", f"{value!r:.80}")
    require(bool(found), where, "batches", "at least one tensor", "none")
    return found


def _padded(t: Tensor, length: int | None, longest: int) -> Tensor:
    if length is None or t.dim() < 2 or t.shape[1] != length:
        return t
    return F.pad(t, [0, 0] * (t.dim() - 2) + [0, longest - length])


class Losses(NamedTuple):
    """Losses of K clients. ``(weights * roots).sum()`` is the sum of the K losses."""

    values: Tensor  # (K,) float64, loss of each client, without a graph
    roots: Tensor  # (rows, ...), loss of each element, or (K,), loss of each client; with a graph
    weights: Tensor  # weight of each root, in the shape of roots
    owners: Tensor  # (roots.shape[0],), index of the client for each row of roots

    def gradients(self, leaves: Sequence[Tensor], going: Sequence[bool]) -> list[Tensor | None]:
        """Sum the losses of some clients, and return the sum's gradient by each of ``leaves``.

        ``going[k]`` is True if the sum includes the loss of client k.
        """
        if not (leaves and any(going) and self.roots.requires_grad):
            return [None] * len(leaves)
        weights = self.weights
        if not all(going):
            goes = torch.tensor(going, device=weights.device)[self.owners]
            goes = goes.view(-1, *[1] * (weights.dim() - 1))
            weights = torch.where(goes, weights, 0)
        return [*torch.autograd.grad(self.roots, leaves, weights, allow_unused=True)]


def cross_entropies(
    logits: Tensor,
    batches: Sequence[Any],
    segments: Sequence[Segment],
    owners: tuple[Tensor, Tensor],
) -> Losses:
    """Compute each client's mean cross entropy: of the next token if batches are mappings with
    ``labels``, of y if they are ``(x, y)``.

    ``owners`` contains the number of rows of each client, and the client of each row.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    parts = zip(batches, segments, strict=True)
    labels = torch.cat([_labels(logits, batch, segment) for batch, segment in parts])
    if isinstance(batches[0], Mapping):
        each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        each = each.view(labels.shape)  # (rows, ...)
    else:
        each = F.cross_entropy(logits, labels, reduction="none")
    counted = torch.ones_like(each) if labels.is_floating_point() else labels != IGNORE
    sizes, owner = owners
    sums, counts = (
        torch.segment_reduce(
            t.double().flatten(1).sum(1) if t.dim() > 1 else t.double(), "sum", lengths=sizes
        )
        for t in (each.detach(), counted)
    )
    shares = counts.reciprocal().to(each.dtype)[owner].view(-1, *[1] * (each.dim() - 1))
    return Losses(sums / counts, each, shares.expand_as(each), owner)


def own_losses(loss_fn: LossFn, outputs: Sequence[Tensor], batches: Sequence[Any]) -> Losses:
    """Compute each client's loss with ``loss_fn``."""
    found = [loss_fn(own, batch) for own, batch in zip(outputs, batches, strict=True)]
    for loss in found:
        scalar = isinstance(loss, Tensor) and loss.dim() == 0
        kind = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        require(scalar, WHERE, "loss_fn", "a scalar tensor", kind)
    roots = torch.stack(found)
    owners = torch.arange(len(found), device=roots.device)
    return Losses(roots.detach().double(), roots, torch.ones_like(roots), owners)


def _labels(logits: Tensor, batch: Any, segment: Segment) -> Tensor:
    """Return one client's labels, aligned with its rows of the logits."""
    if isinstance(batch, Mapping):
        require("labels" in batch, WHERE, "batches", "the key 'labels' or a loss_fn", sorted(batch))
        labels = batch["labels"].to(logits.device)
        if logits.dim() == 3:  # language model
            labels = shift_labels(labels)
            if segment.length is not None:
                labels = F.pad(labels, (0, logits.shape[1] - labels.shape[1]), value=IGNORE)
        return labels
    require(isinstance(batch, tuple | list), WHERE, "batches", "(x, y) or a loss_fn", type(batch))
    return batch[1].to(logits.device)
