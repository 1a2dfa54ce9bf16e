"""Trainable adapters inside a model: factors, gradients and optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.adapter import LoraAdapter, live_adapter
from lora_ext.layers import LoraConfig, LoraLayer, adapted_layers, adapter_parameters, wrap

from ._optimizer import Optimizer

Targets = str | Iterable[str] | None


class LiveAdapter:
    """Adapter of one tenant, with a unique name in all its layers.

    Layers are wrapped if necessary. The initial values depend only on the seed.
    """

    def __init__(self, model: nn.Module, name: str, config: LoraConfig, seed: int):
        self.model, self.name, self.config = model, name, config
        first = not any(isinstance(module, LoraLayer) for module in model.modules())
        with torch.random.fork_rng(devices=[]):  # keeps the state of torch's generator
            # The adapter has the dtype of the base, as in a pool. The optimizer keeps float32
            # copies of 16-bit factors.
            wrap(model, config, name, autocast_adapter_dtype=False)
        layers: Any = adapted_layers(model, name)
        self.layers: dict[str, Any] = layers
        if first:  # wrap has made it active; rows without a name must use the base model
            for layer in self.layers.values():
                layer.set_adapter([])
        generators: dict[torch.device, torch.Generator] = {}
        for layer in self.layers.values():
            device = adapter_parameters(layer, name)[0].device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(seed)
            layer.reset_lora_parameters(name, generator=generators[device])
        self.parameters: dict[str, nn.Parameter] = {}
        for path, layer in self.layers.items():
            for i, parameter in enumerate(adapter_parameters(layer, name)):
                parameter.requires_grad_(True)
                self.parameters[f"{path}.lora_{'AB'[i]}"] = parameter
        self.optimizer = Optimizer(self.parameters)
        #: Sums of gradients over the calls since the last step; None without a call.
        self.gradients: list[Tensor] | None = None

    def add(self, gradients: list[Tensor]) -> None:
        """Add a call's gradients to those for the next step."""
        if self.gradients is None:
            self.gradients = gradients
        else:
            torch._foreach_add_(self.gradients, gradients)  # pyright: ignore[reportPrivateImportUsage]

    def take(self) -> list[Tensor] | None:
        """Return and clear the gradients since the last step."""
        taken, self.gradients = self.gradients, None
        return taken

    def source(self) -> tuple[Any, dict[str, Tensor]]:
        """Return configuration and factors as in PEFT's file; the tensors are not copied."""
        config, state = live_adapter(self.model, self.name, "tenants")
        return {**config, "task_type": "CAUSAL_LM"}, state

    def finite(self) -> bool:
        """Return whether all factors are finite."""
        return all(bool(p.detach().isfinite().all()) for p in self.parameters.values())

    def write(self, adapter: LoraAdapter) -> None:
        """Copy the values of an adapter with the same modules and ranks."""
        with torch.no_grad():
            for path, factors in adapter.modules.items():
                self.parameters[f"{path}.lora_A"].copy_(factors.a)
                self.parameters[f"{path}.lora_B"].copy_(factors.b)

    def delete(self) -> None:
        """Remove the adapter from the model."""
        for layer in self.layers.values():
            layer.delete_adapter(self.name)
