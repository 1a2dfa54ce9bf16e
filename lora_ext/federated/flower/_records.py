"""Conversion of tensors and plans to records of Flower's messages, and back.

Received records are untrusted. "Up" is from a client to the server, "down" is the other direction.

===========  ==========  ===========================================================================
record       direction   content
===========  ==========  ===========================================================================
``lora``     both        the tensors, by PEFT's names
``config``   down        ``server-round``, the plan (``layers``, ``ranks``), and the settings
``metrics``  up          ``num-examples``, ``train-loss``, ``train-time-s``, ``down-time-s``
``echo``     up          ``server-round`` and the plan, copied from ``config``
``node``     up          ``partition-id`` and ``capability``, in the answer to an identity query
===========  ==========  ===========================================================================
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from lora_ext._checks import require

from .._payload import Payload, pack_tensors, read_npy, unpack_tensors

LORA, CONFIG, METRICS, ECHO, NODE = "lora", "config", "metrics", "echo", "node"
PARTITION, CAPABILITY = "partition-id", "capability"  # keys of a node's configuration
PROTOCOL = 1

_NUMPY = "numpy.ndarray"  # Flower's name for the bytes of a .npy file
_BRAIN = "bfloat16"  # numpy lacks it, so the bits are sent as uint16, with this name in Array.dtype
_MAX_INTEGER = 2**63
_MANIFEST = ("names", "dtypes", "dims", "sizes")  # entries for tensors that are packed in one array


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Convert tensors to Flower's record of arrays. The bits of bfloat16 are stored as uint16.

    Args:
        tensors: tensors by name, on any device, such as an adapter's state dict.

    Raises:
        ValueError: If a dtype is not float16, bfloat16, float32 or float64; the message names the
            tensor.
    """
    return _record(pack_tensors(tensors))


def from_arrays(record: Mapping[str, Array], where: str = "from_arrays") -> dict[str, Tensor]:
    """Convert a record from :func:`to_arrays` back to tensors, which are copies.

    Args:
        record: record of arrays from :func:`to_arrays`.
        where: prefix of error messages.

    Returns:
        tensors on the CPU, by name.

    Raises:
        ValueError: If an array does not have the format of :func:`to_arrays`.
    """
    payload = _payload(record, {}, where)
    shapes = {key: array.shape for key, array in payload.arrays.items()}
    return unpack_tensors(payload, shapes, where)


def pack(tensors: Mapping[str, Tensor], flat: bool) -> tuple[ArrayRecord, dict[str, Any]]:
    """Convert tensors to a record. Return the record, and entries to add to the message's settings,
    from which :func:`unpack` reads them (none unless ``flat``)."""
    payload = pack_tensors(tensors, flat)
    return _record(payload), payload.manifest if flat else {}


def unpack(
    record: Mapping[str, Array],
    settings: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> dict[str, Tensor]:
    """Read the tensors of an untrusted message.

    The declared ``shape`` and ``dtype`` of an array are compared with its bytes. Nothing is
    unpickled, and nothing is allocated before the sizes are compared.

    Raises:
        ValueError: If a name or shape is not in ``shapes``, or a declaration does not match.
    """
    if "names" not in settings:  # check the names before any array is decoded
        for key in record:
            require(key in shapes, where, f"{key!s:.200}", "a tensor of the plan", "another tensor")
    return unpack_tensors(_payload(record, settings, where), shapes, where)


def said_shapes(
    record: Mapping[str, Array], settings: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a message declares; :func:`unpack` compares them with the bytes."""
    if "names" not in settings:
        return {key: tuple(array.shape) for key, array in record.items()}
    sizes = iter(settings.get("sizes", []))
    dims = zip(settings["names"], settings.get("dims", []), strict=False)
    return {name: tuple(itertools.islice(sizes, dim)) for name, dim in dims}


def read_config(message: Message) -> ConfigRecord:
    """Return the settings of a message from the server."""
    records = message.content.config_records
    require(CONFIG in records, "message", "records", f"a record {CONFIG!r}", [*message.content])
    config = records[CONFIG]
    found = config.get("protocol")
    require(found == PROTOCOL, "message", "protocol", PROTOCOL, found)
    return config


def who(message: Message, context: Context) -> Message:
    """Return the answer to an identity query: the partition and the capability in the node's
    configuration, each only if it is an integer."""
    given = {name: context.node_config.get(name) for name in (PARTITION, CAPABILITY)}
    identity: Any = {name: value for name, value in given.items() if type(value) is int}
    return Message(RecordDict({NODE: ConfigRecord(identity)}), reply_to=message)


def count_bytes(content: Mapping[str, Any]) -> int:
    """Count the bytes of all records with Flower's method. If the method raises for a record, count
    the bytes of the serialised record."""
    total = 0
    for record in content.values():
        try:
            total += record.count_bytes()
        except (IndexError, ValueError):  # Flower cannot count an empty list or string
            total += len(record.deflate())
    return total


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the untrusted metrics that are numbers, including NaN and infinity."""
    return {
        key: float(value)
        for key, value in record.items()
        if type(value) is float or (type(value) is int and abs(value) < _MAX_INTEGER)
    }


def mean_metrics(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
    """Compute the weighted mean of each metric over the clients that report a finite value."""
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
        own, declared = list(decoded.shape), list(array.shape)
        expected, found = f"{own} as in its bytes", f"{declared!r:.100}"
        require(own == declared, where, f"{key:.200}: shape", expected, found)
        dtype = "uint16" if array.dtype == _BRAIN else array.dtype
        own = decoded.dtype.name
        require(own == dtype, where, f"{key:.200}: dtype", f"{own} as in its bytes", f"{dtype:.50}")
        arrays[key] = decoded
    brain = [key for key, array in record.items() if array.dtype == _BRAIN]
    manifest = {name: settings[name] for name in _MANIFEST if name in settings}
    return Payload(arrays, {**manifest, _BRAIN: brain})
