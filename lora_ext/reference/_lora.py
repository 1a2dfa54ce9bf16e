"""Batched multi-adapter LoRA, one formula per function.

Letters: ``T`` tokens (rows), ``I`` input features, ``O`` output features, ``R`` largest rank, ``A``
adapters, ``P`` pages. ``s = adapter_ids[t]`` is the adapter of row t.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of ``dtype`` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of_adapters(
    adapter_ids: Tensor, adapters: int, max_rank: int, ranks: Tensor | None
) -> Iterator[tuple[int, Tensor, int]]:
    """Yield the index, the rows and the rank of every adapter with rows and a positive rank."""
    for s in range(adapters):
        rank = max_rank if ranks is None else int(ranks[s])
        rows = (adapter_ids == s).nonzero()[:, 0]
        if rank and rows.numel():
            yield s, rows, rank


def paged(pages: Tensor, page_table: Tensor) -> Tensor:
    """Return the pages of each adapter, ``(A, R / 8, ...)``; absent pages (-1) are zero."""
    absent = (page_table < 0)[:, :, None, None]
    return torch.where(absent, 0, pages[page_table.clamp(min=0).long()])


def columns_of(adapter_ids: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, Any]]:
    """Yield the ids ``(T,)`` and the weights of each column of ``adapter_ids (T, K)``."""
    for k, ids in enumerate(adapter_ids.unbind(1)):
        yield ids, None if weights is None else weights[:, k]


def lora_factors(
    s: int, rank: int, scale: Tensor | None, weights: Tensor | None, groups: Tensor | None
) -> Iterator[Tensor]:
    """Yield the scales ``(rank,)`` and the weights ``(T, rank)`` by which ``v`` is multiplied."""
    page = torch.arange(rank) // 8
    if scale is not None:
        yield scale[s][page] if scale.dim() == 2 else scale[s].expand(rank)
    if weights is not None:
        of_groups = weights[:, None] if weights.dim() == 1 else weights  # (T, G)
        yield of_groups[:, page * 0 if groups is None else groups[s].long()[page]]


def lora_shrink(
    x: Tensor,
    a: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    page_table: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Compute the result of :func:`lora_ext.ops.lora_shrink`, one adapter at a time."""
    if adapter_ids.dim() == 2:
        rest = scale, ranks, page_table
        columns = columns_of(adapter_ids, weights)
        return torch.stack([lora_shrink(x, a, i, *rest, weights=w) for i, w in columns], 1)
    if page_table is not None:
        a = paged(a, page_table).flatten(1, 2)  # (A, R, I)
    dtype = accumulator(x.dtype)
    v = x.new_zeros(x.shape[0], a.shape[1], dtype=dtype)
    for s, rows, rank in rows_of_adapters(adapter_ids, a.shape[0], a.shape[1], ranks):
        part = x[rows].to(dtype) @ a[s, :rank].to(dtype).T
        for factor in lora_factors(s, rank, scale, weights, groups):
            part = part * (factor if factor.dim() == 1 else factor[rows]).to(dtype)
        v[rows, :rank] = part
    return v


