"""Training of batched multi-adapter LoRA, one formula per function.

Letters: ``T`` tokens (rows), ``I`` input features, ``O`` output features, ``R`` largest rank, ``A``
adapters.
"""

import torch
from torch import Tensor

from ._lora import accumulator, columns_of, lora_shrink, lora_update, rows_of_adapters

_WORD = 0xFFFFFFFF  # 32-bit words are stored as int64: torch lacks unsigned arithmetic for them
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(m: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and the low 32-bit word of the 64-bit product ``m * word``.

    The words are computed from 16-bit halves of ``word``, because the product may overflow int64.
    """
    low, high = m * (word & 0xFFFF), m * (word >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _philox4x32_10(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Apply ten rounds of Philox to ``counter (..., 4)``, 32-bit words stored as int64.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], -1)


def dropout_keep(rows: int, columns: int, p: float, seed: int | Tensor, entry: int = 0) -> Tensor:
    """Return which elements dropout keeps, ``(rows, columns)`` bool.

    An element is kept if ``word >= round(p * 2^32)``. ``word`` is entry ``column % 4`` of the
    result of Philox for the counter ``(row, column / 4, entry, 0)`` and the two halves of the seed
    as key. ``entry`` is the column k of ids ``(T, K)``.
    """
    seed = int(seed)
    row = torch.arange(rows)[:, None].expand(rows, -(-columns // 4))
    quad = torch.arange(row.shape[1]).expand_as(row)
    zero = torch.zeros_like(row)
    words = _philox4x32_10(
        torch.stack([row, quad, zero + entry, zero], -1), (seed & _WORD, seed >> 32 & _WORD)
    )
    return words.flatten(1)[:, :columns] >= round(p * 2**32)


def lora_dropout(x: Tensor, p: float, seed: int | Tensor | None = None) -> Tensor:
    """Compute ``y[t, i] = x[t, i] / (1 - p)`` for kept elements, otherwise 0; rounded once."""
    if p == 0:
        return x.clone()
    assert seed is not None
    keep = dropout_keep(x.shape[0], x.shape[1], p, seed).to(x.device)
    scaled = (x.to(accumulator(x.dtype)) * (1 / (1 - p))).to(x.dtype)
    return torch.where(keep, scaled, 0)


def dropout_keep_of_adapters(adapter_ids: Tensor, columns: int, p: float, seed: Tensor) -> Tensor:
    """Return which elements dropout keeps with one seed per adapter, ``(T, columns)`` bool.

    ``seed`` is ``(A,)``. The mask of an adapter's rows is :func:`dropout_keep` with the adapter's
    seed, with rows numbered from 0 within the adapter. All elements of rows with id -1 are kept.
    """
    keep = adapter_ids.new_ones(adapter_ids.shape[0], columns, dtype=torch.bool)
    for s in range(seed.numel()):
        rows = (adapter_ids == s).nonzero()[:, 0]
        keep[rows] = dropout_keep(len(rows), columns, p, seed[s]).to(keep.device)
    return keep


def _masked(
    x: Tensor,
    p: float,
    seed: int | Tensor | None,
    adapter_ids: Tensor,
    adapters: int,
    entry: int = 0,
) -> Tensor:
    if p == 0:
        return x
    assert seed is not None
    if isinstance(seed, Tensor) and seed.shape == (adapters,):
        keep = dropout_keep_of_adapters(adapter_ids, x.shape[1], p, seed)
    else:
        keep = dropout_keep(x.shape[0], x.shape[1], p, seed, entry)
    return torch.where(keep.to(x.device), x, 0)


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Compute the result of :func:`lora_ext.ops.lora_linear`, one adapter at a time."""
    dtype = accumulator(x.dtype)
    y = x.new_zeros(x.shape[0], b.shape[1], dtype=dtype)
    if weight is not None:
        y = x.to(dtype) @ weight.to(dtype).T
        y = y if bias is None else y + bias.to(dtype)
    columns = adapter_ids if adapter_ids.dim() == 2 else adapter_ids[:, None]
    entries = columns_of(columns, weights) if adapter_ids.dim() == 2 else [(adapter_ids, weights)]
    # A seed of shape (A,) requires one id per row. With -1, no seed has the compared shape (-1,).
    seeds = a.shape[0] if columns.shape[1] == 1 else -1
    for k, (ids, of_rows) in enumerate(entries):
        kept = _masked(x, dropout_p, seed, ids, seeds, k)
        v = lora_shrink(kept, a, ids, scale, ranks, weights=of_rows, groups=groups)
        y = y + lora_update(v / (1 - dropout_p), b, ids, ranks)
    return y.to(x.dtype)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients ``(dx, da, db)`` of :func:`lora_linear` explicitly.

    Row t has adapter ``s``. With ``c = scale[s] / (1 - dropout_p)``, with ``m`` 1 for kept elements
    and 0 for dropped ones, and with ``v[t] = c * (m * x)[t] @ a[s]^T``, the gradients are
    ``dv[t] = c * dy[t] @ b[s]``, ``db[s] = sum_t dy[t]^T v[t]``,
    ``da[s] = sum_t dv[t]^T (m * x)[t]`` and ``dx[t] = dy[t] @ weight + m[t] * (dv[t] @ a[s])``,
    with sums over the rows of one adapter.
    """
    dtype = accumulator(x.dtype)
    kept, dy = _masked(x, dropout_p, seed, adapter_ids, a.shape[0]).to(dtype), dy.to(dtype)
    da, db = torch.zeros_like(a, dtype=dtype), torch.zeros_like(b, dtype=dtype)
    dx, delta = torch.zeros_like(x, dtype=dtype), torch.zeros_like(x, dtype=dtype)
    if weight is not None:
        dx = dy @ weight.to(dtype)
    for s, rows, rank in rows_of_adapters(adapter_ids, a.shape[0], a.shape[1], ranks):
        factor = 1 / (1 - dropout_p) * (1 if scale is None else scale[s].to(dtype))
        v = factor * (kept[rows] @ a[s, :rank].to(dtype).T)
        dv = factor * (dy[rows] @ b[s, :, :rank].to(dtype))
        db[s, :, :rank] = dy[rows].T @ v
        da[s, :rank] = dv.T @ kept[rows]
        delta[rows] = dv @ a[s, :rank].to(dtype)
    dx = dx + _masked(delta, dropout_p, seed, adapter_ids, a.shape[0])
    return dx.to(x.dtype), da.to(a.dtype), db.to(b.dtype)
