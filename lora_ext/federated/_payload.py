"""Conversion of the tensors of planned layers to arrays of a message, and back.

Messages are untrusted. A message has named arrays and a manifest, a dict of flat lists, which
Flower's records can store. numpy has no bfloat16. The bits of bfloat16 tensors are therefore sent
as ``uint16``, and the manifest lists the names of these tensors. Shape letters: r rank, I inputs
and O outputs of a module.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_ext._checks import require

from ._plan import PATTERN, LayerPlan, Pair, layer_pairs

Manifest = dict[str, list[str] | list[int]]

_PACKED = "packed"
_DTYPES = {
    "float16": (torch.float16, np.dtype("<f2")),
    "bfloat16": (torch.bfloat16, np.dtype("<u2")),
    "float32": (torch.float32, np.dtype("<f4")),
    "float64": (torch.float64, np.dtype("<f8")),
}
_NAMES = {dtype: name for name, (dtype, _) in _DTYPES.items()}
_MAX_HEADER_BYTES = 4096
_MAX_DIMS = 8
_MAX_SIZE = 2**31 - 1


class Payload(NamedTuple):
    """The tensors of a client's layers in a message.

    Attributes:
        arrays: arrays by tensor name, or one array of bytes with the name "packed".
        manifest: flat lists by name: the names of the bfloat16 tensors, or the names, dtypes and
            shapes of the packed tensors.
    """

    arrays: dict[str, np.ndarray]
    manifest: Manifest  # without empty lists, whose size Flower's ConfigRecord cannot compute

    @property
    def nbytes(self) -> int:
        """Size of the arrays in bytes, without framing."""
        return sum(array.nbytes for array in self.arrays.values())


def plan_shapes(
    state: Mapping[str, Tensor], plan: LayerPlan, pattern: str = PATTERN
) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors of a plan: A ``(r, I)``, B ``(O, r)``.

    Args:
        state: the whole global adapter.
        plan: the layers, and ranks that do not exceed the global adapter's.
        pattern: regular expression whose first group is the index of a layer in a name.

    Raises:
        ValueError: If the state lacks a layer or a rank, or is invalid as in :func:`aggregate`.
    """
    return shapes_of(layer_pairs("plan_shapes: state", state, pattern), state, plan)


def shapes_of(
    pairs: Sequence[Pair], state: Mapping[str, Tensor], plan: LayerPlan
) -> dict[str, tuple[int, ...]]:
    """Return the result of :func:`plan_shapes` for the pairs of factors in the state."""
    where = "plan_shapes"
    known = {pair.layer for pair in pairs}
    for layer in plan.layers:
        require(layer in known, where, "plan.layers", f"layers among {sorted(known)}", layer)
    shapes: dict[str, tuple[int, ...]] = {}
    for pair in pairs:
        if pair.layer in plan.layers:
            a, b = state[pair.a].shape, state[pair.b].shape
            rank = plan.rank_of(pair.layer, a[0])
            require(rank <= a[0], where, f"plan.ranks: {pair.module}", f"at most {a[0]}", rank)
            shapes[pair.a], shapes[pair.b] = (rank, *a[1:]), (b[0], rank, *b[2:])
    return shapes


def plan_bytes(state: Mapping[str, Tensor], plan: LayerPlan, pattern: str = PATTERN) -> int:
    """Return the size in bytes of a plan's tensors, ``itemsize * sum of r (I + O)``.

    These bytes are sent in each direction, in addition to headers and names. See
    :func:`plan_shapes` for arguments and errors.
    """
    return bytes_of(state, plan_shapes(state, plan, pattern))


