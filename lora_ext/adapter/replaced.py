"""Whole modules that an adapter brings along (PEFT's ``modules_to_save``): heads, as a rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from lora_ext._checks import require

from .config import AdapterConfig
from .model_index import PAGE_DTYPES, ModelIndex
from .peft_tensors import TensorSource


class Replaced(NamedTuple):
    """What stands in the place of a linear layer's or an embedding's own tensors."""

    weight: Tensor  # (O, I); of an embedding (tokens, O)
    bias: Tensor | None = None  # (O,)


def find_replaced(
    config: AdapterConfig,
    tensors: TensorSource,
    index: ModelIndex,
    saved: Mapping[str, str],
    adapted: Iterable[str],
) -> dict[str, dict[str, str]]:
    """The modules that an adapter replaces, by name, and their keys by ``weight`` and ``bias``. All
    headers are checked, and no tensor is read.

    Args:
        config: names modules in ``modules_to_save``, by the ends of their names as PEFT does.
        tensors: the adapter's. saved: their keys that lie in such modules, with the weights' names
            in the base model. adapted: modules that have LoRA factors.
    """
    lacking = [w for w in index.weights if config.saves_whole(w) and w not in saved.values()]
    if lacking:
        raise ValueError(
            f"{tensors.where}: expected every weight of the modules that {config.where} names in "
            f"modules_to_save, found none for {lacking[0]}"
        )
    found: dict[str, dict[str, str]] = {}
    for key, name in saved.items():
        module, _, role = name.rpartition(".")
        spec = index.modules.get(module)
        if spec is None or not spec.plain or role not in ("weight", "bias"):
            raise NotImplementedError(
                f"{tensors.where}: {key}: modules_to_save is not supported here: expected whole "
                "Linear and Embedding modules that the pool serves (targets=), found a part of "
                "another one"
            )
        if module in index.bypassed:
            raise NotImplementedError(
                f"{tensors.where}: {key}: modules_to_save is not supported on {module}, whose "
                f"weight {index.bypassed[module]} reads without calling it"
            )
        if module in adapted:
            raise NotImplementedError(
                f"{tensors.where}: {key}: modules_to_save is not supported on {module}, which has "
                "LoRA factors as well"
            )
        expected = "weights that the base model has"
        require(name in index.weights, tensors.where, key, expected, "another")
        info, shape = tensors.infos[key], index.weights.shape(name)
        expected = "float16, bfloat16, float32 or float64"
        require(info.dtype in PAGE_DTYPES, f"{tensors.where}: {key}", "dtype", expected, info.dtype)
        expected = f"{shape} as in the base model"
        other = f"{info.shape}; a head with another number of labels needs a model of its own"
        require(info.shape == shape, f"{tensors.where}: {key}", "shape", expected, other)
        found.setdefault(module, {})[role] = key
    return found


def read_replaced(tensors: TensorSource, keys: Mapping[str, str]) -> Replaced:
    """One module's tensors."""
    bias = tensors.read(keys["bias"]) if "bias" in keys else None
    return Replaced(tensors.read(keys["weight"]), bias)
