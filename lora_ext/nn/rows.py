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


def subset(rows: Rows, slots: Sequence[int]) -> Rows:
    """The rows of some of the used adapters, given by their places among these; the rows of the
    others are rows of the base."""
    place = [slots.index(i) if i in slots else -1 for i in range(len(rows.used))]
    ids = constant([*place, -1], torch.int32, rows.ids.device)[rows.ids.long()]  # last serves -1
    return Rows(tuple(rows.used[i] for i in slots), ids, ops.lora_plan(ids, len(slots)))


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


def all_rows(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids and plan of rows that all belong to adapter 0. On the CPU the ids are one number,
    expanded, and need no plan: a backward keeps 4 bytes of them."""

    def make() -> tuple[Tensor, Tensor | None]:
        if device.type == "cpu":
            return torch.zeros(1, dtype=torch.int32).expand(num_rows), None
        ids = torch.zeros(num_rows, dtype=torch.int32, device=device)
        return ids, ops.lora_plan(ids, 1)

    return keep(("all_rows", num_rows), device, make)


def constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(len(values),)`` on the device, without a copy from the host where a graph is captured."""

    def make() -> Tensor:
        parts = [torch.full((1,), v, dtype=dtype, device=device) for v in values]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return keep((dtype, *values), device, make)


def scales(values: Sequence[float | Tensor], device: torch.device) -> Tensor | None:
    """``(len(values),)`` float32, or None where all are 1. Tensors are read anew at every call:
    PEFT's hot swap makes scalings tensors, so as to change them in place."""
    for value in values:
        if isinstance(value, Tensor):
            parts = [torch.as_tensor(v, dtype=torch.float32, device=device) for v in values]
            return torch.cat([part.reshape(1) for part in parts])
    return None if set(values) == {1.0} else constant(values, torch.float32, device)  # pyright: ignore[reportArgumentType]


_by_ids: Any = WeakTensorKeyDictionary()


def rows_of(
    adapter_ids: Tensor,
    num_adapters: int,
    leading: torch.Size | None = None,
    enabled: tuple[bool, ...] | None = None,
) -> Rows:
    """Group rows by the adapters that occur in ``adapter_ids``.

    Which ones occur is asked on the host: on a device this waits for it, once per tensor, not once
    per layer, and again when torch has counted a change in place (one through ``.data`` is not
    counted). A traced graph cannot ask; there every adapter counts as used.

    Args:
        adapter_ids: int64 or int32, each in ``[-1, num_adapters)``: one per row, or one per
            sequence where ``leading`` is ``(sequences, ...)``.
        num_adapters: how many adapters the ids choose from.
        leading: the dimensions of ``x`` before the features; default is one row per id.
        enabled: False where an adapter's rows are to be rows of the base.

    Raises:
        TypeError: ids that are no integers. ValueError: ids of another number, or out of range.
    """
    if adapter_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"adapter_ids: expected int64 or int32, found {adapter_ids.dtype}")

    def make() -> Rows:
        ids = _one_per_row(adapter_ids, leading)
        if enabled is not None and not all(enabled):
            place = [i if on else -1 for i, on in enumerate(enabled)]
            ids = constant([*place, -1], torch.int32, ids.device)[ids.long()]  # the last serves -1
        if torch.compiler.is_compiling():
            ids = ids.int()
            return Rows(tuple(range(num_adapters)), ids, ops.lora_plan(ids, num_adapters))
        return group(ids, num_adapters, ids.device)

    on_host = adapter_ids.device.type == "cpu"
    if torch.compiler.is_compiling() or (adapter_ids.is_inference() and not on_host):
        return make()  # an inference tensor has no version: a change in place would go unseen
    seen, known = _by_ids.get(adapter_ids, (None, {}))
    # On the host the ids themselves are compared: numpy and `.data` change them and no version.
    if seen is None or not (
        torch.equal(seen, adapter_ids) if on_host else seen == adapter_ids._version
    ):
        known = {}
        _by_ids[adapter_ids] = (adapter_ids.clone() if on_host else adapter_ids._version, known)
    key = (num_adapters, leading, enabled)
    if key not in known:
        with torch.inference_mode(False), torch.no_grad():
            known[key] = make()
    return known[key]


def _one_per_row(ids: Tensor, leading: torch.Size | None) -> Tensor:
    if leading is None:
        leading = torch.Size(ids.shape[:1])
    rows = leading.numel()
    if ids.shape == leading or (ids.dim() == 1 and ids.shape[0] == rows):
        return ids.reshape(rows)
    if ids.dim() == 1 and leading and ids.shape[0] == leading[0]:
        return ids.repeat_interleave(rows // leading[0])
    expected = f"one id for each of {rows} rows"
    if len(leading) > 1:
        expected += f" or {leading[0]} sequences"
    raise ValueError(f"adapter_ids: expected {expected}, found shape {tuple(ids.shape)}")


def group(adapter_ids: Tensor, num_adapters: int, device: torch.device) -> Rows:
    """Rows of ids ``(T,)`` that may lie on the host, where asking costs no wait."""
    found = adapter_ids.unique().tolist()  # sorted
    if found and not -1 <= found[0] <= found[-1] < num_adapters:
        raise ValueError(
            f"adapter_ids: expected ids in [-1, {num_adapters}), found {found[0]} to {found[-1]}"
        )
    used = tuple(i for i in found if i >= 0)
    ids = adapter_ids.int()
    if used != tuple(range(len(used))):
        place = torch.full((num_adapters + 1,), -1, dtype=torch.int32)  # the last serves -1
        place[list(used)] = torch.arange(len(used), dtype=torch.int32)
        ids = place.to(ids.device)[adapter_ids.long()]
    ids = ids.to(device)
    return Rows(used, ids, ops.lora_plan(ids, len(used)))