def lora_update(
    v: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    ranks: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    """Compute ``delta[t] = b[s] @ v[t]``, ``(T, O)`` in the dtype of ``v``; zero for id -1."""
    if adapter_ids.dim() == 2:
        columns = zip(v.unbind(1), adapter_ids.unbind(1), strict=True)
        return torch.stack([lora_update(u, b, i, ranks, page_table) for u, i in columns]).sum(0)
    if page_table is not None:
        b = paged(b, page_table).transpose(1, 2).flatten(2, 3)  # (A, O, R)
    delta = v.new_zeros(v.shape[0], b.shape[1])
    for s, rows, rank in rows_of_adapters(adapter_ids, b.shape[0], b.shape[2], ranks):
        delta[rows] = v[rows, :rank] @ b[s, :, :rank].to(v.dtype).T
    return delta


def lora_expand_(
    y: Tensor,
    v: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    ranks: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    """Compute ``y[t] = round(y[t] + b[s] @ v[t])`` in place.

    Rows with id -1 or rank 0 stay unchanged.
    """
    delta = lora_update(v, b, adapter_ids, ranks, page_table)
    total = (y.to(delta.dtype) + delta).to(y.dtype)
    active = adapter_ids >= 0
    if ranks is not None and ranks.numel():
        active = active & (ranks[adapter_ids.clamp(min=0).long()] > 0)
    active = active.any(1) if active.dim() == 2 else active
    return y.copy_(torch.where(active[:, None], total, y))


def lora_apply(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    page_table: Tensor | None = None,
    **mixture: Tensor | None,
) -> Tensor:
    """Compute ``y[t] = weights[t] * scale[s] * b[s] @ (a[s] @ x[t])``, ``(T, O)``, dtype of ``x``.

    Rows with id -1 are zero. ``mixture`` has the keywords of :func:`lora_shrink`.

    Source: LoRA (Hu et al. 2021), eq. 3, gathered per row as in Punica (Chen et al. 2023).
    """
    v = lora_shrink(x, a, adapter_ids, scale, ranks, page_table, **mixture)
    return lora_update(v, b, adapter_ids, ranks, page_table).to(x.dtype)


def lora_apply_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    page_table: Tensor | None = None,
    **mixture: Tensor | None,
) -> Tensor:
    """Compute ``y[t] = round(y[t] + weights[t] * scale[s] * b[s] @ (a[s] @ x[t]))`` in place.

    Rows with id -1 stay unchanged.
    """
    v = lora_shrink(x, a, adapter_ids, scale, ranks, page_table, **mixture)
    return lora_expand_(y, v, b, adapter_ids, ranks, page_table)


def lora_mixture(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    weights: Tensor | None = None,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """Compute ``y[t] = sum_k weights[t, k] * scale[s] * b[s] @ (a[s] @ x[t])``, ``(T, O)``.

    ``s = adapter_ids[t, k]``; entries of -1 add nothing. ``adapter_ids`` and ``weights`` are
    ``(T, K)`` or ``(T,)``.
    """
    return lora_apply(x, a, b, adapter_ids, scale, ranks, weights=weights)


def lora_apply_siblings_(
    y: Sequence[Tensor],
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    adapter_ids: Tensor,
    scale: Sequence[Tensor] = (),
    ranks: Sequence[Tensor] = (),
    page_table: Sequence[Tensor] = (),
    **mixture: Any,
) -> Sequence[Tensor]:
    """Call :func:`lora_apply_` for every module on the same rows.

    An empty ``scale``, ``ranks``, ``page_table`` or ``groups`` stands for None.
    """
    parts = scale, ranks, page_table, mixture.pop("groups", ())
    for m, each in enumerate(y):
        *rest, groups = (part[m] if part else None for part in parts)
        lora_apply_(each, x, a[m], b[m], adapter_ids, *rest, groups=groups, **mixture)
    return y


def lora_segment_ids(seg_indptr: Tensor, seg_adapter: Tensor, num_tokens: int) -> Tensor:
    """Return ``ids[t] = seg_adapter[s]`` for ``seg_indptr[s] <= t < seg_indptr[s + 1]``.

    Rows outside all segments have -1.
    """
    ids = torch.full((num_tokens,), -1, dtype=torch.int32)
    for s in range(seg_adapter.numel()):
        ids[int(seg_indptr[s]) : int(seg_indptr[s + 1])] = int(seg_adapter[s])
    return ids.to(seg_adapter.device)


def lora_plan(
    adapter_ids: Tensor, num_adapters: int, num_valid: Tensor | None = None
) -> dict[str, Tensor | int]:
    """Group rows by adapter; return the fields of a plan, which ``lora_ext/lora.h`` defines."""
    ids = adapter_ids.long().cpu()
    rows = ids.numel()
    bad = (ids < -1) | (ids >= num_adapters)
    ids = torch.where(bad, -1, ids)
    if num_valid is not None:
        past = torch.arange(rows) >= int(num_valid)
        bad &= ~past
        ids = torch.where(past, -1, ids)
    key = torch.where(ids < 0, num_adapters, ids)
    perm = torch.sort(key, stable=True).indices
    counts = torch.bincount(key, minlength=num_adapters + 1)
    slot_begin = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    chunk_rows = 16 if rows <= 256 else 64 if rows < 4096 else 128
    chunks = [
        (slot, start, min(chunk_rows, end - start))
        for slot in range(num_adapters)
        for end in [int(slot_begin[slot + 1])]
        for start in range(int(slot_begin[slot]), end, chunk_rows)
    ]
    active = int(slot_begin[num_adapters])
    return {
        "num_chunks": len(chunks),
        "num_active": active,
        "identity": int(torch.equal(perm[:active], torch.arange(active))),
        "bad_ids": int(bad.sum()),
        "chunks": torch.tensor(chunks, dtype=torch.int32).reshape(-1, 3),
        "perm": perm.int(),
        "slot_begin": slot_begin.int(),
    }
