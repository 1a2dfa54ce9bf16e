"""Batched multi-adapter LoRA on the rows of one matrix.

Letters: ``T`` tokens (rows), ``I`` input features, ``O`` output features, ``R`` largest rank, ``A``
adapters, ``P`` pages, ``S`` segments of consecutive rows.

The adapter of each row of ``x`` is selected by an id. Adapters may have different ranks; the cost
of an adapter depends only on its own rank. Adapters are stored in a *bank*, ``a (A, R, I)`` and
``b (A, O, R)``, or in *pages* of eight ranks, ``a (P, 8, I)`` and ``b (P, O, 8)``. ``page_table
(A, R / 8)`` contains the pages of each adapter, as in :class:`lora_ext.AdapterPool`.

A row may also have a weight, or several adapters with one weight each:
``y[t] = sum_k weights[t, k] * scale[s] * b[s] @ (a[s] @ x[t])`` with ``s = adapter_ids[t, k]`` for
``adapter_ids (T, K)``, ``K`` from 1 to 64. Entries of -1 add nothing, and their weight is not read.
The ``K`` columns are added in order; an output of 16 bits is rounded once per column. With
``adapter_ids (T,)`` the pages of an adapter may have different factors: ``scale (A, R / 8)``, one
number per eight ranks, and ``groups (A, R / 8)``, the column of ``weights (T, G)`` for these ranks.
If an id selects pages of several adapters, the result is their weighted sum, rounded once. Factors
are multiplied in the order ``(scale * (a[s] @ x[t])) * weight``, so a weight of 1 changes no bit.

Sources: LoRA (Hu et al. 2021), eq. 3; Punica (Chen et al. 2023), section 4; S-LoRA (Sheng et al.
2023).
"""

from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import require
from lora_ext._torch import compiles, refuse_tangents
from lora_ext.reference import accumulator

from ._registration import backward, direct, fake

_c = torch.ops.lora_ext


def lora_plan(adapter_ids: Tensor, num_adapters: int, num_valid: Tensor | None = None) -> Tensor:
    """Group the rows of a batch by adapter, once for all layers that receive the batch.

    Args:
        adapter_ids: Adapter id of each row, ``(T,)`` or ``(T, K)`` int64 or int32 in ``[-1, A)``;
            -1 means no adapter.
        num_adapters: Number ``A`` of adapters of the bank, or of rows of the page table.
        num_valid: Number of valid rows, one int32 on the device of ``adapter_ids``, or None for all
            rows. Rows after these are treated as if their id were -1, so that a captured graph can
            run a padded batch. For float8 pages, their ids must be -1 or adapters with pages.

    Returns:
        Opaque int32 vector to pass as ``plan``. Its size depends only on the shape of the ids and
        on ``A``. For ids ``(T, K)`` it contains the plans of the ``K`` columns.

    Raises:
        ValueError: If an id is out of range. On CUDA this is checked only in debug mode; otherwise
            the id is treated as -1.

    Source: S-LoRA, section 5.3 (sort by adapter). The sort is stable, and uses neither atomics nor
    a host synchronisation.
    """
    return _c.lora_plan.default(adapter_ids, num_adapters, num_valid)


@fake("lora_plan")
def _fake_plan(adapter_ids: Tensor, num_adapters: int, num_valid: Tensor | None) -> Tensor:
    """Return an uninitialised plan of ``LoraPlanLayout::size()`` numbers.

    If ``T`` is symbolic, the comparisons add guards to the graph.
    """
    rows = adapter_ids.shape[0]
    chunk = 16 if rows <= 256 else 64 if rows < 4096 else 128
    chunks = rows // chunk + min(rows, num_adapters)
    columns = adapter_ids.shape[1] if adapter_ids.dim() == 2 else 1
    size = 8 + 4 * chunks + rows + num_adapters + 2
    return adapter_ids.new_empty(columns * size, dtype=torch.int32)


