"""MultiLoraEmbedding: an embedding in which each row may use a different adapter of a pool."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext import ops
from lora_ext.rows import Block, Rows

from ._multi_lora import MatrixLayer, scale_and_groups


class MultiLoraEmbedding(MatrixLayer):
    """Embedding that adds the update of one adapter of a pool to each row.

    Computes ``y[t] = base(x[t]) + scale[s] * B[s] A[s][:, x[t]]``, where ``s`` is the slot of row
    ``t``'s adapter. Adapters get no gradients.

    Args:
        base: ``nn.Embedding`` to replace.
        pool: :class:`lora_ext.AdapterPool` that contains the adapters.
        name: name of the module in the pool.
    """

    of_tokens = True

    def updated(self, x: Tensor, rows: Rows, block: Block | None) -> Tensor:
        """Return ``(..., O)``: the base module's output plus the update of each row's adapter."""
        y, x, slab = self.base(x), x.reshape(-1), self.slab
        _, ids, plan, weights = rows
        b, ranks, table = slab.b_pages, slab.ranks, slab.page_table
        with torch.no_grad():
            slot = ids.clamp(min=0)
            # Read page 0 for missing pages (-1) and for the base model: pages of slots without an
            # adapter may be unmapped. Values after the rank are not used.
            pages = table[slot].where(ids.unsqueeze(1) >= 0, 0).clamp(min=0).long()  # (T, n)
            v = slab.a_pages[pages, :, x.long().unsqueeze(1)]  # (T, n, 8)
            v = v.to(torch.promote_types(slab.dtype, torch.float32))
            scale, groups = scale_and_groups(slab, weights)
            v = v * scale[slot].view(len(slot), -1, 1)  # one scale, or one per page
            if weights is not None:
                if groups is not None:  # base model rows read slot 0, which may have more groups
                    weights = weights.gather(1, groups[slot].long().clamp(max=weights.shape[1] - 1))
                v = v * weights[..., None]
            v = v.flatten(1)  # (T, R)
        if (
            y.dtype == slab.dtype
            and y.is_contiguous()
            and not (torch.is_grad_enabled() and y.requires_grad)
        ):
            # y may be changed, because base has just made it.
            ops.lora_expand_(y.view(-1, y.shape[-1]), v, b, ids, ranks, table, plan)
            return y
        delta = torch.zeros(len(x), slab.out_features, dtype=slab.dtype, device=x.device)
        ops.lora_expand_(delta, v, b, ids, ranks, table, plan)
        uses = ((ids >= 0) & (ranks[slot] > 0)).view(*y.shape[:-1], 1)
        return torch.where(uses, (y + delta.view(y.shape)).to(y.dtype), y)
