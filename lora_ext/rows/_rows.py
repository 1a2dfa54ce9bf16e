"""Tensors that the layers of a step share: adapter ids per row, their plans, and small constants.

The tensors are cached, because filling a tensor, copying it to the device and computing a plan take
long compared with the forward of one layer.
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

# Maximum number of cached tensors. For example, a training step needs them for a few numbers of
# rows, and generation without a KV cache needs them for a new number of rows at each token.
_KEPT = 64
_CPU = torch.device("cpu")  # comparing devices takes a third of the time of reading `type`


class Rows(NamedTuple):
    """The adapter of each row, and the rows grouped by adapter.

    For a layer with its own adapters, ``used`` omits adapters without rows, unless several
    processes train (:func:`together`). For a layer of a pool, ids are slots, and ``used`` contains
    all slots, or none if no row has an adapter.
    """

    used: tuple[int, ...]  # indices of the adapters in use, in ascending order
    ids: Tensor  # (T,) or (T, K) int32, each an index into used; -1 is the base model
    plan: Tensor  # ops.lora_plan of ids; K plans for (T, K)
    weights: Tensor | None = None  # (T, K) float32, of a row's adapters; None if all are 1


def planned(used: tuple[int, ...], ids: Tensor, weights: Tensor | None = None) -> Rows:
    """Return rows with the plan of ``ids``. Only this function creates :class:`Rows`."""
    return Rows(used, ids, ops.lora_plan(ids, len(used)), weights)


def renumbered(ids: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return ``numbers[id]`` in int32 for each id; an id of -1 stays -1."""
    return constant([*numbers, -1], torch.int32, ids.device)[ids.long()]  # -1 reads the last entry


def subset(rows: Rows, chosen: Sequence[int]) -> Rows:
    """Return rows with only the adapters ``chosen``; rows of other adapters use the base model.

    Args:
        rows: Rows of a layer.
        chosen: Indices into ``rows.used`` of the adapters to keep, in the order of the result's
            ``used``.
    """
    place = [chosen.index(i) if i in chosen else -1 for i in range(len(rows.used))]
    used = tuple(rows.used[i] for i in chosen)
    return planned(used, renumbered(rows.ids, place), rows.weights)


def everywhere(position: int, num_rows: int, device: torch.device) -> Rows:
    """Return rows that all use the adapter with index ``position``; -1 is the base model."""
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
    """Return ``rows`` with the adapters ``also`` added to ``used``, even those without rows.

    Processes that train one model have different rows. FSDP2 and ZeRO concatenate the gradients in
    each process and sum the results over the processes. If an adapter had no gradient in one
    process, the gradient of another adapter would be added to it. Every process therefore uses all
    adapters in training, in the order of the layer. The gradients of adapters without rows are 0.
    """
    used = tuple(sorted({*rows.used, *also}))
    if used == rows.used:
        return rows
    if compiles():
        return _with_used(rows, used)
    known = _widened.get(rows.ids)
    if known is None:
        known = _widened[rows.ids] = Kept(_KEPT)
    # The key contains rows.used, because the ids do not determine the result: `everywhere` returns
    # the same tensor of zeros for different adapters.
    return known.get((rows.used, used), rows.ids.device, _with_used, rows, used)


def _with_used(rows: Rows, used: tuple[int, ...]) -> Rows:
    ids = renumbered(rows.ids, [used.index(position) for position in rows.used])
    return planned(used, ids, rows.weights)


# -------------------------------------------------------------------------------------------------
# Shared tensors


class _Unknown:
    """Substitute for the graph being captured, if this version of torch cannot return it.

    Instances never compare equal, so two calls never count as the same capture.
    """


def capture(device: torch.device) -> Any:
    """Return the CUDA graph that the current stream of a device is capturing, or None."""
    if device == _CPU or device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return None
    shown = getattr(torch.cuda.CUDAGraph, "get_currently_capturing_graph", None)
    return _Unknown() if shown is None else shown()


def capturing(device: torch.device) -> bool:
    """Return whether the current stream of a device is capturing a CUDA graph."""
    return capture(device) is not None


#: Returns the number of Python dispatch modes that intercept ops of this thread, as in tracing.
traced_by_python = torch._C._len_torch_dispatch_stack


