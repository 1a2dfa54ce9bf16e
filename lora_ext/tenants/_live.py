"""Trainable adapter of a tenant inside the model: factors, gradients and optimizer."""

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
    """Adapter of one tenant, which has the same unique name in all layers.

    Layers that are not LoRA layers yet are wrapped. The initial values depend only on the seed.
    """

    def __init__(self, model: nn.Module, name: str, config: LoraConfig, seed: int):
        self.model, self.name, self.config = model, name, config
        first = not any(isinstance(module, LoraLayer) for module in model.modules())
        with torch.random.fork_rng(devices=[]):  # restores the state of torch's CPU generator
            # The adapter has the dtype of the base model, as in a pool, and is not cast to float32.
            # The optimizer keeps float32 copies of 16-bit factors.
            wrap(model, config, name, autocast_adapter_dtype=False)
        layers: Any = adapted_layers(model, name)
        self.layers: dict[str, Any] = layers
        if first:  # `wrap` activated the adapter, but rows without a name must use the base model.
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
        #: Gradients summed over the calls since the last optimizer step; None if there was no call.
        self.gradients: list[Tensor] | None = None

    def add(self, gradients: list[Tensor]) -> None:
        """Add the gradients of a call to :attr:`gradients`."""
        if self.gradients is None:
            self.gradients = gradients
        else:
            torch._foreach_add_(self.gradients, gradients)  # pyright: ignore[reportPrivateImportUsage]

    def take(self) -> list[Tensor] | None:
        """Return :attr:`gradients` and set them to None."""
        taken, self.gradients = self.gradients, None
        return taken

    def source(self) -> tuple[Any, dict[str, Tensor]]:
        """Return PEFT's configuration and state dict of the adapter, without copying tensors."""
        config, state = live_adapter(self.model, self.name, "tenants")
        return {**config, "task_type": "CAUSAL_LM"}, state

    def finite(self) -> bool:
        """Return whether all factors are finite."""
        return all(bool(p.detach().isfinite().all()) for p in self.parameters.values())

    def write(self, adapter: LoraAdapter) -> None:
        """Copy the values of another adapter, which must have the same modules and ranks."""
        with torch.no_grad():
            for path, factors in adapter.modules.items():
                self.parameters[f"{path}.lora_A"].copy_(factors.a)
                self.parameters[f"{path}.lora_B"].copy_(factors.b)

    def delete(self) -> None:
        """Remove the adapter from the model."""
        for layer in self.layers.values():
            layer.delete_adapter(self.name)
