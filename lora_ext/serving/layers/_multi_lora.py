"""MultiLoraLinear: a linear layer in which each row may use a different adapter of a pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._torch import compiles
from lora_ext.layers import MAX_CUDA_ROWS, PackedLinear, is_plain, limits_rows
from lora_ext.rows import Block, Pool, PoolLayer, Rows, _traced, current, untouched

from ._pool_after import PoolAfter, Rescale, rescaled
from ._pool_replaced import replaced_rows, with_replaced

_packed_forward = PackedLinear.forward  # to detect whether it was replaced


class MatrixLayer(PoolLayer):
    """Base class of layers with one matrix, to which adapters with factors A and B apply."""

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
        if not traced and y.requires_grad:
            self.watch_backward(y)
        return y

    def updated(self, x: Tensor, rows: Rows, block: Block | None) -> Tensor:
        """Return the base module's output for input ``x`` plus the update of each row's adapter.

        ``block`` is None in a compiled graph.
        """
        raise NotImplementedError


class MultiLoraLinear(MatrixLayer):
    """Linear layer that adds to each row the update of one adapter, or of a mixture, of a pool.

    Computes ``y[t] = base(x[t]) + scale[s] * (B[s] A[s] x[t] + bias[s])``, where ``s`` is the slot
    of row ``t``'s adapter. For a mixture, it adds the weighted sum over the mixture's adapters. If
    an adapter scales its outputs, ``y[t]`` is rescaled (``_pool_after.py``).

    The adapters of the rows are those of the surrounding block :func:`lora_ext.adapters`. Outside
    every block all rows use the ``default`` of :func:`attach`. The layer is for inference:
    gradients of ``x`` are computed, but adapters in a pool are not trained.

    Args:
        base: ``nn.Linear``, transformers' ``Conv1D``, or any module that maps (..., I) to a new
            tensor (..., O).
        pool: :class:`lora_ext.AdapterPool` that contains the adapters.
        name: name of the module in the pool.
    """

    def __init__(self, base: nn.Module, pool: Pool, name: str):
        super().__init__(base, pool, name)
        self.after = PoolAfter(base, self.slab, name)

    def updated(self, x: Tensor, rows: Rows, block: Block | None) -> Tensor:
        """Return the base module's output for input ``x`` plus the update of each row's adapter."""
        slab, rescale = self.slab, None
        if slab.before is not None:  # scales of inputs; 1 for rows whose adapter has none
            x = (x * slab.before[rows.ids.long()].view(x.shape)).to(x.dtype)
        if block is not None and slab.after is None and self.siblings is None:
            total = packed_sum(self.base, x, slab, rows)
            if total is not None:
                return total
        y = self.base(x)
        if slab.after is not None and block is not None:
            rescale = self.after.rescale(block, x.shape[:-1], x.device, self.tokens_first)
        elif slab.after is not None:
            rescale = self.after.traced_rescale(self, x.shape[:-1], x.device)
        try:
            if self.siblings is not None and block is not None:
                fused = self.siblings.fused_output(self, x, y, rows)
                if fused is not None:
                    return fused
            return add_adapters(y, x, slab, rows, rescale)
        except ValueError as error:
            remedy = "create the pool after moving the model, or pass device= and dtype="
            kept = f"a pool keeps the dtypes and devices that its model had at first; {remedy}"
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
    """Return the arguments ``scale`` and ``groups`` of an op on rows with these weights."""
    if not has_mixtures(slab, weights):
        return slab.page_scale if slab.float8 else slab.scale, None
    return slab.page_scale, None if weights is None else slab.groups


def update_of(slab: Any, rows: Rows) -> tuple[Any, ...]:
    """Return the arguments of ``ops.lora_apply_`` after ``x``, by position."""
    (_, ids, plan, weights), scale, groups = rows, slab.scale, None
    if weights is not None or slab.mixed > 1 or slab.float8:
        scale, groups = scale_and_groups(slab, weights)
    pages = slab.a_pages, slab.b_pages
    return *pages, ids, scale, slab.ranks, slab.page_table, plan, weights, groups


def add_adapters(
    y: Tensor, x: Tensor, slab: Any, rows: Rows, rescale: Rescale | None = None
) -> Tensor:
    """Add the update of each row to ``y (..., O)``, in place if possible, and return the sum.

    A decode step calls this function hundreds of times, so the time of each line was measured.
    """
    *update, weights, groups = update_of(slab, rows)
    dtype = slab.dtype
    differentiable = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    if y.dtype == dtype == x.dtype and y.is_contiguous() and not differentiable:
        # y may be changed, because base has just made it. A view takes less time than a reshape.
        i = slab.in_features
        x2d = x.view(-1, i) if x.is_contiguous() else x.reshape(-1, i)  # (T, I)
        ops.lora_apply_(y.view(-1, y.shape[-1]), x2d, *update, weights=weights, groups=groups)
        if rescale is not None:
            y = rescaled(y, rescale)
    else:
        # Under autocast, or if the dtypes of the model and the pool differ, the update is computed
        # in the pool's dtype, and the sum is rounded once to the dtype of y.
        x2d = x.reshape(-1, slab.in_features).to(dtype)  # (T, I)
        delta = ops.lora_apply(x2d, *update, weights=weights, groups=groups)  # (T, O)
        total = y + delta.view(y.shape)
        y = (total if rescale is None else rescaled(total, rescale)).to(y.dtype)
    if slab.bias is not None:
        y = with_bias(y, slab, rows)
    return y


def packed_sum(base: nn.Module, x: Tensor, slab: Any, rows: Rows) -> Tensor | None:
    """Return ``add_adapters(base(x), x, slab, rows)``, computed by one op from a packed copy.

    Returns None if ``base`` has no copy for ``x`` or does more than a product, if the update needs
    another dtype, or if the op raises ValueError: :func:`add_adapters` then raises one, too.
    """
    a, many = slab.a_pages, limits_rows(x) and x.numel() > MAX_CUDA_ROWS * slab.in_features
    if type(base) is not PackedLinear or many or slab.dtype != x.dtype or a.device != x.device:
        return None
    own_call = base._compiled_call_impl is None and PackedLinear.forward is _packed_forward
    product = base.packed_operands(x, counts=False) if own_call and is_plain(base) else None
    if product is None:
        return None
    try:
        y = ops.packed_lora_linear(x, product, update_of(slab, rows))
    except ValueError:
        return None
    return y if slab.bias is None else with_bias(y, slab, rows)


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
    total: Tensor = y.reshape(len(ids), -1)
    for k, own in enumerate(columns.unbind(1)):
        one = own.clamp(min=0)
        bias = slab.bias[one] * slab.scale[one].unsqueeze(1)  # (T, O)
        if weights is not None:
            bias = bias * weights[:, k : k + 1]
        uses = (ids >= 0) & (own >= 0) & (slab.ranks[one] > 0)  # (T,)
        total = torch.where(uses.unsqueeze(1), total + bias, total)
    return total.to(y.dtype).view(y.shape)