class Kept:
    """Cache of tensors by key and device. Above ``most`` entries, the oldest one is dropped.

    The caller determines which tensors are found:

    * Eager code finds only tensors that were computed on the same stream. It would have to wait
      for tensors of another stream.
    * The capture of a CUDA graph finds only tensors that were computed in the same capture, on any
      of its streams, because a replay computes only these. If torch cannot return the graph that is
      being captured, no tensor is found.
    * While a graph is traced, nothing is stored or found, since the tensors are part of that graph.
    """

    def __init__(self, most: int):
        self._most = most
        self._found: OrderedDict[Hashable, Any] = OrderedDict()
        # Tensors by the graph that is being captured. The first call outside of a capture drops
        # them: if the graph object is captured again, the new capture does not compute them.
        self._captured: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] | None = None

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._found)

    def get(self, key: Hashable, device: torch.device, make: Callable[..., Any], *args: Any) -> Any:
        """Return the cached tensor for this key, or call ``make(*args)`` and cache the result."""
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
        on_cuda = device != _CPU and device.type == "cuda"
        stream = torch.cuda.current_stream(device).cuda_stream if on_cuda else 0
        where = (key, device, stream)
        found = self._found.get(where)
        if found is None:
            found = self._found[where] = _ordinary(make, *args)
            if len(self._found) > self._most:
                self._found.popitem(last=False)
        return found


def _ordinary(make: Callable[..., Any], *args: Any) -> Any:
    """Call ``make(*args)`` outside of inference mode, as a later backward may use the result."""
    with torch.inference_mode(False), torch.no_grad():
        return make(*args)


_constants = Kept(_KEPT)


def keep(key: Hashable, device: torch.device, make: Callable[..., Any], *args: Any) -> Any:
    """Return the result of ``make(*args)``, cached by key for all layers of the process."""
    if compiles():
        return make(*args)
    return _constants.get(key, device, make, *args)


def all_rows(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the ids and the plan of ``num_rows`` rows that all use adapter 0.

    On the CPU the ids are one expanded element, so saving them for backward needs 4 bytes, and the
    plan is None.
    """
    return keep(("all_rows", num_rows), device, _all_rows, num_rows, device)


def _all_rows(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    if device.type == "cpu":
        return torch.zeros(1, dtype=torch.int32).expand(num_rows), None
    ids = torch.zeros(num_rows, dtype=torch.int32, device=device)
    return ids, ops.lora_plan(ids, 1)


def constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of the values, filled on the device, since captures forbid host copies."""
    return keep((dtype, *values), device, repeated, values, 1, dtype, device)


def repeated(
    values: Sequence[float], times: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a tensor that repeats each value ``times`` times, filled on the device."""
    runs: list[tuple[float, int]] = []
    for value in values:
        same = bool(runs) and runs[-1][0] == value
        runs[-1:] = [(value, runs[-1][1] + times)] if same else [*runs[-1:], (value, times)]
    parts = [torch.full((count,), value, dtype=dtype, device=device) for value, count in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scales(values: Sequence[float | Tensor], device: torch.device) -> Tensor | None:
    """Return a float32 tensor of the values, or None if all are 1.

    Values that are tensors are read at every call, since PEFT's hot swap changes them in place.
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
    """Return the rows of a layer, grouped by the adapters that occur in ``adapter_ids``.

    The host has to read which adapters occur. If the ids are on a device, the host waits for them
    once per tensor, not once per layer. It waits again after each in-place change that increments
    the tensor's version (a change through ``.data`` does not). A traced graph uses every adapter.

    Args:
        adapter_ids: int64 or int32 tensor of values in ``[-1, num_adapters)``: one id per row, or
            one per sequence if ``leading`` is ``(sequences, ...)``; or ``(T, K)`` for T rows.
        num_adapters: Number of adapters that the ids index.
        leading: Dimensions of the layer's input before the features; default is one row per id.
        enabled: Whether each adapter is used; rows of disabled adapters use the base model.
        tokens_first: Whether ``leading`` is ``(tokens, sequences, ...)``.

    Raises:
        TypeError: If the ids are not int64 or int32.
        ValueError: If the number of ids does not match ``leading``, or an id is out of range.
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
        return make()  # not cached: an inference tensor has no version, so changes are invisible
    # If the ids differ from `seen`, they were changed since `known` was made. On a device `seen` is
    # their version. On the host it is a copy, as numpy and `.data` do not change the version.
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
    if ids.dim() == 2 and ids.shape[0] == rows and ids.shape != leading:
        return ids
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
    """Return the rows with ids ``(T,)``, grouped by adapter; the host waits for ids on a device."""
    found = adapter_ids.unique().tolist()  # sorted
    if found and not -1 <= found[0] <= found[-1] < num_adapters:
        expected = f"ids in [-1, {num_adapters})"
        raise ValueError(f"adapter_ids: expected {expected}, found {found[0]} to {found[-1]}")
    used = tuple(i for i in found if i >= 0)
    if used == tuple(range(len(used))):
        return planned(used, adapter_ids.int())
    place = [used.index(i) if i in used else -1 for i in range(num_adapters)]
    return planned(used, renumbered(adapter_ids, place))
