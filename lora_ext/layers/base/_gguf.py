"""Conversion of the blocks in a GGUF file to packed weights, without dequantising them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._checks import require

from ._packed_weight import Format

_WHERE = "pack_linears"
_GROUP = 32  # number of values in a block

#: Architectures whose files contain the weights of transformers' linear layers. Files of "llama"
#: store the rows of q and k in another order than transformers.
_ARCHITECTURES = ("llama", "qwen2", "qwen3")

#: Bits, and whether blocks have a minimum, by the name of the GGUF type. A block contains a float16
#: scale, a float16 minimum (if any), and 32 codes: 32 int8, or the 16 low and then the 16 high
#: halves of 16 bytes.
_TYPES = {"Q8_0": (8, False), "Q4_0": (4, False), "Q4_1": (4, True)}


def gguf_blocks(path: Any, linears: Mapping[str, nn.Linear]) -> dict[str, tuple[Format, Tensor]]:
    """Return the format and the packed weight of layers in a GGUF file, by name.

    Layers whose weight in the file has a type that is not in ``_TYPES`` are left out.

    Args:
        path: path of the file.
        linears: linear layers by name.

    Raises:
        ModuleNotFoundError: If the package ``gguf`` is missing.
        ValueError: If the file has an unsupported architecture, a weight of another size than its
            layer, or no weight with a type in ``_TYPES``.
    """
    gguf: Any = importlib.import_module("gguf")
    reader = gguf.GGUFReader(path)
    fields = {key: f.contents() for key, f in reader.fields.items() if "token" not in key}
    kind: str = fields["general.architecture"]
    require(kind in _ARCHITECTURES, _WHERE, "gguf", f"one of {_ARCHITECTURES}", repr(kind))
    heads: int = fields[f"{kind}.attention.head_count"]
    turned = {"attn_q": heads, "attn_k": fields.get(f"{kind}.attention.head_count_kv", heads)}
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    known = gguf.get_tensor_name_map(arch, fields[f"{kind}.block_count"])
    tensors = {t.name: t for t in reader.tensors if t.tensor_type.name in _TYPES}
    if "output.weight" not in {t.name for t in reader.tensors}:  # a head tied to the embedding
        tensors["output.weight"] = tensors.get("token_embd.weight")
    found: dict[str, tuple[Format, Tensor]] = {}
    for name, module in linears.items():
        stem = known.get_name(name) or ""
        if (tensor := tensors.get(f"{stem}.weight")) is None:
            continue
        size = [int(n) for n in tensor.shape][::-1]
        expected = [module.out_features, module.in_features]
        require(size == expected, f"{_WHERE}: gguf", repr(name), f"shape {expected}", size)
        order = turned.get(stem.rpartition(".")[2]) if kind == "llama" else None
        found[name] = _blocks(np.array(tensor.data), *_TYPES[tensor.tensor_type.name], order)
    require(found, _WHERE, "gguf", f"weights of {tuple(_TYPES)}", "none for the model's layers")
    return found


def _blocks(data: Any, bits: int, minimum: bool, heads: int | None) -> tuple[Format, Tensor]:
    """Return the format and the packed weight for the blocks ``data (O, bytes per row)``."""
    raw = torch.from_numpy(data)
    if heads is not None:  # GGUF stores rows i and i + half of a head next to each other
        half = raw.shape[0] // heads // 2
        raw = raw.view(heads, half, 2, -1).transpose(1, 2).reshape(raw.shape)
    head = 4 if minimum else 2
    raw = raw.view(raw.shape[0], -1, head + _GROUP * bits // 8)  # (O, groups, bytes of a block)
    scales, codes = raw[..., :head].contiguous().view(torch.float16), raw[..., head:].contiguous()
    codes = codes.view(torch.int8) if bits == 8 else torch.cat([codes & 15, codes >> 4], 2)
    least = scales[..., 1] if minimum else None
    return Format(bits, _GROUP, minimum), ops.pack_codes(codes, scales[..., 0], least)