def bytes_of(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the size in bytes of tensors with these shapes and the dtypes of the state."""
    return sum(state[key].element_size() * math.prod(shape) for key, shape in shapes.items())


def pack_tensors(tensors: Mapping[str, Tensor], flat: bool = False) -> Payload:
    """Convert tensors to arrays of a message.

    Args:
        tensors: tensors by name, of dtype float16, bfloat16, float32 or float64, on any device.
        flat: whether to pack all tensors into one array of bytes. Each array adds more than a
            hundred bytes of headers to a message, which is large compared with factors of small
            rank.

    Raises:
        ValueError: If a tensor has none of these dtypes; the message names the tensor.
    """
    arrays: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        require(value.dtype in _NAMES, "pack_tensors", key, f"one of {[*_DTYPES]}", value.dtype)
        value = value.detach().cpu().contiguous()
        bits = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
        arrays[key] = bits.numpy()
    dtypes = {key: _NAMES[value.dtype] for key, value in tensors.items()}
    if not flat:
        brain = [key for key, name in dtypes.items() if name == "bfloat16"]
        return Payload(arrays, {"bfloat16": brain} if brain else {})
    parts = [array.reshape(-1).view(np.uint8) for array in arrays.values()]
    packed = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
    manifest: Manifest = {
        "names": list(arrays),
        "dtypes": list(dtypes.values()),
        "dims": [array.ndim for array in arrays.values()],
        "sizes": [size for array in arrays.values() for size in array.shape],
    }
    return Payload({_PACKED: packed}, {key: each for key, each in manifest.items() if each})


def unpack_tensors(
    payload: Payload, shapes: Mapping[str, tuple[int, ...]], where: str = "payload"
) -> dict[str, Tensor]:
    """Copy the tensors out of a message.

    Names, dtypes, shapes and sizes are checked before anything is allocated. Missing tensors are
    not detected here; :func:`aggregate` checks for them.

    Args:
        payload: untrusted payload in the format of :func:`pack_tensors`.
        shapes: shapes by allowed name, from :func:`plan_shapes`.
        where: prefix of error messages, such as the node.

    Raises:
        ValueError: If the payload is invalid. The message names the tensor or list.
    """
    manifest = payload.manifest
    found: dict[str, Tensor] = {}
    if "names" in manifest or _PACKED in payload.arrays:
        entries = _flat_entries(payload, where)
    else:
        brain = _list(manifest, "bfloat16", str, where)
        entries = {
            key: (_name_of(key, array, key in brain, where), array)
            for key, array in payload.arrays.items()
        }
    for key, (_, array) in entries.items():
        require(key in shapes, where, f"{key!s:.200}", "a tensor of the plan", "another tensor")
        fits = array.shape == tuple(shapes[key])
        require(fits, where, key, f"shape {list(shapes[key])}", f"shape {list(array.shape)}")
    for key, (name, array) in entries.items():
        own = torch.from_numpy(np.array(array, order="C"))  # a copy, aligned and writable
        found[key] = own.view(torch.bfloat16) if name == "bfloat16" else own
    return found


def _name_of(key: str, array: Any, brain: bool, where: str) -> str:
    """Return the name of the dtype that an array represents, bfloat16 if ``brain``."""
    require(isinstance(array, np.ndarray), where, key, "an array", type(array).__name__)
    if brain:
        require(array.dtype == np.dtype("<u2"), where, key, "uint16 for bfloat16", array.dtype)
        return "bfloat16"
    names = [n for n, (_, d) in _DTYPES.items() if d == array.dtype and n != "bfloat16"]
    require(bool(names), where, key, f"one of {[*_DTYPES]}", array.dtype)
    return names[0]


def _flat_entries(payload: Payload, where: str) -> dict[str, tuple[str, np.ndarray]]:
    keys = [*payload.arrays]
    require(keys == [_PACKED], where, "arrays", f"only {_PACKED!r}", keys[:3])
    packed = payload.arrays[_PACKED]
    require(isinstance(packed, np.ndarray), where, _PACKED, "an array", type(packed).__name__)
    plain = packed.dtype == np.uint8 and packed.ndim == 1
    require(plain, where, _PACKED, "a one-dimensional uint8 array", (packed.dtype, packed.shape))
    names = _list(payload.manifest, "names", str, where)
    dtypes = _list(payload.manifest, "dtypes", str, where)
    dims = _list(payload.manifest, "dims", int, where)
    sizes = _list(payload.manifest, "sizes", int, where)
    repeated = len(names) - len(set(names))
    require(repeated == 0, where, "names", "each name once", f"{repeated} repeated")
    for name, each in (("dtypes", dtypes), ("dims", dims)):
        require(len(each) == len(names), where, name, f"{len(names)} entries", len(each))
    for name, most, each in (("dims", _MAX_DIMS, dims), ("sizes", _MAX_SIZE, sizes)):
        outside = sum(not 0 <= value <= most for value in each)
        found = f"{outside} of {len(each)} out of range"
        require(outside == 0, where, name, f"integers from 0 to {most}", found)
    require(sum(dims) == len(sizes), where, "sizes", f"{sum(dims)} entries", len(sizes))
    entries: dict[str, tuple[str, np.ndarray]] = {}
    start = place = 0
    for key, dtype, dim in zip(names, dtypes, dims, strict=True):
        require(dtype in _DTYPES, where, f"{key:.200}", f"one of {[*_DTYPES]}", f"{dtype:.20}")
        shape = tuple(sizes[place : place + dim])
        kind = _DTYPES[dtype][1]
        stop = start + kind.itemsize * math.prod(shape)
        require(stop <= packed.size, where, key, f"an end within {packed.size} bytes", stop)
        entries[key] = dtype, packed[start:stop].view(kind).reshape(shape)
        start, place = stop, place + dim
    require(start == packed.size, where, _PACKED, f"{start} bytes", packed.size)
    return entries


def _list(manifest: Mapping[str, Any], name: str, kind: type, where: str) -> list[Any]:
    found = manifest.get(name, [])
    plain = isinstance(found, list) and all(type(value) is kind for value in found)
    require(plain, where, name, f"a list of {kind.__name__}", type(found).__name__)
    return found


def read_npy(data: bytes, where: str = "read_npy") -> np.ndarray:
    """Read the bytes of a .npy file as an array, without a copy and without pickle.

    Before any allocation, the number of bytes is compared with the shape and dtype in the header.

    Args:
        data: untrusted content of a file.
        where: prefix of error messages.

    Returns:
        a read-only array that shares the memory of ``data``.

    Raises:
        ValueError: If the bytes are not a .npy file of floating-point or unsigned integer numbers.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(file, max_header_size=_MAX_HEADER_BYTES)
    except Exception as error:  # numpy's parser can raise any exception
        found = f"{error!s:.200}"
        raise ValueError(f"{where}: not a .npy file of version 1.0 or 2.0: {found}") from None
    plain = all(type(size) is int and size >= 0 for size in shape)  # excludes bool
    require(plain, where, "shape", "sizes of at least 0", shape)
    require(dtype.kind in "fu", where, "dtype", "floating-point or unsigned integers", dtype)
    require(len(shape) <= _MAX_DIMS, where, "shape", f"up to {_MAX_DIMS} dimensions", len(shape))
    size, start = dtype.itemsize * math.prod(shape), file.tell()
    require(size == len(data) - start, where, "data", f"{size} bytes", len(data) - start)
    array = np.frombuffer(data, dtype, offset=start)
    return array.reshape(shape, order="F" if fortran else "C")
