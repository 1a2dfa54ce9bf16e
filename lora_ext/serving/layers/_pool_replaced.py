"""Adapters that replace a module (PEFT's ``modules_to_save``), usually the output head.

An adapter may also replace only some rows of the embedding (``trainable_token_indices``). The base
module first computes all rows of the batch. Rows whose adapter replaces the module are then
recomputed with the adapter's weight and overwritten; other rows are unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext._torch import READS_MORE, traced
from lora_ext.rows import Block, _context, _traced


def with_replaced(
    y: Tensor, x: Tensor, name: str, of_slots: Mapping[int, Any], block: Block, tokens_first: bool
) -> Tensor:
    """Recompute rows of ``y (..., O)`` if their adapter replaces the module; return the result.

    Args:
        y: output of the base module; changed in place if no gradient is needed.
        x: input of the module: ``(..., I)``, or token ids ``(...)`` of an embedding.
        name: name of the module in the pool.
        of_slots: for each slot whose adapter replaces the module, the ``weight`` and ``bias`` to
            use.
        block: block that determines the slot of each row.
        tokens_first: whether the first dimension of ``x`` is tokens.
    """
    of_tokens = not x.is_floating_point()
    leading = x.shape if of_tokens else x.shape[:-1]
    layout = _context.current_layout(leading, x.device, tokens_first)
    # A captured step reads the weights, and the place of each row's adapter among them, at the
    # fixed addresses of a bank. It cannot use `of_slots`, which contains the slots at the time of
    # the capture and not those at the time of a replay.
    if block.step_rows(layout) is not None:
        assert block.step is not None
        bank, places = block.step.bank(name)
        # There is no bank if no adapter in the pool replaces this module.
        return y if bank is None else bank.replaced(y, x, places)
    if not of_slots:
        return y
    found = block.slot_rows(of_slots.keys(), layout)
    if found is None:
        return y
    flat = y.reshape(-1, y.shape[-1])  # (T, O)
    rows_in = x.reshape(-1) if of_tokens else x.reshape(-1, x.shape[-1])  # (T,) or (T, I)
    ours = not (torch.is_grad_enabled() and (y.requires_grad or x.requires_grad))
    for slot, rows in zip(found.slots, found.by_slot, strict=True):
        weight, bias, own = of_slots[slot]
        if weight.is_cuda:  # the adapter may be unloaded before the device reads the weight
            for tensor in (weight, own):
                if tensor is not None:
                    tensor.record_stream(torch.cuda.current_stream(weight.device))
        if own is None:
            part = _product(rows_in[rows], weight, bias).to(y.dtype)
        else:
            part = _with_rows(flat[rows], rows_in[rows], weight, own)
        flat = flat.index_copy_(0, rows, part) if ours else flat.index_copy(0, rows, part)
    return flat.view(y.shape)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the product of ``weight`` with inputs ``(T, I)``, or embeddings of ids ``(T,)``."""
    if not x.is_floating_point():
        return F.embedding(x, weight)
    return F.linear(x.to(weight), weight, bias)


def _with_rows(y: Tensor, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Return outputs ``y (T, O)`` of a module as if ``rows (n,)`` of its weight were replaced.

    For an embedding, the outputs of the tokens of ``x (T,)`` that occur in ``rows`` change. For a
    head, the columns ``rows`` of ``y`` change.
    """
    if x.is_floating_point():
        return y.index_copy(1, rows, F.linear(x.to(weight), weight).to(y.dtype))
    same = x[:, None] == rows  # (T, n)
    own = weight[same.int().argmax(1)].to(y.dtype)
    return torch.where(same.any(1, keepdim=True), own, y)


class ReplacedBank:
    """Weights that replace one module in a captured step, at fixed addresses.

    Args:
        slab: data of the module in the pool; at least one adapter must replace the module.
        places: maximum number of adapters in a step that replace modules.
    """

    def __init__(self, slab: Any, places: int):
        self._slab = slab
        self._holds: list[Any] = [None] * places
        like = next(each for each in slab.replaced.values() if each.rows is None)
        with torch.inference_mode(False):
            self._weights = [torch.zeros_like(like.weight) for _ in range(places)]
            self._biases = [
                None if like.bias is None else torch.zeros_like(like.bias) for _ in range(places)
            ]
            self._active = torch.zeros(places, dtype=torch.bool, device=like.weight.device)

    def follow(self, residents: Sequence[Any]) -> None:
        """Copy to each place the weights of its adapter, if they have changed.

        Args:
            residents: adapter at each place, or None for an empty place.
        """
        for place, resident in enumerate(residents):
            whole = None if resident is None else self._slab.replaced.get(resident.slot)
            if self._holds[place] is whole:
                continue
            self._holds[place] = whole
            self._active[place] = whole is not None
            if whole is not None:
                self._weights[place].copy_(whole.weight)
                bias = self._biases[place]
                if bias is not None:
                    bias.zero_() if whole.bias is None else bias.copy_(whole.bias)

    def replaced(self, y: Tensor, x: Tensor, places: Tensor) -> Tensor:
        """Recompute rows of ``y (..., O)`` with the weights at their places; return the result.

        Args:
            y: output of the base module.
            x: input of the base module.
            places: place of each of the T rows, ``(T,)`` or longer; -1 for rows that keep ``y``.
        """
        flat = y.reshape(-1, y.shape[-1])  # (T, O)
        rows = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1)
        for place, weight in enumerate(self._weights):
            uses = (places[: len(flat)] == place) & self._active[place]  # (T,)
            own = _product(rows, weight, self._biases[place]).to(y.dtype)
            flat = torch.where(uses[:, None], own, flat)
        return flat.view(y.shape)


def _no_backward(_ctx: Any, *_grads: Any) -> Sequence[Tensor | None]:
    raise NotImplementedError(
        "attach: backward through a compiled graph is not supported if an adapter replaces a "
        "module (modules_to_save); call the model inside torch.no_grad(), or do not compile it"
    )


# This is an op like ``active_adapters``, because a compiled graph cannot read a ContextVar.
@traced(
    "replaced_rows(Tensor y, Tensor x, int handle, str name, bool tokens_first, SymInt[] batch, "
    "str? default) -> Tensor",
    fake=lambda y, *_: torch.empty_like(y),
    backward=(_no_backward, None),
    tags=READS_MORE,
)
def replaced_rows(y: Tensor, x: Tensor, *where: Any) -> Tensor:
    """Apply :func:`with_replaced` in a compiled graph, with the block in which the graph runs."""
    handle, name, tokens_first, batch, default = where
    block, y = _traced.block_of_graph(handle, default), y.clone()
    if block is None:
        return y
    with _context.forward_of(_traced.batch_of(batch)):
        replaced = block.lease.pool.modules[name].replaced
        return with_replaced(y, x, name, replaced, block, tokens_first)
