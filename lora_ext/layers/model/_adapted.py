"""Layers of a model that have adapters, of this package or of PEFT."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from lora_ext._checks import require

from .._lora_layer import LoraLayer


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, nn.Module]:
    """Return the layers of a model that have LoRA adapters, by their full names.

    These are layers of this package (:class:`LoraLinear`, :class:`LoraEmbedding`,
    :class:`LoraConv`) and of PEFT (``lora.Linear`` and related classes), before and after
    :func:`lora_ext.from_peft`. Layers of a pool are not included: the pool has their adapters.

    Args:
        model: any module; it may be such a layer itself, whose name is ``""``.
        adapter_name: only layers that have this adapter; None for all.

    Returns:
        Layers by name, in the order of ``model.named_modules()``.

    Raises:
        ValueError: If no layer has the adapter.
    """
    found = {name: module for name, module in model.named_modules() if is_adapted(module)}
    if adapter_name is None:
        return found
    chosen = {name: m for name, m in found.items() if adapter_name in adapters_of(m)}
    known = sorted({known for module in found.values() for known in adapters_of(module)})
    expected = f"an adapter of {type(model).__name__}, which has {known}"
    require(chosen, "adapted_layers", "adapter_name", expected, repr(adapter_name))
    return chosen


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module is a layer with LoRA adapters."""
    if isinstance(module, LoraLayer):
        return True
    # A layer of PEFT exists only if peft has been imported; it is not imported here.
    peft_layers: Any = sys.modules.get("peft.tuners.lora.layer")
    return peft_layers is not None and isinstance(module, peft_layers.LoraLayer)


def adapters_of(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of all adapters of ``layer``, active or not."""
    ranks: Any = layer.r
    return tuple(ranks)


def adapter_parameters(layer: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """Return the parameters of one adapter of one layer: factors, bias, magnitude.

    Args:
        layer: one of :func:`adapted_layers`.
        adapter_name: one of ``adapters_of(layer)``.
    """
    names: Any = getattr(layer, "adapter_layer_names", ())  # attribute of PEFT's layers
    if isinstance(layer, LoraLayer):
        names = (*layer.base_weight.stores, "lora_magnitude_vector")
    found: list[nn.Parameter] = []
    for name in names:
        store: Any = getattr(layer, name, {})
        if adapter_name in store:
            entry = store[adapter_name]
            found += [entry] if isinstance(entry, nn.Parameter) else list(entry.parameters())
    return found


def adapter_factors(layer: nn.Module, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return the factors of one adapter of one layer as matrices: A ``(r, n)`` and B ``(m, r)``.

    They share the memory of the parameters. For an embedding n is the number of tokens, for a
    convolution the size of a window.

    Args:
        layer: one of :func:`adapted_layers`.
        adapter_name: one of ``adapters_of(layer)``.

    Raises:
        NotImplementedError: If the adapter has factors for each of several experts.
    """
    experts: Any = getattr(layer, "num_experts", 1)
    expected = "one pair of factors"
    more = f"a {type(layer).__name__} with one for each of {experts} experts"
    require(experts <= 1, "adapter_factors", "layer", expected, more, NotImplementedError)
    found: list[Tensor] = []
    for role in "AB":
        for prefix in ("lora_", "lora_embedding_"):
            store: Any = getattr(layer, prefix + role, {})
            if adapter_name in store:
                entry = store[adapter_name]
                weight: Tensor = entry if isinstance(entry, Tensor) else entry.weight
                found.append(weight.detach().flatten(1))
    a, b = found
    return a, b
