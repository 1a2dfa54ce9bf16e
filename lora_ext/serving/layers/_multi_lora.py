"""MultiLoraLinear: a linear layer in which each row may use a different adapter of a pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._torch import compiles
from lora_ext.rows import Block, Pool, PoolLayer, Rows, _traced, current, untouched

from ._pool_after import PoolAfter, Rescale, rescaled
from ._pool_replaced import replaced_rows, with_replaced


class MatrixLayer(PoolLayer):
    """Layer with one matrix. The pool adds the update of two factors to its output."""

    #: A ``Siblings`` of ``_siblings.py``, which imports this file; None without ``fuse_siblings``.
    siblings: Any = None
    #: True if the input is token ids (...), False if it is features (..., I).
    of_tokens = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I), or token ids (...), to (..., O)."""
        slab, traced = self.slab, compiles()
        if self.siblings is not None and not traced:
            finished = self.siblings.take_output(self, x)
            if finished is not None:
                return finished
        if slab.a_pages is None and not slab.was_replaced:
            if not traced:
                untouched(self.pool, x.device)
            return self.base(x)
        leading, block = x.shape if self.of_tokens else x.shape[:-1], None
        if traced:
            where = leading, x.device, self.pool.max_slots, self.tokens_first, self.of_tokens
            rows = _traced.pool_rows(self.handle, *where, self.default_text, slab.mixed)
        else:
            block = current(self.handle)
            if block is None:
                return self.base(x) if self.default is None else self.by_default(x)
            if self.is_head and block.head is not None:
                block = block.head
            rows = self.rows_in(block, leading, x.device, self.of_tokens)
            if not rows.used:  # all rows belong to the base model
                return self.base(x)
        y = self.base(x) if slab.a_pages is None else self.updated(x, rows, block)
        if slab.was_replaced and block is not None:
            y = with_replaced(y, x, self.name, slab.replaced, block, self.tokens_first)
        elif slab.was_replaced:
            where = self.handle, self.name, self.tokens_first, _traced.tracing.batch
            y = replaced_rows(y, x, *where, self.default_text)
        if not traced:
            self.watch_backward(y)
        return y

    def updated(self, x: Tensor, rows: Rows, block: Block | None) -> Tensor:
        """Return the base module's output with the update of each row's adapter.

        ``block`` is None in a compiled graph.
        """
        raise NotImplementedError


class MultiLoraLinear(MatrixLayer):
    """Linear layer that adds the update of one adapter, or of a mixture, of a pool to each row.

    Computes ``y[t] = base(x[t]) + scale[s] * (B[s] A[s] x[t] + bias[s])``, where ``s`` is the slot
    of row ``t``'s adapter; for a mixture, the weighted sum over its adapters. If the adapter scales
    its outputs, the sum is rescaled: :mod:`lora_ext.serving.layers._pool_after`.

    The adapters of the rows are those of the surrounding block :func:`lora_ext.adapters`. Outside
    every block all rows use the ``default`` of :func:`attach`. The layer is for inference:
    gradients of ``x`` are computed, but adapters in a pool are not trained.

    Args:
        base: ``nn.Linear``, transformers' ``Conv1D``, or any module that maps (..., I) to a new
            tensor (..., O).
        pool: the :class:`lora_ext.AdapterPool`.
        name: name of the module in the pool.
    """

    def __init__(self, base: nn.Module, pool: Pool, name: str):
        super().__init__(base, pool, name)
        self.after = PoolAfter(base, self.slab, name)

    def updated(self, x: Tensor, rows: Rows, block: Block | None) -> Tensor:
        """Return the base module's output with the update of each row's adapter."""
        slab, leading, rescale = self.slab, x.shape[:-1], None
        if slab.before is not None:  # an adapter scales its inputs; 1 for all other rows
            x = (x * slab.before[rows.ids.long()].view(x.shape)).to(x.dtype)
        y = self.base(x)
        if slab.after is not None and block is not None:
            rescale = self.after.rescale(block, leading, x.device, self.tokens_first)
        elif slab.after is not None:
            rescale = self.after.traced_rescale(self, leading, x.device)
        try:
            if self.siblings is not None and block is not None:
                fused = self.siblings.fused_output(self, x, y, rows)
                if fused is not None:
                    return fused
            return add_adapters(y, x, slab, rows, rescale)
        except ValueError as error:
            remedy = "make it after moving the model, or pass device= and dtype="
            kept = f"a pool keeps the dtypes and devices of the model it was made for; {remedy}"
            raise ValueError(f"MultiLoraLinear: {self.name}: {error} ({kept})") from error
        except AttributeError as error:
            if isinstance(y, Tensor):
                raise
            raise NotImplementedError(
                f"MultiLoraLinear: {self.name}: expected a module that returns one tensor, "
                f"found a {type(self.base).__name__}, which returns a {type(y).__name__}"
            ) from error


