"""Attention, one formula per function.

Letters: ``B`` sequences, ``H`` query heads, ``G`` key heads, ``T`` queries, ``L`` keys, ``D``
features of queries and keys, ``E`` features of values.
"""

import torch
from torch import Tensor

from ._lora import accumulator


def seen_keys(
    rows: int,
    keys: int,
    causal: bool = False,
    spans: Tensor | None = None,
    mask: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return which keys a row may attend to, ``(B or 1, T, L)`` bool.

    These are the keys that ``causal``, ``spans`` and ``mask`` all allow, see
    :func:`lora_ext.ops.row_attention`.
    """
    at = torch.arange(keys, device=device)
    seen = torch.ones(1, rows, keys, dtype=torch.bool, device=device)
    if causal:
        seen = seen & (at <= torch.arange(rows, device=device)[:, None] + keys - rows)
    if spans is not None:
        seen = seen & (at >= spans[..., :1]) & (at < spans[..., 1:])
    return seen if mask is None else seen & mask


def row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    causal: bool = False,
    spans: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute ``softmax(scale q k^T) v`` over the allowed keys of each row, ``(B, H, T, E)``."""
    wide = accumulator(q.dtype)
    seen = seen_keys(q.shape[2], k.shape[2], causal, spans, mask, q.device)[:, None]
    if k.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    groups = q.shape[1] // max(k.shape[1], 1)
    k, v = (t.to(wide).repeat_interleave(groups, 1) for t in (k, v))
    scores = q.to(wide) @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp().masked_fill(~seen, 0)
    # Values of keys that are not allowed may be infinite or NaN, and 0 times them is NaN.
    terms = (weights.unsqueeze(-1) * v.unsqueeze(2)).masked_fill(~seen.unsqueeze(-1), 0)
    y = terms.sum(3) / weights.sum(-1, keepdim=True)  # (B, H, T, E)
    return y.masked_fill(~seen.any(-1, keepdim=True), 0).to(q.dtype)
