"""Tensors that the layers of a step share: adapter ids per row, their plans, and small constants.

All layers of a step need the same tensors. They are made once and kept, because a fill, a copy to
the device or a plan takes long compared with the forward of one layer.
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
    """The adapter of each row, and the rows grouped by adapter.

    A layer with its own adapters leaves out adapters without rows, unless several processes train
    (:func:`together`). For a layer of a pool ids are slots, and all slots are in use if a row has
    an adapter.
    """

    used: tuple[int, ...]  # positions of the adapters in use, in ascending order
    ids: Tensor  # (T,) int32, each an index into used; -1 is the base model
    plan: Tensor  # ops.lora_plan of ids


def planned(used: tuple[int, ...], ids: Tensor) -> Rows:
    """Return the rows of these ids. All :class:`Rows` are made by this function."""
    return Rows(used, ids, ops.lora_plan(ids, len(used)))


def renumbered(ids: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return ``numbers[id]`` for each of ``ids``, in int32; ids of -1 stay -1."""
    return constant([*numbers, -1], torch.int32, ids.device)[ids.long()]  # -1 reads the last entry


def subset(rows: Rows, chosen: Sequence[int]) -> Rows:
    """Return ``rows`` with only some of their adapters.

    Args:
        rows: Rows of a layer.
        chosen: Indices into ``rows.used``, in the order of the result's ``used``. Rows of all other
            adapters become rows of the base model.
    """
    place = [chosen.index(i) if i in chosen else -1 for i in range(len(rows.used))]
    return planned(tuple(rows.used[i] for i in chosen), renumbered(rows.ids, place))


def everywhere(position: int, num_rows: int, device: torch.device) -> Rows:
    """Return rows that all have the adapter at this position; -1 is the base model."""
    return keep(("everywhere", position, num_rows), device, _everywhere, position, num_rows, device)


def _everywhere(position: int, num_rows: int, device: torch.device) -> Rows:
    if position < 0:
        return planned((), repeated([-1], num_rows, torch.int32, device))
    return planned((position,), all_rows(num_rows, device)[0])


# -------------------------------------------------------------------------------------------------
# Several processes

_HAS_GROUPS = distributed.is_available()


def several_processes() -> bool:
    """Return whether torch's default process group has more than one process."""
    return _HAS_GROUPS and distributed.is_initialized() and distributed.get_world_size() > 1


_widened: Any = WeakTensorKeyDictionary()


def together(rows: Rows, also: Sequence[int]) -> Rows:
    """Return the same rows with the adapters at positions ``also`` in use, even without rows.

    Processes that train one model have different rows. FSDP2 and ZeRO concatenate the gradients of
    each process and sum them over the processes: an adapter without a gradient in one process would
    get that of another adapter. Therefore every process uses all adapters in training, in the order
    of the layer; adapters without rows get zeros.
    """
    used = tuple(sorted({*rows.used, *also}))
    if used == rows.used:
        return rows
    if compiles():
        return _with_used(rows, used)
    known = _widened.get(rows.ids)
    if known is None:
        known = _widened[rows.ids] = Kept(_KEPT)
    # `everywhere` gives the same tensor of zeros to rows of different adapters, so the ids alone do
    # not determine the result: rows.used is part of the key.
    return known.get((rows.used, used), rows.ids.device, _with_used, rows, used)


def _with_used(rows: Rows, used: tuple[int, ...]) -> Rows:
    return planned(used, renumbered(rows.ids, [used.index(position) for position in rows.used]))


# -------------------------------------------------------------------------------------------------
# Shared tensors


class _Unknown:
    """A key in place of a captured graph that torch cannot return; no two are equal."""