def lora_segment_ids(seg_indptr: Tensor, seg_adapter: Tensor, num_tokens: int) -> Tensor:
    """Convert contiguous segments of rows to the adapter id of each row.

    ``ids[t] = seg_adapter[s]`` for ``seg_indptr[s] <= t < seg_indptr[s + 1]``; rows outside all
    segments get -1.

    Args:
        seg_indptr: Bounds of the segments, ``(S + 1,)`` int32, not decreasing.
        seg_adapter: Adapter id of each segment, ``(S,)`` int32 on the same device.
        num_tokens: Number ``T`` of rows.

    Returns:
        ``(T,)`` int32.

    Raises:
        ValueError: If a shape or dtype is wrong or, on the CPU, ``seg_indptr`` decreases or leaves
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
    *,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Project every row onto the rank space of its adapter.

    ``v[t] = weights[t] * scale[s] * a[s] @ x[t]`` with ``s = adapter_ids[t]``; rows with id -1 are
    zero. This is the first half of :func:`lora_apply`, for callers that reduce ``v`` across
    devices.

    Args:
        x: Input ``(T, I)``, see :func:`lora_apply`.
        a: Bank or pages, see :func:`lora_apply`.
        adapter_ids: Adapter id of each row, ``(T,)`` or ``(T, K)``.
        scale: Scale of each adapter, ``(A,)`` or ``(A, R / 8)`` float32, see :func:`lora_apply`.
        ranks: Rank of each adapter, ``(A,)`` int32, see :func:`lora_apply`.
        page_table: Pages of each adapter, see :func:`lora_apply`.
        plan: Result of :func:`lora_plan` for the same ids, or None.
        weights: Weight of each row, see :func:`lora_apply`.
        groups: Column of ``weights`` of each page, see :func:`lora_apply`.

    Returns:
        ``(T, R)``, or ``(T, K, R)`` for ids ``(T, K)``, float32 (float64 for float64); entries
        beyond the rank of a row's adapter are zero.

    Raises:
        ValueError: If a shape, dtype or device is wrong.

    Source: Punica, section 4 (the shrink half of SGMV).
    """
    rest = scale, ranks, page_table, plan, weights, groups
    return _c.lora_shrink.default(x, a, adapter_ids, *rest)


@fake("lora_shrink")
def _fake_shrink(x: Tensor, a: Tensor, ids: Tensor, *rest: Tensor | None) -> Tensor:
    page_table = rest[2]
    rank = a.shape[1] if page_table is None else 8 * page_table.shape[1]
    return x.new_empty(*ids.shape, rank, dtype=accumulator(x.dtype))


def lora_expand_(
    y: Tensor,
    v: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    ranks: Tensor | None = None,
    page_table: Tensor | None = None,
    plan: Tensor | None = None,
) -> Tensor:
    """Multiply every row of ``v`` by ``b`` of its adapter, and add the product to ``y`` in place.

    ``y[t] = round(y[t] + b[s] @ v[t])`` with ``s = adapter_ids[t]`` and one rounding; rows with id
    -1 stay bitwise unchanged.

    Args:
        y: Output ``(T, O)`` float16, bfloat16, float32, or float64 on the CPU; any row stride. It
            is returned and must not share memory with another argument, as in :func:`lora_apply_`.
        v: Result of :func:`lora_shrink`, ``(T, R)``, or ``(T, K, R)`` for ids ``(T, K)``; float32
            (float64 for float64).
        b: Bank or pages in the dtype of ``y``, or pages of float8_e4m3fn, see :func:`lora_apply`.
        adapter_ids: Adapter id of each row, ``(T,)`` or ``(T, K)``.
        ranks: Rank of each adapter, ``(A,)`` int32, see :func:`lora_apply`.
        page_table: Pages of each adapter, see :func:`lora_apply`.
        plan: Result of :func:`lora_plan` for the same ids, or None.

    Raises:
        ValueError: If a shape, dtype or device is wrong, or ``y`` overlaps another argument.
        RuntimeError: If an argument requires gradients, since this op has no backward.

    Source: Punica, section 4 (the expand half of SGMV).
    """
    _c.lora_expand_.default(y, v, b, adapter_ids, ranks, page_table, plan)
    return y


