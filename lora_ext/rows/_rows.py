"""What the layers of one step share: adapter ids per row, their plans, and small constants.

A layer's forward is short enough that a fill, a copy to the device or a grouping of the rows would
show in it. All layers of a step ask for the same ones, so they are made once and kept.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.utils.weak import WeakTensorKeyDictionary

from lora_ext import ops
from lora_ext._torch import compiles

_KEPT = 64  # a training step has a few row counts; generation without a cache has one per token


class Rows(NamedTuple):
    """Which adapter has each row, and the rows grouped by adapter.

    A layer with adapters of its own leaves out those without rows, but where several processes
    train (:func:`together`); a pool's layer knows its adapters by their slots, so there all slots
    are used as soon as one row has an adapter.
    """

    used: tuple[int, ...]  # positions, rising, of the adapters that ids count
    ids: Tensor  # (T,) int32, each a place in used, or -1: a row of the base
    plan: Tensor  # ops.lora_plan of ids


def subset(rows: Rows, slots: Sequence[int]) -> Rows:
    """The rows of some of the used adapters, given by their places among these; the rows of the
    others are rows of the base."""
    place = [slots.index(i) if i in slots else -1 for i in range(len(rows.used))]
    place.append(-1)  # which id -1 reads
    ids = constant(place, torch.int32, rows.ids.device)[rows.ids.long()]
    return Rows(tuple(rows.used[i] for i in slots), ids, ops.lora_plan(ids, len(slots)))


def everywhere(position: int, num_rows: int, device: torch.device) -> Rows:
    """Rows that all have the adapter at this position; -1: rows of the base."""
    return keep(("everywhere", position, num_rows), device, _everywhere, position, num_rows, device)


def _everywhere(position: int, num_rows: int, device: torch.device) -> Rows:
    if position < 0:
        ids = repeated([-1], num_rows, torch.int32, device)
        return Rows((), ids, ops.lora_plan(ids, 0))
    ids, plan = all_rows(num_rows, device)
    return Rows((position,), ids, ops.lora_plan(ids, 1) if plan is None else plan)


# -------------------------------------------------------------------------------------------------
# Several processes

_HAS_GROUPS = distributed.is_available()


def several_processes() -> bool:
    """Whether this process is one of several: torch's default process group has more than one."""
    return _HAS_GROUPS and distributed.is_initialized() and distributed.get_world_size() > 1


_widened: Any = WeakTensorKeyDictionary()


def together(rows: Rows, also: Sequence[int]) -> Rows:
    """The same rows where the adapters at positions ``also`` are used, with rows or without.

    Processes that train one model have different rows. FSDP2 and ZeRO put the gradients that a
    process has one after another and sum the lot over the processes: an adapter that lacks its
    gradient on one of them, or has it at another place, would be given that of another adapter. So
    all that train are used on each of them, in the order of the layer; those without rows get
    zeros.
    """
    used = tuple(sorted({*rows.used, *also}))
    if used == rows.used:
        return rows
    if compiles():
        return _with_used(rows, used)
    known = _widened.get(rows.ids)
    if known is None:
        known = _widened[rows.ids] = Kept(_KEPT)
    # Rows that all have one adapter share their ids, whichever it is.
    return known.get((rows.used, used), rows.ids.device, _with_used, rows, used)


def _with_used(rows: Rows, used: tuple[int, ...]) -> Rows:
    place = [*(used.index(position) for position in rows.used), -1]  # id -1 reads the last
    ids = constant(place, torch.int32, rows.ids.device)[rows.ids.long()]
    return Rows(used, ids, ops.lora_plan(ids, len(used)))


# -------------------------------------------------------------------------------------------------
# What layers share


class _Unknown:
    """A graph that torch does not show: nothing is found again in it."""


def capture(device: torch.device) -> Any:
    """The CUDA graph that work for this device goes into instead of being done, or None."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return None
    shown = getattr(torch.cuda.CUDAGraph, "get_currently_capturing_graph", None)
    return _Unknown() if shown is None else shown()


def capturing(device: torch.device) -> bool:
    """Whether work for this device goes into a CUDA graph."""
    return capture(device) is not None


def traced_by_python() -> bool:
    """Whether somebody sees every op of this thread, as one who traces a graph does."""
    return torch._C._len_torch_dispatch_stack() > 0


class Kept:
    """Finished tensors by key, device and stream; beyond ``most`` of them the oldest goes.

    Nothing is kept, nor found, while a graph is traced: there, what is asked for is part of the
    graph. What is asked for in the capture of a CUDA graph is part of that graph and found again
    there, and nowhere else. A second stream computes its own, as it would have to wait for the
    kernels that fill the first one's.
    """

    def __init__(self, most: int):
        self._most = most
        self._found: OrderedDict[Hashable, Any] = OrderedDict()
        # Of graphs that are being captured. One that is done may be captured anew, and its old
        # tensors are not filled then: they go as soon as somebody asks outside of a capture.
        self._captured: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = (
            weakref.WeakKeyDictionary()
        )

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._found)

    def get(self, key: Hashable, device: torch.device, make: Callable[..., Any], *args: Any) -> Any:
        """``make(*args)``, or what that returned last time for this key; of ordinary tensors."""
        if traced_by_python():
            return make(*args)
        graph = capture(device)
        if graph is not None:
            of_graph = self._captured.setdefault(graph, {})
            where = (key, device)
            if where not in of_graph:
                of_graph[where] = _ordinary(make, *args)
            return of_graph[where]
        if self._captured:
            self._captured.clear()
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        where = (key, device, stream)
        found = self._found.get(where)
        if found is None:
            found = self._found[where] = _ordinary(make, *args)
            if len(self._found) > self._most:
                self._found.popitem(last=False)
        return found


def _ordinary(make: Callable[..., Any], *args: Any) -> Any:
    """No inference tensors: a later call may need them in its backward."""
    with torch.inference_mode(False), torch.no_grad():
        return make(*args)


_constants = Kept(_KEPT)


def keep(key: Hashable, device: torch.device, make: Callable[..., Any], *args: Any) -> Any:
    """:meth:`Kept.get` of what all layers of the process share."""
    if compiles():
        return make(*args)
    return _constants.get(key, device, make, *args)


def all_rows(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids and plan of rows that all belong to adapter 0. On the CPU the ids are one number,
    expanded, and need no plan: a backward keeps 4 bytes of them."""

    return keep(("all_rows", num_rows), device, _all_rows, num_rows, device)


