"""Adapters read from PEFT's files straight into pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_ext.adapter.config import AdapterConfig
from lora_ext.adapter.model_index import LinearSpec, ModelIndex
from lora_ext.adapter.peft_files import AdapterSource, Factors, NonFiniteError, read_adapter
from lora_ext.adapter.peft_keys import MAGNITUDE

from .pages import PackedModule, pack


@dataclass(frozen=True)
class PackedAdapter:
    """A whole adapter in host memory, checked and packed."""

    config: AdapterConfig
    modules: dict[str, PackedModule]
    leftover: tuple[str, ...] = ()  # what strict=False skipped

    @property
    def nbytes(self) -> int:
        """Bytes of pages, biases and magnitudes."""
        return sum(module.nbytes for module in self.modules.values())


def read_packed(
    source: AdapterSource, index: ModelIndex, max_rank: int, strict: bool = True
) -> PackedAdapter:
    """:func:`lora_ext.adapter.peft_files.read_adapter` into pages."""
    return PackedAdapter(*read_adapter(source, index, max_rank, strict, _packed))


def _packed(spec: LinearSpec, factors: Factors) -> PackedModule:
    a, b, scaling, bias, magnitude, _ = factors
    packed = pack(a, b, bias, scaling, spec.dtype, spec.device.type == "cuda", magnitude)
    parts = {"a": packed.a, "b": packed.b, "B.bias": packed.bias, MAGNITUDE: packed.magnitude}
    for role, values in parts.items():
        # After the conversion, so that what float16 cannot hold is found as well.
        if values is not None and not torch.isfinite(values).all():
            raise NonFiniteError(role, values.dtype)
    return packed
