"""Batched multi-adapter LoRA on the rows of one matrix.

Letters: ``T`` tokens, ``I`` in, ``O`` out, ``R`` largest rank, ``A`` adapters, ``P`` pages, ``S``
segments. Every row of ``x`` names its adapter; ranks may differ, and each adapter is charged for
its own rank only.

Adapters come as a *bank*, ``a (A, R, I)`` and ``b (A, O, R)``, or as *pages* of eight ranks, ``a
(P, 8, I)`` and ``b (P, O, 8)``, found through ``page_table (A, R / 8)``: what
:class:`lora_ext.AdapterPool` holds.

Sources: LoRA (Hu et al. 2021), eq. 3; Punica (Chen et al. 2023), section 4; S-LoRA (Sheng et al.
2023).
"""

from typing import Any

import torch
from torch import Tensor

from lora_ext._torch import refuse_tangents
from lora_ext.reference import accumulator

from ._registration import backward, fake

_c = torch.ops.lora_ext


def lora_plan(adapter_ids: Tensor, num_adapters: int, num_valid: Tensor | None = None) -> Tensor:
    """Group the rows of a batch by adapter, once for all layers that see the batch.

    Args:
        adapter_ids: ``(T,)`` int64 or int32, each in ``[-1, A)``; -1 means no adapter.
        num_adapters: ``A``, the number of slots of the bank or pool.
        num_valid: one int32 on the device of ``adapter_ids``; rows at or beyond it count as -1. It
            lets a captured graph run a padded batch.

    Returns:
        int32 vector, opaque; pass it as ``plan=``. Its size depends on ``T`` and ``A`` alone.

    Raises:
        ValueError: on an id out of range (always on the CPU; on CUDA in debug mode, else it counts
            as -1).

    Source: S-LoRA, section 5.3 (sort by adapter); stable, without atomics, without a host sync.
    """
    return _c.lora_plan.default(adapter_ids, num_adapters, num_valid)


@fake("lora_plan")
def _fake_plan(adapter_ids: Tensor, num_adapters: int, num_valid: Tensor | None) -> Tensor:
    """Return ``LoraPlanLayout::size()`` of ``lora_ext/lora.h``; a symbolic number of rows is
    guarded."""
    rows = adapter_ids.shape[0]
    chunk = 16 if rows <= 256 else 64 if rows < 4096 else 128
    chunks = rows // chunk + min(rows, num_adapters)
    return adapter_ids.new_empty(8 + 4 * chunks + rows + num_adapters + 2, dtype=torch.int32)


def lora_segment_ids(seg_indptr: Tensor, seg_adapter: Tensor, num_tokens: int) -> Tensor:
    """Return the adapter id of each row, from contiguous segments.

    ``ids[t] = seg_adapter[s]`` for ``seg_indptr[s] <= t < seg_indptr[s + 1]``; rows outside get -1.

    Args:
        seg_indptr: ``(S + 1,)`` int32, not decreasing.
        seg_adapter: ``(S,)`` int32 on the same device.
        num_tokens: ``T``.

    Returns:
        ``(T,)`` int32.

    Raises:
        ValueError: if shapes or dtypes disagree, or (CPU) if ``seg_indptr`` decreases or leaves
            ``[0, T]``.

    Source: Punica, section 4 (segment indices of SGMV).
    """
    return _c.lora_segment_ids.default(seg_indptr, seg_adapter, num_tokens)


@fake("lora_segment_ids")
def _fake_segment_ids(seg_indptr: Tensor, seg_adapter: Tensor, num_tokens: int) -> Tensor:
    return seg_adapter.new_empty(num_tokens)


def lora_shrink(
    x: Tensor,
    a: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    page_table: Tensor | None = None,
    plan: Tensor | None = None,
) -> Tensor:
    """Project every row onto the rank space of its adapter.

    ``v[t] = scale[s] * a[s] @ x[t]`` with ``s = adapter_ids[t]``; ids of -1 give zero rows. The
    first half of :func:`lora_apply`, for callers that reduce ``v`` across devices.

    Args:
        x, a, adapter_ids, scale, ranks, page_table, plan: as for :func:`lora_apply`.

    Returns:
        ``(T, R)`` float32 (float64 for float64); zero beyond a row's rank.

    Raises:
        ValueError: if a shape, dtype or device disagrees, naming the argument.

    Source: Punica, section 4 (the shrink half of SGMV).
    """
    return _c.lora_shrink.default(x, a, adapter_ids, scale, ranks, page_table, plan)