def _all_rows(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    if device.type == "cpu":
        return torch.zeros(1, dtype=torch.int32).expand(num_rows), None
    ids = torch.zeros(num_rows, dtype=torch.int32, device=device)
    return ids, ops.lora_plan(ids, 1)


def constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(len(values),)`` on the device, without a copy from the host where a graph is captured."""

    return keep((dtype, *values), device, repeated, values, 1, dtype, device)


def repeated(
    values: Sequence[float], times: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``times`` of each value, filled on the device: a copy from the host fails in a capture."""
    runs: list[tuple[float, int]] = []
    for value in values:
        same = bool(runs) and runs[-1][0] == value
        runs[-1:] = [(value, runs[-1][1] + times)] if same else [*runs[-1:], (value, times)]
    parts = [torch.full((count,), value, dtype=dtype, device=device) for value, count in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
    tokens_first: bool = False,
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
        tokens_first: ``leading`` is ``(tokens, sequences, ...)``.

    Raises:
        TypeError: ids that are no integers. ValueError: ids of another number, or out of range.
    """
    if adapter_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"adapter_ids: expected int64 or int32, found {adapter_ids.dtype}")

    def make() -> Rows:
        ids = _one_per_row(adapter_ids, leading, tokens_first)
        if enabled is not None and not all(enabled):
            place = [*(i if on else -1 for i, on in enumerate(enabled)), -1]  # -1 reads the last
            ids = constant(place, torch.int32, ids.device)[ids.long()]
        if compiles():
            ids = ids.int()
            return Rows(tuple(range(num_adapters)), ids, ops.lora_plan(ids, num_adapters))
        return group(ids, num_adapters)

    device = adapter_ids.device
    on_host = device.type == "cpu"
    if compiles() or (adapter_ids.is_inference() and not on_host):
        return make()  # an inference tensor has no version: a change in place would go unseen
    seen, known = _by_ids.get(adapter_ids, (None, None))
    # On the host the ids themselves are compared: numpy and `.data` change them and no version.
    if known is None or not (
        torch.equal(seen, adapter_ids) if on_host else seen == adapter_ids._version
    ):
        known = Kept(_KEPT)
        _by_ids[adapter_ids] = (adapter_ids.clone() if on_host else adapter_ids._version, known)
    return known.get((num_adapters, leading, enabled, tokens_first), device, make)


def _one_per_row(ids: Tensor, leading: torch.Size | None, tokens_first: bool) -> Tensor:
    if leading is None:
        leading = torch.Size(ids.shape[:1])
    rows = leading.numel()
    if ids.shape == leading or (ids.dim() == 1 and ids.shape[0] == rows):
        return ids.reshape(rows)
    if tokens_first and leading[1:2] == ids.shape:
        return ids.repeat_interleave(leading[2:].numel()).repeat(leading[0])
    if ids.dim() == 1 and leading and not tokens_first and ids.shape[0] == leading[0]:
        return ids.repeat_interleave(rows // leading[0])
    expected = f"one id for each of {rows} rows"
    if len(leading) > 1:
        expected += f" or {leading[0]} sequences"
    raise ValueError(f"adapter_ids: expected {expected}, found shape {tuple(ids.shape)}")


def group(adapter_ids: Tensor, num_adapters: int) -> Rows:
    """Rows of ids ``(T,)``; on a device this waits for the ids."""
    found = adapter_ids.unique().tolist()  # sorted
    if found and not -1 <= found[0] <= found[-1] < num_adapters:
        raise ValueError(
            f"adapter_ids: expected ids in [-1, {num_adapters}), found {found[0]} to {found[-1]}"
        )
    used = tuple(i for i in found if i >= 0)
    ids = adapter_ids.int()
    if used != tuple(range(len(used))):
        place = [used.index(i) if i in used else -1 for i in range(num_adapters)]
        ids = constant([*place, -1], torch.int32, ids.device)[adapter_ids.long()]
    return Rows(used, ids, ops.lora_plan(ids, len(used)))
