"""Functions that replace transformers' attention "sdpa".

They are used for exact models and for continuous batching.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_asked: set[Callable[..., Any]] = set()
_lock = threading.Lock()
_here = threading.local()
# Products of queries and keys in the attention of a request up to which it uses one thread. To
# start a second thread would take longer; a step of many requests would do this in every layer.
_MOST_SERIAL = 1 << 18
_torch = ctypes.CDLL(torch._C.__file__)


def ask_first(function: Callable[..., Any]) -> None:
    """Replace "sdpa" by ``function(inner, module, query, key, value, mask, **how)``.

    ``inner`` is the previous function. The replacement affects the whole process, and further calls
    with the same function have no effect. The name remains "sdpa", since masks and caches depend on
    it.
    """
    from transformers.modeling_utils import AttentionInterface

    with _lock:
        if function not in _asked:
            inner = AttentionInterface._global_mapping["sdpa"]
            AttentionInterface.register("sdpa", functools.partial(function, inner))
            _asked.add(function)


@contextmanager
def requests_apart() -> Iterator[None]:
    """Compute attention for each request separately during a ``with`` block, in this thread.

    In a step of continuous batching, transformers concatenates the requests to one row and
    separates them by a mask. Every query is multiplied by the keys of every request, so a NaN or
    inf of one request would spread to all other requests. The block has an effect only on the CPU
    and only with the attention "sdpa".
    """
    ask_first(_each_request)
    before, _here.apart = getattr(_here, "apart", False), True
    try:
        yield
    finally:
        _here.apart = before


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread in a ``with`` block of this thread; other threads are not affected.

    ``torch.set_num_threads`` is not used, because threads that start meanwhile would adopt it.
    """
    before = torch.get_num_threads()
    openmp = getattr(_torch, "omp_set_num_threads", int)
    mkl = getattr(_torch, "MKL_Set_Num_Threads_Local", int)
    openmp(1)
    kept = mkl(1)  # MKL would start threads for a product outside of torch's parallel loops.
    try:
        yield
    finally:
        openmp(before)
        mkl(kept)


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
    if len(queries) < 2 or not whole or how.get("position_bias") is not None:
        return inner(module, query, key, value, attention_mask, *args, **how)
    assert attention_mask is not None
    found, q, k = [], 0, 0
    for more, length in zip(queries, keys, strict=True):
        rows, span = slice(q, q := q + more), slice(k, k := k + length)
        own = query[:, :, rows], key[:, :, span], value[:, :, span], attention_mask[..., rows, span]
        small = own[0].numel() * length <= _MOST_SERIAL
        with _one_thread() if small else contextlib.nullcontext():
            found.append(inner(module, *own, *args, **how)[0])  # (1, more, H, D)
    return torch.cat(found, 1), None
