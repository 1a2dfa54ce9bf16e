"""Functions that replace transformers' attention "sdpa".

They are used for exact models and for continuous batching.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_ext import ops

_registered: set[Callable[..., Any]] = set()
_lock = threading.Lock()
_here = threading.local()


def replace_sdpa(function: Callable[..., Any]) -> None:
    """Replace transformers' attention function "sdpa" by ``function``.

    ``function(inner, module, query, key, value, mask, **how)`` receives the previous function as
    ``inner``. The replacement affects the whole process, and later calls with the same function
    have no effect. It keeps the name "sdpa", since masks and caches depend on the name.
    """
    from transformers.modeling_utils import AttentionInterface

    with _lock:
        if function not in _registered:
            inner = AttentionInterface._global_mapping["sdpa"]
            AttentionInterface.register("sdpa", functools.partial(function, inner))
            _registered.add(function)


@contextmanager
def requests_apart() -> Iterator[None]:
    """Compute attention for each request separately during a ``with`` block, in this thread.

    In a step of continuous batching, transformers concatenates the requests into one row and
    separates them by a mask. Every query is multiplied by the keys of every request, so a NaN or
    inf of one request would spread to all other requests. In the block, one call of
    :func:`lora_ext.ops.row_attention` computes all requests if each query attends to a range of
    keys. Otherwise each request is computed by a separate call of "sdpa". The block has an effect
    only on the CPU and only with the attention "sdpa".
    """
    replace_sdpa(_each_request)
    before, _here.apart = getattr(_here, "apart", False), True
    try:
        yield
    finally:
        _here.apart, _here.spans = before, None


def _each_request(
    inner: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **how: Any,
) -> tuple[Tensor, None]:
    ends = how.get("cu_seq_lens_q"), how.get("cu_seq_lens_k")
    packed = getattr(_here, "apart", False) and query.device.type == "cpu"
    queries, keys = [], []
    if packed and attention_mask is not None and all(isinstance(e, Tensor) for e in ends):
        queries, keys = (e.diff().tolist() for e in ends)  # pyright: ignore[reportOptionalMemberAccess]
    whole = (sum(queries), sum(keys)) == (query.shape[2], key.shape[2])
    if not queries or not whole or how.get("position_bias") is not None:
        return inner(module, query, key, value, attention_mask, *args, **how)
    assert attention_mask is not None
    if not (args or how.get("dropout") or how.get("softcap")):
        known = getattr(_here, "spans", None)  # all layers of a step share one mask
        if known is None or known[0] is not attention_mask:
            _here.spans = known = attention_mask, _spans(attention_mask, queries, keys)
        if known[1] is not None:
            y = ops.row_attention(query, key, value, how.get("scaling"), spans=known[1])
            return y.transpose(1, 2), None
    found, q, k = [], 0, 0
    for more, length in zip(queries, keys, strict=True):
        rows, span = slice(q, q := q + more), slice(k, k := k + length)
        own = query[:, :, rows], key[:, :, span], value[:, :, span], attention_mask[..., rows, span]
        found.append(inner(module, *own, *args, **how)[0])  # (1, more, H, D)
    return torch.cat(found, 1), None


def _spans(mask: Tensor, queries: list[int], keys: list[int]) -> Tensor | None:
    """Return the range of keys that each query attends to, ``(1, T, 2)``: first key, last key + 1.

    The result is None if the mask has values other than "allowed" and "excluded", or if a query's
    allowed keys are not a range of the request's keys.

    Args:
        mask: attention mask ``(1, 1, T, L)``, boolean or added to the scores.
        queries, keys: numbers of queries and keys of each request.
    """
    if mask.shape != (1, 1, sum(queries), sum(keys)):
        return None
    mask, lengths, columns = mask[0, 0], torch.tensor(keys), torch.arange(mask.shape[3])
    allowed = mask if mask.dtype == torch.bool else mask == 0  # (T, L)
    first = allowed.byte().argmax(-1)
    spans = torch.stack([first, first + allowed.sum(-1)], -1)  # (T, 2)
    ends = lengths.cumsum(0)
    own = torch.stack([ends - lengths, ends], -1).repeat_interleave(torch.tensor(queries), 0)
    fits = allowed.equal((columns >= spans[:, :1]) & (columns < spans[:, 1:]))
    fits = fits and bool(((spans[:, 0] >= own[:, 0]) & (spans[:, 1] <= own[:, 1])).all())
    if mask.dtype != torch.bool:
        fits = fits and bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all())
    return spans[None] if fits else None
