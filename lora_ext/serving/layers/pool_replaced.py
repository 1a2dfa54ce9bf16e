"""Rows whose adapter brings a module of its own (PEFT's ``modules_to_save``): a head, as a rule.

The base module computes all rows, so that its own keep every bit; then those of such adapters are
computed again with their own weight and put in their places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext._torch import READS_MORE, traced
from lora_ext.rows import Block, batch_of, block_of_graph, forward_of, noted

#: Weights that stand in for a module's own, by slot: ``weight`` and ``bias``.
OfSlots = Mapping[int, Any]


def with_replaced(
    y: Tensor, x: Tensor, of_slots: OfSlots, block: Block, tokens_first: bool
) -> Tensor:
    """``y (..., O)`` with the rows of these slots computed by their own weights.

    Args:
        y: of the base module; changed in place where no gradient is wanted.
        x: its input: ``(..., I)``, or token ids ``(...)`` of an embedding.
        of_slots: see :data:`OfSlots`. block: says which rows have which slot.
        tokens_first: the layout of ``x``.
    """
    of_tokens = not x.is_floating_point()
    leading = x.shape if of_tokens else x.shape[:-1]
    groups = block.rows_of_each(of_slots.keys(), leading, x.device, tokens_first)
    if not groups:
        return y
    flat = y.reshape(-1, y.shape[-1])  # (T, O)
    rows_in = x.reshape(-1) if of_tokens else x.reshape(-1, x.shape[-1])  # (T,) or (T, I)
    ours = not (torch.is_grad_enabled() and (y.requires_grad or x.requires_grad))
    for slot, rows in groups:
        weight, bias = of_slots[slot]
        if weight.is_cuda:  # its adapter may be unloaded before the device has read it
            weight.record_stream(torch.cuda.current_stream(weight.device))
        part = rows_in[rows]
        part = F.embedding(part, weight) if of_tokens else F.linear(part.to(weight), weight, bias)
        part = part.to(y.dtype)
        flat = flat.index_copy_(0, rows, part) if ours else flat.index_copy(0, rows, part)
    return flat.view(y.shape)


def traced_replaced(y: Tensor, x: Tensor, layer: Any) -> Tensor:
    """:func:`with_replaced` for a graph: the rows of whatever block the graph will run in."""
    return _replaced_rows(
        y, x, layer.handle, layer.name, layer.tokens_first, noted.batch, layer.default
    )


def _no_backward(_ctx: Any, *_grads: Any) -> Sequence[Tensor | None]:
    raise NotImplementedError(
        "lora_ext: expected a compiled graph without gradients where an adapter replaces a module "
        "(modules_to_save), found a backward; compile inside torch.no_grad(), or do not compile"
    )


# Beside ``active_adapter_ids``, and for the same reason: a graph cannot read a ContextVar.
@traced(
    "replaced_rows(Tensor y, Tensor x, int handle, str name, bool tokens_first, SymInt[] batch, "
    "str? default) -> Tensor",
    fake=lambda y, *_: torch.empty_like(y),
    backward=(_no_backward, None),
    tags=READS_MORE,
)
def _replaced_rows(
    y: Tensor,
    x: Tensor,
    handle: int,
    name: str,
    tokens_first: bool,
    batch: Sequence[int],
    default: str | None,
) -> Tensor:
    block, y = block_of_graph(handle, default), y.clone()
    if block is None:
        return y
    with forward_of(batch_of(batch)):
        return with_replaced(y, x, block.lease.pool.modules[name].replaced, block, tokens_first)
