"""Layers of a model that carry adapters: ours and PEFT's, found alike."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from lora_ext._checks import require

from .._lora_layer import LoraLayer


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, nn.Module]:
    """Return the layers of a model that have LoRA adapters, by their full names.

    Those of this package (:class:`LoraLinear`, :class:`LoraEmbedding`, :class:`LoraConv`) and those
    of PEFT (``lora.Linear`` and its kin), before and after :func:`lora_ext.from_peft`. Layers that
    serve a pool have no adapters of their own.

    Args:
        model: any module; it may be such a layer itself, whose name is ``""``.
        adapter_name: only layers that have this adapter; None for all.

    Returns:
        In the order and with the names of ``model.named_modules()``.

    Raises:
        ValueError: no layer has the adapter that is asked for.
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
    """Return whether a module is a layer that carries LoRA adapters of its own."""
    if isinstance(module, LoraLayer):
        return True
    # Whoever has a layer of PEFT's has imported peft; this package need not.
    peft_layers: Any = sys.modules.get("peft.tuners.lora.layer")
    return peft_layers is not None and isinstance(module, peft_layers.LoraLayer)


def adapters_of(layer: nn.Module) -> tuple[str, ...]:
    """List the names of the adapters that ``layer`` has, active or not; none of a layer without
    any."""
    ranks: Any = layer.r
    return tuple(ranks)


def adapter_parameters(layer: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """Return the parameters of one adapter of one layer: factors, bias, magnitude.

    Args:
        layer: one of :func:`adapted_layers`. adapter_name: one of :func:`adapters_of` it.
    """
    names: Any = getattr(layer, "adapter_layer_names", ())  # PEFT's
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

    They share the memory of the parameters. An embedding's n are its tokens, a convolution's the
    numbers in one of its windows.

    Args:
        layer: one of :func:`adapted_layers`. adapter_name: one of :func:`adapters_of` it.

    Raises:
        NotImplementedError: the adapter has factors for each of several experts.
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
