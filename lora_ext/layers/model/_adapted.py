"""Functions that find the layers with adapters in a model: layers of this package or of PEFT."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.kinds import Kind, kind_of

from .._lora_layer import LoraLayer


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, nn.Module]:
    """Return the layers of a model that have LoRA adapters, by name.

    They may be layers of this package (:class:`LoraLinear`, :class:`LoraEmbedding`,
    :class:`LoraConv`) or of PEFT (``lora.Linear`` and related classes), before or after
    :func:`lora_ext.from_peft`. Layers of an :class:`lora_ext.AdapterPool` are not included, because
    the pool stores their adapters.

    Args:
        model: module to search. If it is itself a layer with adapters, its name is ``""``.
        adapter_name: name of an adapter, to return only the layers that have it; None returns all.

    Returns:
        Layers by full name, in the order of ``model.named_modules()``.

    Raises:
        ValueError: If no layer has the adapter.
    """
    found = {name: module for name, module in model.named_modules() if is_adapted(module)}
    if adapter_name is None:
        return found
    chosen = {name: m for name, m in found.items() if adapter_name in adapters_of(m)}
    known = sorted({known for module in found.values() for known in adapters_of(module)})
    expected = f"an adapter of {type(model).__name__}, which has {known}"
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    kind = "" if config is None else f" with peft_type={getattr(config.peft_type, 'value', None)!r}"
    require(chosen, "adapted_layers", "adapter_name", expected, f"{adapter_name!r}{kind}")
    return chosen


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module is a layer with LoRA adapters."""
    if isinstance(module, LoraLayer):
        return True
    # peft is not imported here: if it has not been imported yet, no layer of PEFT exists.
    peft_layers: Any = sys.modules.get("peft.tuners.lora.layer")
    return peft_layers is not None and isinstance(module, peft_layers.LoraLayer)


def adapters_of(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of all adapters of ``layer``, active or not."""
    ranks: Any = layer.r
    return tuple(ranks)


def kind_of_layer(layer: nn.Module, adapter_name: str) -> Kind:
    """Return the kind of a layer's adapter, which the layer's settings determine."""
    settings = SimpleNamespace(get=lambda name: getattr(layer, name, {}).get(adapter_name))
    return kind_of("LORA", settings)


def adapter_parameters(layer: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """Return the parameters of one adapter in one layer: factors, bias and magnitude.

    Args:
        layer: layer with adapters, from :func:`adapted_layers`.
        adapter_name: name of an adapter of the layer.
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
    """Return the factors of one adapter in one layer as matrices: A ``(r, n)`` and B ``(m, r)``.

    The matrices share the memory of the parameters. For an embedding, n is the number of tokens in
    the vocabulary; for a convolution, the number of elements in a window.

    Args:
        layer: layer with adapters, from :func:`adapted_layers`.
        adapter_name: name of an adapter of the layer.

    Raises:
        NotImplementedError: If the layer has several experts, each with its own factors.
    """
    experts: Any = getattr(layer, "num_experts", 1)
    expected = "one pair of factors"
    more = f"a {type(layer).__name__} with one pair for each of {experts} experts"
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
