"""Protobuf messages of Tinker's API: https://pypi.org/project/tinker, version 0.25 and later.

The messages are defined here with the field numbers and types of Tinker's messages, which determine
the encoding. Names may differ. A map is encoded as a list of messages with a key and a value, and
an enumeration as a number. This module requires only the package ``protobuf``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from lora_ext._checks import instance
from lora_ext.tenants import Datum, Result, Sample

MIME = "application/x-protobuf"
# Fields of each message, each with name, number and type. A repeated field has "*" before its type.
_MESSAGES = {
    "Tensor": "dense 1 bytes, sparse_csr 2 bytes, dtype 3 int32, shape 4 *int64",
    "Text": "tokens 1 bytes",
    "Chunk": "encoded_text 1 Text, image 2 bytes, dmel 3 bytes",
    "Input": "key 1 string, value 2 Tensor",
    "Datum": "model_input 1 *Chunk, loss_fn_inputs 2 *Input",
    "Option": "key 1 string, value 2 double",
    "Value": "number 1 double, text 2 string",
    "Option2": "key 1 string, value 2 Value",
    "ForwardBackwardRequest": "model_id 1 string, seq_id 2 int32, data 3 *Datum, loss_fn 4 string, "
    "loss_fn_config 5 *Option, forward_only 6 bool, loss_fn_config_v2 7 *Option2",
    "Batched": "data 1 bytes, offsets 2 bytes, dtype 3 int32, trailing_shape 4 *int64",
    "Field": "key 1 string, value 2 Batched",
    "Record": "type_tag 1 string, fields 2 *Field, num_datums 3 int64",
    "ForwardBackwardOutput": "type 1 string, loss_fn_outputs 2 *Record, metrics 3 *Option",
    "Sequence": "stop_reason 1 int32, tokens 2 bytes, logprobs 3 bytes",
    "SampleResponse": "sequences 1 *Sequence, prompt_logprobs 2 bytes",
}
_DTYPES = {1: np.float32, 2: np.int64, 3: np.int32}
_STOPS = {"stop": 0, "length": 1}


def _made() -> dict[str, Any]:
    package = "lora_ext.tinker_wire"
    file = descriptor_pb2.FileDescriptorProto(name=package, package=package, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for text in fields.split(", "):
            field, number, kind = text.split()
            many, kind = kind.startswith("*"), kind.removeprefix("*")
            made = message.field.add(name=field, number=int(number), label=3 if many else 1)
            if kind in _MESSAGES:
                made.type, made.type_name = made.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                made.type = getattr(made, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = {n: pool.FindMessageTypeByName(f"{package}.{n}") for n in _MESSAGES}
    return {name: message_factory.GetMessageClass(kind) for name, kind in found.items()}


messages = _made()


def read_request(body: bytes) -> tuple[Any, list[Datum], dict[str, float]]:
    """Parse the body of a ``forward_backward`` or ``forward`` request.

    Returns:
        The message, its data, and the options of its loss.

    Raises:
        ValueError: If the body is not such a message, or if it contains an image or sound.
    """
    try:
        request = messages["ForwardBackwardRequest"].FromString(body)
    except Exception as error:
        raise ValueError(f"body: not a valid ForwardBackwardRequest: {error}") from None
    data = []
    for i, datum in enumerate(request.data):
        for chunk in datum.model_input:
            if chunk.image or chunk.dmel:
                raise ValueError(f"data[{i}].model_input: expected text, found an image or sound")
        tokens = b"".join(chunk.encoded_text.tokens for chunk in datum.model_input)
        inputs = {e.key: _tensor(f"data[{i}].{e.key}", e.value) for e in datum.loss_fn_inputs}
        data.append(Datum(_array(f"data[{i}].model_input", tokens, np.int32), inputs))
    options = {each.key: each.value for each in request.loss_fn_config}
    options |= {e.key: e.value.text or e.value.number for e in request.loss_fn_config_v2}
    return request, data, options


def _array(where: str, data: bytes, dtype: Any) -> torch.Tensor:
    if len(data) % np.dtype(dtype).itemsize:
        raise ValueError(f"{where}: expected {np.dtype(dtype)} numbers, found {len(data)} bytes")
    return torch.from_numpy(np.frombuffer(data, dtype).copy())


def _tensor(where: str, tensor: Any) -> torch.Tensor:
    if tensor.sparse_csr or tensor.dtype not in _DTYPES:
        found = "a sparse tensor" if tensor.sparse_csr else f"dtype {tensor.dtype}"
        raise ValueError(f"{where}: expected dense float32, int64 or int32, found {found}")
    found, shape = _array(where, tensor.dense, _DTYPES[tensor.dtype]), list(tensor.shape)
    if any(n < 0 for n in shape) or math.prod(shape) != found.numel():
        raise ValueError(f"{where}: expected a shape of {found.numel()} elements, found {shape}")
    return found.reshape(shape)


def written_result(result: Result) -> bytes:
    """Return the encoded response to a ``forward_backward`` or ``forward`` request."""
    answer = messages["ForwardBackwardOutput"](type="ArrayRecord")
    each = [np.ascontiguousarray(lp.numpy(), np.float32) for lp in result.logprobs]
    record = answer.loss_fn_outputs.add(num_datums=len(each))
    value = record.fields.add(key="logprobs").value
    value.dtype, value.data = 1, b"".join(a.tobytes() for a in each)
    value.offsets = np.cumsum([0, *(a.nbytes for a in each)]).astype(np.int64).tobytes()
    if each and all(a.shape[1:] == each[0].shape[1:] for a in each):
        value.trailing_shape.extend(each[0].shape[1:])
    for name, number in result.metrics.items():
        answer.metrics.add(key=name, value=number)
    return answer.SerializeToString()


def written_samples(samples: Sequence[Sample], prompt: Sequence[float] | None) -> bytes:
    """Return the encoded response to an ``asample`` request.

    Args:
        samples: the samples.
        prompt: log-probabilities of the prompt's tokens after the first, or None. The response
            contains NaN for the first token.
    """
    answer = messages["SampleResponse"]()
    for sample in samples:
        answer.sequences.add(
            stop_reason=_STOPS[sample.stop_reason],
            tokens=np.array(sample.tokens, np.int32).tobytes(),
            logprobs=np.array(sample.logprobs, np.float32).tobytes(),
        )
    if prompt is not None:
        answer.prompt_logprobs = np.array([math.nan, *prompt], np.float32).tobytes()
    return answer.SerializeToString()


def prompt_of(prompt: Mapping[str, Any]) -> list[int]:
    """Return the tokens of the prompt in the JSON body of an ``asample`` request."""
    tokens: list[int] = []
    chunks = prompt["chunks"]
    instance("asample", "prompt.chunks", chunks, list)
    for i, chunk in enumerate(chunks):
        instance("asample", f"prompt.chunks[{i}]", chunk, dict)
        if chunk.get("type", "encoded_text") != "encoded_text":
            raise ValueError(f"prompt: expected text, found a chunk of type {chunk.get('type')!r}")
        instance("asample", f"prompt.chunks[{i}].tokens", chunk["tokens"], list)
        tokens += chunk["tokens"]
    return tokens
