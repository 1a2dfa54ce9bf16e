"""MultiLoraLinear: a linear layer in which each row may use a different adapter of a pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._torch import compiles
from lora_ext.rows import Pool, PoolLayer, Rows, current, pool_rows, untouched

from ._pool_after import PoolAfter, Rescale, rescaled
from ._pool_replaced import traced_replaced, with_replaced


class MultiLoraLinear(PoolLayer):
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

    #: A ``Siblings`` of ``_siblings.py``, which imports this file; None without ``fuse_siblings``.
    siblings: Any = None

    def __init__(self, base: nn.Module, pool: Pool, name: str):
        super().__init__(base, pool, name)
        self.after = PoolAfter(base, self.slab, name)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        traced = compiles()
        siblings = None if traced else self.siblings
        if siblings is not None:
            finished = siblings.take_output(self, x)
            if finished is not None:
                return finished
        slab = self.slab
        if slab.before is not None:
            x = self._before(x, traced)
        y = self.base(x)
        if slab.a_pages is None and not slab.was_replaced:
            if not traced:
                untouched(self.pool, x.device)
            return y
        if traced:
            return self._traced(y, x)
        block = current(self.handle)
        if block is None:
            return y if self.default is None else self.by_default(x)
        if self.is_head and block.head is not None:
            block = block.head
        leading = x.shape[:-1]
        rows = self.rows_in(block, leading, x.device)
        if not rows.used:  # all rows belong to the base model
            return y
        if slab.a_pages is not None:
            rescale = None
            if slab.after is not None:
                rescale = self.after.rescale(block, leading, x.device, self.tokens_first)
            try:
                fused = None if siblings is None else siblings.fused_output(self, x, y, rows)
                if fused is not None:
                    return fused
                y = add_adapters(y, x, slab, rows.ids, rows.plan, rescale, rows.weights)
                if y.requires_grad:
                    self.watch_backward(y)
            except ValueError as error:
                raise self._explained(error) from error
            except AttributeError as error:
                if isinstance(y, Tensor):
                    raise
                raise NotImplementedError(
                    f"MultiLoraLinear: {self.name}: expected a module that returns one tensor, "
                    f"found a {type(self.base).__name__}, which returns a {type(y).__name__}"
                ) from error
        if slab.was_replaced:
            y = with_replaced(y, x, self.name, slab.replaced, block, self.tokens_first)
        return y

    def _before(self, x: Tensor, traced: bool) -> Tensor:
        """Scale the input of rows with an adapter that scales inputs."""
        leading = x.shape[:-1]
        if traced:
            ids = traced_rows(self, leading, x.device).ids
        else:
            block = current(self.handle)
            if block is None:  # if there is a default, this layer is called again in its block
                return x
            if self.is_head and block.head is not None:
                block = block.head
            rows = self.rows_in(block, leading, x.device)
            if not rows.used:
                return x
            ids = rows.ids
        return (x * self.slab.before[ids.long()].view(x.shape)).to(x.dtype)

    def _traced(self, y: Tensor, x: Tensor) -> Tensor:
        slab, leading = self.slab, x.shape[:-1]
        if slab.a_pages is not None:
            rows = traced_rows(self, leading, x.device)
            rescale = None
            if slab.after is not None:
                rescale = self.after.traced_rescale(self, leading, x.device)
            y = add_adapters(y, x, slab, rows.ids, rows.plan, rescale, rows.weights)
        return traced_replaced(y, x, self) if slab.was_replaced else y

    def _explained(self, error: ValueError) -> ValueError:
        return ValueError(
            f"MultiLoraLinear: {self.name}: {error} (a pool keeps the dtypes and devices of the "
            "model it was made for; make it after moving the model, or pass device= and dtype=)"
        )


def traced_rows(
    layer: PoolLayer, leading: torch.Size, device: torch.device, of_tokens: bool = False
) -> Rows:
    """Return the rows of a layer's input in a compiled graph, like :meth:`PoolLayer.rows_in`.

    Their adapters are those of the block in which the graph runs.
    """
    slots, turned, mixed = layer.pool.max_slots, layer.tokens_first, layer.slab.mixed
    more = turned, of_tokens, layer.default_text, mixed
    return pool_rows(layer.handle, leading, device, slots, *more)


def has_mixtures(slab: Any, weights: Tensor | None) -> bool:
    """Return whether rows with these weights may use a mixture."""
    return slab.mixed > 1 if weights is None else weights.shape[1] > 1


def scale_and_groups(slab: Any, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the ``scale`` and ``groups`` of a module for an op on rows with these weights."""
    if not has_mixtures(slab, weights):
        return slab.scale, None
    return slab.page_scale, None if weights is None else slab.groups


def add_adapters(
    y: Tensor,
    x: Tensor,
    slab: Any,
    ids: Tensor,
    plan: Tensor,
    rescale: Rescale | None,
    weights: Tensor | None,
) -> Tensor:
    """Add the update of each row to ``y (..., O)``, in place if possible, and return the sum.

    A decode step calls this function hundreds of times, so the time of each line was measured.
    """
    a, b = slab.a_pages, slab.b_pages
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
        y = with_bias(y, slab, ids, weights)
    return y


def with_bias(y: Tensor, slab: Any, ids: Tensor, weights: Tensor | None) -> Tensor:
    """Return ``y`` plus the scaled bias of each row's adapter (PEFT's ``lora_bias``).

    For a mixture, the weighted biases of its adapters are added in order, and the sum is rounded
    once. Rows without an adapter in this module are unchanged.
    """
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