def capture(device: torch.device) -> Any:
    """Return the CUDA graph that the current stream of a device is capturing, or None."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return None
    shown = getattr(torch.cuda.CUDAGraph, "get_currently_capturing_graph", None)
    return _Unknown() if shown is None else shown()


def capturing(device: torch.device) -> bool:
    """Return whether the current stream of a device is capturing a CUDA graph."""
    return capture(device) is not None


def traced_by_python() -> bool:
    """Return whether a Python dispatch mode sees the ops of this thread, as in tracing."""
    return torch._C._len_torch_dispatch_stack() > 0


class Kept:
    """Cache of tensors by key and device; above ``most`` entries it drops the oldest.

    It depends on what runs:

    * Eager code finds only tensors that its own stream made: it would have to wait for the kernels
      of another stream.
    * The capture of a CUDA graph finds only tensors that were made in the same capture, in any of
      its streams, because a replay computes only these. If torch cannot return the graph in
      capture, it finds none.
    * While a graph is traced, nothing is kept or found, since the tensors are part of that graph.
    """

    def __init__(self, most: int):
        self._most = most
        self._found: OrderedDict[Hashable, Any] = OrderedDict()
        # Tensors by the graph in capture. A finished graph may be captured again, which does not
        # fill its old tensors, so the first call outside of a capture drops them.
        self._captured: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] | None = None

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._found)

    def get(self, key: Hashable, device: torch.device, make: Callable[..., Any], *args: Any) -> Any:
        """Return ``make(*args)``, or its earlier result for this key."""
        if traced_by_python():
            return make(*args)
        graph = capture(device)
        if graph is not None:
            captured = self._captured
            if captured is None:
                captured = self._captured = weakref.WeakKeyDictionary()
            of_graph = captured.setdefault(graph, {})
            where = (key, device)
            if where not in of_graph:
                of_graph[where] = _ordinary(make, *args)
            return of_graph[where]
        self._captured = None
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        where = (key, device, stream)
        found = self._found.get(where)
        if found is None:
            found = self._found[where] = _ordinary(make, *args)
            if len(self._found) > self._most:
                self._found.popitem(last=False)
        return found


def _ordinary(make: Callable[..., Any], *args: Any) -> Any:
    """Return ``make(*args)`` without inference tensors: a later backward may need it."""
    with torch.inference_mode(False), torch.no_grad():
        return make(*args)


_constants = Kept(_KEPT)


def keep(key: Hashable, device: torch.device, make: Callable[..., Any], *args: Any) -> Any:
    """Return ``make(*args)`` from the cache that all layers of the process share."""
    if compiles():
        return make(*args)
    return _constants.get(key, device, make, *args)


def all_rows(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return ids and plan of rows that all have adapter 0.

    On the CPU the ids are one expanded number, of which a backward keeps 4 bytes, and the plan is
    None.
    """
    return keep(("all_rows", num_rows), device, _all_rows, num_rows, device)


def _all_rows(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    if device.type == "cpu":
        return torch.zeros(1, dtype=torch.int32).expand(num_rows), None
    ids = torch.zeros(num_rows, dtype=torch.int32, device=device)
    return ids, ops.lora_plan(ids, 1)


def constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``(len(values),)`` on the device, filled there: a capture forbids host copies."""
    return keep((dtype, *values), device, repeated, values, 1, dtype, device)


def repeated(
    values: Sequence[float], times: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return ``times`` of each value, filled on the device: a capture forbids host copies."""
    runs: list[tuple[float, int]] = []
    for value in values:
        same = bool(runs) and runs[-1][0] == value
        runs[-1:] = [(value, runs[-1][1] + times)] if same else [*runs[-1:], (value, times)]
    parts = [torch.full((count,), value, dtype=dtype, device=device) for value, count in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scales(values: Sequence[float | Tensor], device: torch.device) -> Tensor | None:
    """Return ``(len(values),)`` float32, or None if all are 1.

    Tensors are read at every call: PEFT's hot swap changes scalings in place.
    """
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

    The host has to read which adapters occur. On a device this waits once per tensor, not once per
    layer, and again after a change in place that torch counts (a change through ``.data`` is not
    counted). In a traced graph every adapter counts as used.

    Args:
        adapter_ids: int64 or int32, each in ``[-1, num_adapters)``: one per row, or one per
            sequence if ``leading`` is ``(sequences, ...)``.
        num_adapters: Number of adapters that the ids index.
        leading: Dimensions of ``x`` before the features; default: one row per id.
        enabled: False for adapters whose rows become rows of the base model.
        tokens_first: Whether ``leading`` is ``(tokens, sequences, ...)``.

    Raises:
        TypeError: If the ids are not integers.
        ValueError: If the number of ids does not fit, or an id is out of range.
    """
    if adapter_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"adapter_ids: expected int64 or int32, found {adapter_ids.dtype}")

    def make() -> Rows:
        ids = _one_per_row(adapter_ids, leading, tokens_first)
        if enabled is not None and not all(enabled):
            ids = renumbered(ids, [i if on else -1 for i, on in enumerate(enabled)])
        if compiles():
            return planned(tuple(range(num_adapters)), ids.int())
        return group(ids, num_adapters)

    device = adapter_ids.device
    on_host = device.type == "cpu"
    if compiles() or (adapter_ids.is_inference() and not on_host):
        return make()  # an inference tensor has no version that shows a change in place
    # `seen` is what shows a change of the ids since `known` was made. On a device it is their
    # version. On the host it is a copy, since numpy and `.data` change ids but not the version.
    seen, known = _by_ids.get(adapter_ids, (None, None))
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
    """Return the rows of ids ``(T,)``; on a device this waits for the ids."""
    found = adapter_ids.unique().tolist()  # sorted
    if found and not -1 <= found[0] <= found[-1] < num_adapters:
        expected = f"ids in [-1, {num_adapters})"
        raise ValueError(f"adapter_ids: expected {expected}, found {found[0]} to {found[-1]}")
    used = tuple(i for i in found if i >= 0)
    if used == tuple(range(len(used))):
        return planned(used, adapter_ids.int())
    place = [used.index(i) if i in used else -1 for i in range(num_adapters)]
    return planned(used, renumbered(adapter_ids, place))