@fake("lora_shrink")
def _fake_shrink(
    x: Tensor, a: Tensor, ids: Tensor, scale: Any, ranks: Any, page_table: Tensor | None, plan: Any
) -> Tensor:
    rank = a.shape[1] if page_table is None else 8 * page_table.shape[1]
    return x.new_empty(x.shape[0], rank, dtype=accumulator(x.dtype))


def lora_expand_(
    y: Tensor,
    v: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    ranks: Tensor | None = None,
    page_table: Tensor | None = None,
    plan: Tensor | None = None,
) -> Tensor:
    """Add the image of every row of ``v`` under its own adapter to ``y``, in place.

    ``y[t] = round(y[t] + b[s] @ v[t])``: one rounding; rows with id -1 stay unchanged.

    Args:
        y: ``(T, O)`` float16, bfloat16, float32, or float64 on the CPU; any row stride. It comes
            back, and shares no memory with another argument, as in :func:`lora_apply_`.
        v: ``(T, R)`` float32 (float64 for float64), from :func:`lora_shrink`.
        b, adapter_ids, ranks, page_table, plan: as for :func:`lora_apply`; b has the dtype of y.

    Raises:
        ValueError: if a shape, dtype or device disagrees, or ``y`` overlaps another argument,
            naming the argument.
        RuntimeError: if an argument requires gradients: this op has no backward.

    Source: Punica, section 4 (the expand half of SGMV).
    """
    _c.lora_expand_.default(y, v, b, adapter_ids, ranks, page_table, plan)
    return y


@fake("lora_expand_")
def _fake_expand_(y: Tensor, *args: Tensor | None) -> None:
    pass


def lora_apply(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    page_table: Tensor | None = None,
    plan: Tensor | None = None,
) -> Tensor:
    """Return the low-rank update of every row by its own adapter.

    ``y[t] = scale[s] * b[s] @ (a[s] @ x[t])`` with ``s = adapter_ids[t]``; ids of -1 give zero
    rows. Differentiable once in ``x``, ``a`` and ``b``, by the kernels of :func:`lora_linear`.

    Args:
        x: ``(T, I)`` float16, bfloat16, float32, or float64 on the CPU; any row stride.
        a: bank ``(A, R, I)``, or pages ``(P, 8, I)`` with ``page_table``; dtype and device of
            ``x``.
        b: bank ``(A, O, R)``, or pages ``(P, O, 8)``; dtype and device of ``x``.
        adapter_ids: ``(T,)`` int64 or int32, each in ``[-1, A)``.
        scale: ``(A,)`` float32, or None for 1.
        ranks: ``(A,)`` int32 in ``[0, R]``, or None for ``R`` (required with pages). What lies
            beyond an adapter's rank is neither read nor given a gradient.
        page_table: ``(A, R / 8)`` int32, the page of each eight ranks, -1 where there is none.
        plan: :func:`lora_plan` of the same ids, to save grouping them again.

    Returns:
        ``(T, O)`` in the dtype of ``x``, accumulated in float32 (float64 stays float64).

    Raises:
        ValueError: if a shape, dtype or device disagrees, naming the argument.
        NotImplementedError: if an argument has a tangent of forward mode.

    Source: LoRA (Hu et al. 2021), eq. 3; Punica (Chen et al. 2023), section 4.
    """
    refuse_tangents("lora_apply", x, a, b, scale)
    return _c.lora_apply.default(x, a, b, adapter_ids, scale, ranks, page_table, plan)


@fake("lora_apply")
def _fake_apply(x: Tensor, a: Tensor, b: Tensor, *args: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[1])


