"""MultiLoraEmbedding: an embedding in which each row may use a different adapter of a pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_ext import ops
from lora_ext._torch import compiles
from lora_ext.rows import PoolLayer, Rows, current, untouched

from ._multi_lora import scale_and_groups, traced_rows
from ._pool_replaced import traced_replaced, with_replaced


class MultiLoraEmbedding(PoolLayer):
    """Embedding that adds the update of one adapter of a pool to each row.

    Computes ``y[t] = base(x[t]) + scale[s] * B[s] A[s][:, x[t]]``, where ``s`` is the slot of row
    ``t``'s adapter. Adapters get no gradients.

    Args:
        base: the ``nn.Embedding`` to replace.
        pool: the :class:`lora_ext.AdapterPool`.
        name: name of the module in the pool.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map token ids (...) to (..., O)."""
        y = self.base(x)
        slab = self.slab
        traced = compiles()
        if slab.a_pages is None and not slab.was_replaced:
            if not traced:
                untouched(self.pool, x.device)
            return y
        if traced:
            return self._traced(y, x)
        block = current(self.handle)
        if block is None:
            return y if self.default is None else self.by_default(x)
        rows = self.rows_in(block, x.shape, x.device, of_tokens=True)
        if not rows.used:  # all rows belong to the base model
            return y
        if slab.a_pages is not None:
            y = _add_adapters(y, x.reshape(-1), slab, rows)
            self.watch_backward(y)
        if slab.was_replaced:
            y = with_replaced(y, x, self.name, slab.replaced, block, self.tokens_first)
        return y

    def _traced(self, y: Tensor, x: Tensor) -> Tensor:
        slab = self.slab
        if slab.a_pages is not None:
            rows = traced_rows(self, x.shape, x.device, of_tokens=True)
            y = _add_adapters(y, x.reshape(-1), slab, rows)
        return traced_replaced(y, x, self) if slab.was_replaced else y


def _add_adapters(y: Tensor, x: Tensor, slab: Any, rows: Rows) -> Tensor:
    _, ids, plan, weights = rows
    b, ranks, table = slab.b_pages, slab.ranks, slab.page_table
    with torch.no_grad():
        slot = ids.clamp(min=0)
        # A missing page is -1. Page 0 is read in this case, as values beyond the rank are not used.
        pages = table[slot].clamp(min=0).long()  # (T, n)
        v = slab.a_pages[pages, :, x.long().unsqueeze(1)]  # (T, n, 8)
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        scale, groups = scale_and_groups(slab, weights)
        v = v * scale[slot].view(len(slot), -1, 1)  # one scale, or one per page
        if weights is not None:
            if groups is not None:  # a row of the base model may read the groups of a wider mixture
                weights = weights.gather(1, groups[slot].long().clamp(max=weights.shape[1] - 1))
            v = v * weights[..., None]
        v = v.flatten(1)  # (T, R)
    if (
        y.dtype == b.dtype
        and y.is_contiguous()
        and not (torch.is_grad_enabled() and y.requires_grad)
    ):
        # y may be changed, because base has just made it.
        ops.lora_expand_(y.view(-1, y.shape[-1]), v, b, ids, ranks, table, plan)
        return y
    delta = torch.zeros(len(x), slab.out_features, dtype=b.dtype, device=x.device)
    ops.lora_expand_(delta, v, b, ids, ranks, table, plan)
    uses = ((ids >= 0) & (ranks[slot] > 0)).view(*y.shape[:-1], 1)
    return torch.where(uses, (y + delta.view(y.shape)).to(y.dtype), y)
