"""What the layers of one step share: adapter ids per row, their plans, and small constants.

A layer's forward is short enough that a fill, a copy to the device or a grouping of the rows would
show in it. All layers of a step ask for the same ones, so they are made once and kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lora_ext import ops

_KEPT = 64  # a training step has a few row counts; generation without a cache has one per token


class Rows(NamedTuple):
    """Rows grouped by adapter; the adapters without rows are left out."""

    used: tuple[int, ...]  # positions, rising, of the adapters that have rows
    ids: Tensor  # (T,) int32, each in [-1, len(used))
    plan: Tensor  # ops.lora_plan of ids


_kept: OrderedDict[Hashable, Any] = OrderedDict()


def keep(key: tuple[Hashable, ...], device: torch.device, make: Callable[[], Any]) -> Any:
    """``make()``, or what it returned last time for this key; of ordinary, finished tensors.

    Nothing is kept while a graph is traced or captured: there, ``make`` is part of the graph.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return make()
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return make()  # a captured graph owns what it reads; eviction must not free it
        # Another stream would have to wait for the kernels that fill the tensors.
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (*key, device, stream)
    found = _kept.get(key)
    if found is None:
        # Not inference tensors: a later call may need them in its backward.
        with torch.inference_mode(False), torch.no_grad():
            found = make()
        _kept[key] = found
        if len(_kept) > _KEPT:
            _kept.popitem(last=False)
    return found


def all_rows(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and plan of rows that all belong to adapter 0."""

    def make() -> tuple[Tensor, Tensor]:
        ids = torch.zeros(num_rows, dtype=torch.int32, device=device)
        return ids, ops.lora_plan(ids, 1)

    return keep(("all_rows", num_rows), device, make)


def constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(len(values),)`` on the device, without a copy from the host where a graph is captured."""

    def make() -> Tensor:
        parts = [torch.full((1,), v, dtype=dtype, device=device) for v in values]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return keep((dtype, *values), device, make)


_by_ids: Any = WeakTensorKeyDictionary()


def rows_of(adapter_ids: Tensor, num_adapters: int) -> Rows:
    """Group rows by the adapters that occur in ``adapter_ids``.

    Which ones occur is asked on the host: on a device this waits for it, once per tensor, not once
    per layer. A traced graph cannot ask; there every adapter counts as used.

    Args:
        adapter_ids: ``(T,)`` int64 or int32, each in ``[-1, num_adapters)``.
        num_adapters: how many adapters the ids choose from.

    Raises:
        TypeError: ids that are no integers. ValueError: ids of another shape, or out of range.
    """
    if adapter_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"adapter_ids: expected int64 or int32, found {adapter_ids.dtype}")
    if adapter_ids.dim() != 1:
        raise ValueError(
            f"adapter_ids: expected one id per row, found shape {tuple(adapter_ids.shape)}"
        )
    if torch.compiler.is_compiling():
        ids = adapter_ids.int()
        return Rows(tuple(range(num_adapters)), ids, ops.lora_plan(ids, num_adapters))
    if adapter_ids.is_inference():  # without a version, a change in place would go unseen
        return _group(adapter_ids, num_adapters)
    version, count, rows = _by_ids.get(adapter_ids, (None, None, None))
    if rows is None or version != adapter_ids._version or count != num_adapters:
        with torch.inference_mode(False), torch.no_grad():
            rows = _group(adapter_ids, num_adapters)
        _by_ids[adapter_ids] = (adapter_ids._version, num_adapters, rows)
    return rows


def _group(adapter_ids: Tensor, num_adapters: int) -> Rows:
    found = adapter_ids.unique().tolist()  # sorted
    if found and not -1 <= found[0] <= found[-1] < num_adapters:
        raise ValueError(
            f"adapter_ids: expected ids in [-1, {num_adapters}), found {found[0]} to {found[-1]}"
        )
    used = tuple(i for i in found if i >= 0)
    if used == tuple(range(len(used))):
        ids = adapter_ids.int()
    else:
        place = torch.full((num_adapters + 1,), -1, dtype=torch.int32)  # the last one serves -1
        place[list(used)] = torch.arange(len(used), dtype=torch.int32)
        ids = place.to(adapter_ids.device)[adapter_ids.long()]
    return Rows(used, ids, ops.lora_plan(ids, len(used)))