def _save_apply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@backward("lora_apply", save=_save_apply)
def _apply_backward(library: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``lora_linear`` without a base; of pages, dx alone.

    For pages ``dx = a^T dv`` is the op itself with the factors exchanged.
    """
    x, a, b, adapter_ids, scale, ranks, page_table, plan = ctx.saved_tensors
    need_dx, need_da, need_db = ctx.needs_input_grad[:3]
    if any(ctx.needs_input_grad[3:]):
        raise NotImplementedError("lora_apply: scale receives no gradient")
    if page_table is not None:
        if need_da or need_db:
            raise NotImplementedError("lora_apply: pages receive no gradient; train a bank instead")
        a_t, b_t = (t.transpose(1, 2).contiguous() for t in (a, b))
        dx = library.lora_apply(dy, b_t, a_t, adapter_ids, scale, ranks, page_table, plan)
        return dx, *(None,) * 7
    if plan is None:
        plan = library.lora_plan(adapter_ids, a.shape[0])
    if need_db:
        v = library.lora_shrink(x, a, adapter_ids, scale, ranks, None, plan)
    else:
        v = x.new_empty(x.shape[0], a.shape[1], dtype=accumulator(x.dtype))
    grads = library.lora_linear_backward(
        dy, x, v, None, a, b, adapter_ids, scale, ranks, plan, 0.0, None, need_dx, need_da, need_db
    )
    needs = (need_dx, need_da, need_db)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 5


def lora_apply_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    page_table: Tensor | None = None,
    plan: Tensor | None = None,
) -> Tensor:
    """Add the low-rank update of every row to ``y`` in place: the op that serving uses.

    ``y[t] = round(y[t] + scale[s] * b[s] @ (a[s] @ x[t]))``: one rounding; rows with id -1, and
    rows whose adapter has rank 0, stay unchanged.

    Args:
        y: ``(T, O)``, dtype and device of ``x``; any row stride. It comes back, and shares no
            memory with another argument, though it may lie between their rows, as the columns of
            one buffer do.
        x, a, b, adapter_ids, scale, ranks, page_table, plan: as for :func:`lora_apply`.

    Raises:
        ValueError: if a shape, dtype or device disagrees, or ``y`` overlaps another argument,
            naming the argument.
        RuntimeError: if an argument requires gradients: use :func:`lora_apply`.

    Source: Punica (Chen et al. 2023), section 4; S-LoRA (Sheng et al. 2023), section 5.
    """
    _c.lora_apply_.default(y, x, a, b, adapter_ids, scale, ranks, page_table, plan)
    return y


@fake("lora_apply_")
def _fake_apply_(y: Tensor, *args: Tensor | None) -> None:
    pass


def bgmv_(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, adapter_ids: Tensor, scale: Tensor | None = None
) -> Tensor:
    """Batched gather matrix-vector product: :func:`lora_apply_` of banks under Punica's first name.

    Args:
        y: ``(T, O)``, changed in place, and comes back.
        x: ``(T, I)``.
        a: ``(A, R, I)``.
        b: ``(A, O, R)``.
        adapter_ids: ``(T,)`` in ``[-1, A)``, -1 for none.
        scale: ``(A,)`` float32, or None for 1.

    Raises:
        ValueError: as :func:`lora_apply_`.

    Source: Punica (Chen et al. 2023), section 4.
    """
    return lora_apply_(y, x, a, b, adapter_ids, scale)


def sgmv_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    seg_indptr: Tensor,
    seg_adapter: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """Segmented gather matrix-vector product: :func:`lora_apply_` on contiguous segments.

    Args:
        y, x, a, b, scale: as for :func:`lora_apply_`, banks alone; ``y`` comes back.
        seg_indptr: ``(S + 1,)`` int32 on the device of ``x``; rows outside all segments are left
            alone.
        seg_adapter: ``(S,)`` int32, the adapter of each segment, -1 for none.

    Raises:
        ValueError: as :func:`lora_segment_ids` and :func:`lora_apply_`.

    Source: Punica (Chen et al. 2023), section 4.
    """
    ids = lora_segment_ids(seg_indptr, seg_adapter, x.shape[0])
    return lora_apply_(y, x, a, b, ids, scale)