def lora_apply(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    page_table: Tensor | None = None,
    plan: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Compute the low-rank update of every row by its adapter.

    ``y[t] = weights[t] * scale[s] * b[s] @ (a[s] @ x[t])`` with ``s = adapter_ids[t]``; rows with
    id -1 are zero. Differentiable once in ``x`` and, for banks, in ``a``, ``b`` and ``weights``;
    the backward uses the kernels of :func:`lora_linear`.

    Args:
        x: Input ``(T, I)`` float16, bfloat16, float32, or float64 on the CPU; any row stride.
        a: Bank ``(A, R, I)``, or pages ``(P, 8, I)`` with ``page_table``; dtype and device of
            ``x``. Pages of up to 256 ranks may be finite float8_e4m3fn instead, if ``x`` is not
            float64: the result has the bits of the same pages in the dtype of ``x``.
        b: Bank ``(A, O, R)``, or pages ``(P, O, 8)``; dtype and device of ``a``.
        adapter_ids: Adapter id of each row, ``(T,)`` int64 or int32 in ``[-1, A)``, or ``(T, K)``
            for the sum of ``K`` adapters, 1 to 64.
        scale: Scale of each adapter, ``(A,)`` float32, or of each page of eight ranks,
            ``(A, ceil(R / 8))``; None for 1.
        ranks: Rank of each adapter, ``(A,)`` int32 in ``[0, R]``, or None for ``R`` (required with
            pages). Entries of the factors beyond an adapter's rank are not read, and their gradient
            is zero.
        page_table: Pages of each adapter, ``(A, R / 8)`` int32: one page per eight ranks, or -1 for
            no page. None for banks.
        plan: Result of :func:`lora_plan` for the same ids, to avoid grouping them again.
        weights: Factors, float32: ``(T,)``, one per row; ``(T, K)``, one per entry of ids
            ``(T, K)``; or ``(T, G)``, one per row and group. None for 1. Values are not checked: a
            NaN affects only its row.
        groups: Column of ``weights (T, G)`` that each page is multiplied by,
            ``(A, ceil(R / 8))`` int32 in ``[0, G)``, for ids ``(T,)``; None for column 0. On CUDA,
            the range is checked only in debug mode.

    Returns:
        ``(T, O)`` in the dtype of ``x``, accumulated in float32 (float64 for float64).

    Raises:
        ValueError: If a shape, dtype or device is wrong.
        NotImplementedError: If an argument has a forward-mode tangent.

    Source: LoRA (Hu et al. 2021), eq. 3; Punica (Chen et al. 2023), section 4.
    """
    refuse_tangents("lora_apply", x, a, b, scale, weights)
    rest = scale, ranks, page_table, plan, weights, groups
    return _c.lora_apply.default(x, a, b, adapter_ids, *rest)


@fake("lora_apply")
def _fake_apply(x: Tensor, a: Tensor, b: Tensor, *args: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[1])


def _save_apply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@backward("lora_apply", save=_save_apply)
def _apply_backward(library: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``x``, ``a``, ``b`` and ``weights``; for pages, only that of ``x``.

    For pages, ``dx`` is the op itself applied to ``dy`` with ``b^T`` and ``a^T`` as factors.
    """
    x, a, b, adapter_ids, *rest = ctx.saved_tensors
    scale, ranks, page_table, plan, weights, groups = rest
    # needs_input_grad lacks trailing arguments that have their default value.
    needs = [*ctx.needs_input_grad[:3], weights is not None and ctx.needs_input_grad[8]]
    if any(ctx.needs_input_grad[3:8]):
        raise NotImplementedError("lora_apply: scale receives no gradient; detach it")
    if page_table is not None:
        if any(needs[1:]):
            raise NotImplementedError(
                "lora_apply: pages receive no gradient, nor do their weights; train a bank instead"
            )
        # Memory of pages that no row uses may be unmapped: copy page 0 in their place.
        ids = adapter_ids.flatten()
        pages = page_table[ids].long()
        pages = pages.where((ids[:, None] >= 0) & (pages < len(a)), -1).flatten()
        used = pages.new_zeros(len(a) + 1).index_fill_(0, pages + 1, 1)[1:]
        index = used * torch.arange(len(a), device=a.device)
        kind = torch.uint8 if a.itemsize == 1 else a.dtype
        turned = (t.view(kind).transpose(1, 2).index_select(0, index).view(a.dtype) for t in (b, a))
        return library.lora_apply(dy, *turned, adapter_ids, *rest), *(None,) * 9
    if plan is None:
        plan = library.lora_plan(adapter_ids, a.shape[0])
    if needs[2] or needs[3]:  # v without the weights
        v = library.lora_shrink(x, a, adapter_ids, scale, ranks, None, plan)
    else:
        v = x.new_empty(*adapter_ids.shape, a.shape[1], dtype=accumulator(x.dtype))
    rest = scale, ranks, plan, 0.0, None, *needs[:3], weights, groups, needs[3]
    grads = library.lora_linear_backward(dy, x, v, None, a, b, adapter_ids, *rest)
    dx, da, db, dweights = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dx, da, db, *(None,) * 5, dweights, None


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
    *,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Add the low-rank update of every row by its adapter to ``y``, in place.

    ``y[t] = round(y[t] + weights[t] * scale[s] * b[s] @ (a[s] @ x[t]))`` with
    ``s = adapter_ids[t]`` and one rounding, or one per column of ids ``(T, K)``. Rows with id -1,
    or with an adapter of rank 0, stay bitwise unchanged.

    Args:
        y: Output ``(T, O)``, dtype and device of ``x``; any row stride. It is returned and must not
            share memory with another argument, but ``x`` and ``y`` may be different columns of one
            buffer.
        x: Input ``(T, I)``, see :func:`lora_apply`.
        a: Bank or pages, see :func:`lora_apply`.
        b: Bank or pages, see :func:`lora_apply`.
        adapter_ids: Adapter id of each row, ``(T,)`` or ``(T, K)``.
        scale: Scale of each adapter, ``(A,)`` or ``(A, R / 8)`` float32, see :func:`lora_apply`.
        ranks: Rank of each adapter, ``(A,)`` int32, see :func:`lora_apply`.
        page_table: Pages of each adapter, see :func:`lora_apply`.
        plan: Result of :func:`lora_plan` for the same ids, or None.
        weights: Weight of each row, see :func:`lora_apply`.
        groups: Column of ``weights`` of each page, see :func:`lora_apply`.

    Raises:
        ValueError: If a shape, dtype or device is wrong, or ``y`` overlaps another argument.
        RuntimeError: If an argument requires gradients; use :func:`lora_apply`.

    Source: Punica (Chen et al. 2023), section 4; S-LoRA (Sheng et al. 2023), section 5.
    """
    rest = scale, ranks, page_table, plan, weights, groups
    op = _c.lora_apply_.default if compiles() else direct.lora_apply_
    op(y, x, a, b, adapter_ids, *rest)
    return y


@fake("lora_expand_")
@fake("lora_apply_")
def _fake_in_place(y: Tensor, *args: Tensor | None) -> None:
    pass


def bgmv_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None = None,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """Call :func:`lora_apply_` on banks: Punica's batched gather matrix-vector product (BGMV).

    Args:
        y: Output ``(T, O)``, changed in place and returned.
        x: Input ``(T, I)``.
        a: Bank ``(A, R, I)``.
        b: Bank ``(A, O, R)``.
        adapter_ids: Adapter id of each row, ``(T,)`` or ``(T, K)`` in ``[-1, A)``; -1 means no
            adapter.
        scale: Scale of each adapter, ``(A,)`` float32, or None for 1.
        weights: Weight of each row, or of each entry of ids ``(T, K)``, float32; None for 1.

    Raises:
        ValueError: As for :func:`lora_apply_`.

    Source: Punica (Chen et al. 2023), section 4.
    """
    return lora_apply_(y, x, a, b, adapter_ids, scale, weights=weights)


def sgmv_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    seg_indptr: Tensor,
    seg_adapter: Tensor,
    scale: Tensor | None = None,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """Call :func:`lora_apply_` on segments: the segmented gather matrix-vector product (SGMV).

    Args:
        y: Output ``(T, O)``, changed in place and returned.
        x: Input ``(T, I)``.
        a: Bank ``(A, R, I)``.
        b: Bank ``(A, O, R)``.
        seg_indptr: Bounds of the segments, ``(S + 1,)`` int32 on the device of ``x``. Rows outside
            all segments are unchanged.
        seg_adapter: Adapter id of each segment, ``(S,)`` or ``(S, K)`` int32; -1 means no adapter.
        scale: Scale of each adapter, ``(A,)`` float32, or None for 1.
        weights: Weight of each entry of ``seg_adapter``, float32 of its shape; None for 1.

    Raises:
        ValueError: As for :func:`lora_segment_ids` and :func:`lora_apply_`.

    Source: Punica (Chen et al. 2023), section 4.
    """
    if weights is None and seg_adapter.dim() == 1:
        ids = lora_segment_ids(seg_indptr, seg_adapter, x.shape[0])
        return lora_apply_(y, x, a, b, ids, scale)
    if weights is not None:
        expected = f"the shape of seg_adapter, {tuple(seg_adapter.shape)}"
        fits = weights.shape == seg_adapter.shape
        require(fits, "sgmv_", "weights", expected, tuple(weights.shape))
    segments = torch.arange(len(seg_adapter), dtype=torch.int32, device=seg_adapter.device)
    of_row = lora_segment_ids(seg_indptr, segments, x.shape[0]).long()  # (T,)
    # Rows outside all segments have index -1, which selects the last row. It is appended here, with
    # id -1.
    ids = torch.cat([seg_adapter, torch.full_like(seg_adapter[:1], -1)])[of_row]
    if weights is not None:
        weights = torch.cat([weights, torch.ones_like(weights[:1])])[of_row]
    return lora_apply_(y, x, a, b, ids, scale, weights=weights)
