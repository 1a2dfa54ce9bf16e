"""Tensors and plans as records of Flower's messages, and back. Nothing received is trusted.

===========  ==========  ===========================================================================
record       direction   content
===========  ==========  ===========================================================================
``lora``     both        the tensors, by PEFT's names
``config``   down        ``server-round``, the plan (``layers``, ``ranks``), and the settings
``metrics``  up          ``num-examples``, ``train-loss``, ``train-time-s``, ``down-time-s``
``echo``     up          ``server-round`` and the plan, as they came down
``node``     up          ``partition-id`` and ``capability``, in the answer to a query
===========  ==========  ===========================================================================
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from torch import Tensor

from lora_ext._checks import require

from .._payload import Payload, pack_tensors, read_npy, unpack_tensors

LORA, CONFIG, METRICS, ECHO, NODE = "lora", "config", "metrics", "echo", "node"
PARTITION, CAPABILITY = "partition-id", "capability"  # of a node's configuration
PROTOCOL = 1

_NUMPY = "numpy.ndarray"  # Flower's name for the bytes of a .npy file
_BRAIN = "bfloat16"  # which numpy lacks: its bits travel as uint16, and Array.dtype says so
_MOST = 2**63
_MANIFEST = ("names", "dtypes", "dims", "sizes")  # of tensors in one array


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Write tensors as Flower's record of arrays, those of bfloat16 as the bits of uint16.

    Args:
        tensors: by name, on any device: an adapter's state dict, say.

    Raises:
        ValueError: a dtype that is not float16, bfloat16, float32 or float64, naming the tensor.
    """
    return _record(pack_tensors(tensors))


def from_arrays(record: Mapping[str, Array], where: str = "from_arrays") -> dict[str, Tensor]:
    """Read the tensors of a record of one's own, into memory of their own.

    Args:
        record: of :func:`to_arrays`. where: opens the message of an error.

    Returns:
        tensors on the CPU, by name.

    Raises:
        ValueError: an array that is none of :func:`to_arrays`, naming key, expected and found.
    """
    payload = _payload(record, {}, where)
    shapes = {key: array.shape for key, array in payload.arrays.items()}
    return unpack_tensors(payload, shapes, where)


def pack(tensors: Mapping[str, Tensor], flat: bool) -> tuple[ArrayRecord, dict[str, Any]]:
    """Tensors as a record, and what the message's settings must say of it (nothing unless
    flat)."""
    payload = pack_tensors(tensors, flat)
    return _record(payload), payload.manifest if flat else {}


def unpack(
    record: Mapping[str, Array],
    settings: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> dict[str, Tensor]:
    """The tensors of somebody's message: names and shapes are those that are expected.

    An array's own ``shape`` and ``dtype`` are compared with what its bytes say. Nothing is
    unpickled, and nothing allocated before the sizes are compared.

    Raises:
        ValueError: naming key, expected and found.
    """
    if "names" not in settings:  # before anything is decoded
        for key in record:
            require(key in shapes, where, f"{key!s:.200}", "a name of the plan", "none that it has")
    return unpack_tensors(_payload(record, settings, where), shapes, where)


def said_shapes(
    record: Mapping[str, Array], settings: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """The shapes that a message says it has; :func:`unpack` compares them with the bytes."""
    if "names" not in settings:
        return {key: tuple(array.shape) for key, array in record.items()}
    sizes = iter(settings.get("sizes", []))
    dims = zip(settings["names"], settings.get("dims", []), strict=False)
    return {name: tuple(itertools.islice(sizes, dim)) for name, dim in dims}


def read_config(message: Message) -> ConfigRecord:
    """The settings of a message from the server."""
    records = message.content.config_records
    require(CONFIG in records, "message", "records", f"{CONFIG!r}", sorted(message.content))
    config = records[CONFIG]
    found = config.get("protocol")
    require(found == PROTOCOL, "message", "protocol", PROTOCOL, found)
    return config


def who(message: Message, context: Context) -> Message:
    """Return the answer to the query who a node is: the integers of its configuration."""
    given = {name: context.node_config.get(name) for name in (PARTITION, CAPABILITY)}
    said: Any = {name: value for name, value in given.items() if type(value) is int}
    return Message(RecordDict({NODE: ConfigRecord(said)}), reply_to=message)


def count_bytes(content: Mapping[str, Any]) -> int:
    """Bytes of all records, as Flower counts them; of one that it cannot count, its message's."""
    total = 0
    for record in content.values():
        try:
            total += record.count_bytes()
        except (IndexError, ValueError):  # an empty list or string in a reply's settings
            total += len(record.deflate())
    return total


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The plain numbers of somebody's metrics; NaN and infinity may be among them."""
    return {
        key: float(value)
        for key, value in record.items()
        if type(value) is float or (type(value) is int and abs(value) < _MOST)
    }


def mean_metrics(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
    """The weighted mean of each number over the clients that report a finite one."""
    sums: dict[str, tuple[float, float]] = {}
    for content in contents:
        found = numbers(next(iter(content.metric_records.values()), {}))
        weight = found.pop(weighted_by, 0.0)
        for name, value in found.items():
            if math.isfinite(value) and 0 < weight < math.inf:
                total, weights = sums.get(name, (0.0, 0.0))
                sums[name] = total + weight * value, weights + weight
    return MetricRecord({name: total / weights for name, (total, weights) in sums.items()})


def _record(payload: Payload) -> ArrayRecord:
    arrays = {key: Array(array) for key, array in payload.arrays.items()}
    for key in payload.manifest.get(_BRAIN, []):
        arrays[str(key)].dtype = _BRAIN
    return ArrayRecord(arrays)


def _payload(record: Mapping[str, Array], settings: Mapping[str, Any], where: str) -> Payload:
    arrays: dict[str, Any] = {}
    for key, array in record.items():
        require(array.stype == _NUMPY, where, key, f"stype {_NUMPY!r}", f"{array.stype!r:.50}")
        decoded = read_npy(array.data, f"{where}: {key:.200}")
        own, said = list(decoded.shape), list(array.shape)
        expected, found = f"{own} as in its bytes", f"{said!r:.100}"
        require(own == said, where, f"{key:.200}: shape", expected, found)
        dtype = "uint16" if array.dtype == _BRAIN else array.dtype
        own = decoded.dtype.name
        require(own == dtype, where, f"{key:.200}: dtype", f"{own} as in its bytes", f"{dtype:.50}")
        arrays[key] = decoded
    brain = [key for key, array in record.items() if array.dtype == _BRAIN]
    manifest = {name: settings[name] for name in _MANIFEST if name in settings}
    return Payload(arrays, {**manifest, _BRAIN: brain})
