"""Adapters read from PEFT's files straight into pages."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_ext.adapter import (
    MAGNITUDE,
    AdapterConfig,
    AdapterSource,
    Factors,
    LinearSpec,
    ModelIndex,
    NonFiniteError,
    Replaced,
    read_adapter,
)

from .pages import PackedModule, PackedReplaced, pack


@dataclass(frozen=True)
class PackedAdapter:
    """A whole adapter in host memory, checked and packed."""

    config: AdapterConfig
    modules: dict[str, PackedModule]
    replaced: dict[str, PackedReplaced] = field(default_factory=dict)
    leftover: tuple[str, ...] = ()  # what strict=False skipped

    @property
    def rank(self) -> int:
        """The largest of its modules."""
        return max((part.rank for part in self.modules.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of pages, biases, magnitudes and replaced modules."""
        return sum(part.nbytes for part in (*self.modules.values(), *self.replaced.values()))


def read_packed(
    source: AdapterSource, index: ModelIndex, max_rank: int, strict: bool = True
) -> PackedAdapter:
    """:func:`lora_ext.adapter.peft_files.read_adapter` into pages."""
    parts = read_adapter(source, index, max_rank, strict, _packed)
    replaced = {
        module: _packed_whole(index.modules[module], whole)
        for module, whole in parts.replaced.items()
    }
    return PackedAdapter(parts.config, parts.modules, replaced, parts.leftover)


def _packed_whole(spec: LinearSpec, whole: Replaced) -> PackedReplaced:
    def host(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        pin = spec.device.type == "cuda"
        copy = torch.empty(values.shape, dtype=spec.dtype, pin_memory=pin).copy_(values)
        if not torch.isfinite(copy).all():
            raise ValueError(
                f"AdapterPool: modules_to_save: {spec.name}: expected finite values in "
                f"{spec.dtype}, found NaN or inf"
            )
        return copy

    weight, bias = host(whole.weight), host(whole.bias)
    assert weight is not None
    return PackedReplaced(weight, bias)


def _packed(spec: LinearSpec, factors: Factors) -> PackedModule:
    a, b, scaling, bias, magnitude, _ = factors
    pin = spec.device.type == "cuda"
    packed = pack(a, b, bias, scaling, spec.dtype, pin, magnitude, spec.experts)
    parts = {"a": packed.a, "b": packed.b, "B.bias": packed.bias, MAGNITUDE: packed.magnitude}
    for role, values in parts.items():
        # After the conversion, so that what float16 cannot hold is found as well.
        if values is not None and not torch.isfinite(values).all():
            raise NonFiniteError(role, values.dtype)
    return packed