def has_mixtures(slab: Any, weights: Tensor | None) -> bool:
    """Return whether rows with these weights may use a mixture."""
    return slab.mixed > 1 if weights is None else weights.shape[1] > 1


def scale_and_groups(slab: Any, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the ``scale`` and ``groups`` of a module for an op on rows with these weights."""
    if not has_mixtures(slab, weights):
        return slab.scale, None
    return slab.page_scale, None if weights is None else slab.groups


def add_adapters(
    y: Tensor, x: Tensor, slab: Any, rows: Rows, rescale: Rescale | None = None
) -> Tensor:
    """Add the update of each row to ``y (..., O)``, in place if possible, and return the sum.

    A decode step calls this function hundreds of times, so the time of each line was measured.
    """
    (_, ids, plan, weights), a, b = rows, slab.a_pages, slab.b_pages
    scale, groups, ranks, table = slab.scale, None, slab.ranks, slab.page_table
    if weights is not None or slab.mixed > 1:
        scale, groups = scale_and_groups(slab, weights)
    dtype = a.dtype
    differentiable = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    if y.dtype == dtype == x.dtype and y.is_contiguous() and not differentiable:
        # y may be changed, because base has just made it. A view takes less time than a reshape.
        i = slab.in_features
        x2d = x.view(-1, i) if x.is_contiguous() else x.reshape(-1, i)  # (T, I)
        flat, rest = y.view(-1, y.shape[-1]), (scale, ranks, table, plan)
        ops.lora_apply_(flat, x2d, a, b, ids, *rest, weights=weights, groups=groups)
        if rescale is not None:
            y = rescaled(y, rescale)
    else:
        # Under autocast, or if the dtypes of the model and the pool differ, the update is computed
        # in the pool's dtype, and the sum is rounded once to the dtype of y.
        x2d = x.reshape(-1, slab.in_features).to(dtype)  # (T, I)
        rest = ids, scale, ranks, table, plan
        delta = ops.lora_apply(x2d, a, b, *rest, weights=weights, groups=groups)  # (T, O)
        total = y + delta.view(y.shape)
        if rescale is not None:
            total = rescaled(total, rescale)
        y = total.to(y.dtype)
    if slab.bias is not None:
        y = with_bias(y, slab, rows)
    return y


def with_bias(y: Tensor, slab: Any, rows: Rows) -> Tensor:
    """Return ``y`` plus the scaled bias of each row's adapter (PEFT's ``lora_bias``).

    For a mixture, the weighted biases of its adapters are added in order, and the sum is rounded
    once. Rows without an adapter in this module are unchanged.
    """
    _, ids, _, weights = rows
    slot = ids.clamp(min=0)
    columns = slot.unsqueeze(1)  # (T, K)
    if has_mixtures(slab, weights):
        columns = slab.members[slot][:, : slab.mixed if weights is None else weights.shape[1]]
    flat = y.reshape(len(ids), -1)
    total: Tensor = flat
    for k, own in enumerate(columns.unbind(1)):
        one = own.clamp(min=0)
        bias = slab.bias[one] * slab.scale[one].unsqueeze(1)  # (T, O)
        if weights is not None:
            bias = bias * weights[:, k : k + 1]
        uses = (ids >= 0) & (own >= 0) & (slab.ranks[one] > 0)  # (T,)
        total = torch.where(uses.unsqueeze(1), total + bias, total)
    return total.to(y.dtype).view(y.shape)
