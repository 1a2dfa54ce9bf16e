"""An adapter that trains inside the model: its factors, gradients and optimizer."""

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
    """One tenant's adapter, under a name of its own in every layer that it reaches; layers are
    wrapped where they are not yet. The initial values depend on the seed and nothing else."""

    def __init__(self, model: nn.Module, name: str, config: LoraConfig, seed: int):
        self.model, self.name, self.config = model, name, config
        first = not any(isinstance(module, LoraLayer) for module in model.modules())
        with torch.random.fork_rng(devices=[]):  # nobody's draws move
            # The dtype of the base, as a pool has it: 16 bits are trained beside 32 of their own.
            wrap(model, config, name, autocast_adapter_dtype=False)
        layers: Any = adapted_layers(model, name)
        self.layers: dict[str, Any] = layers
        if first:  # which wrap made active: nobody's rows are anybody's by default
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
        #: Sums over the calls since the last step; None: there was none.
        self.gradients: list[Tensor] | None = None

    def add(self, gradients: list[Tensor]) -> None:
        """Add a call's gradients to those that wait for a step."""
        if self.gradients is None:
            self.gradients = gradients
        else:
            torch._foreach_add_(self.gradients, gradients)  # pyright: ignore[reportPrivateImportUsage]

    def take(self) -> list[Tensor] | None:
        """Return and forget the gradients since the last step."""
        taken, self.gradients = self.gradients, None
        return taken

    def source(self) -> tuple[Any, dict[str, Tensor]]:
        """Return configuration and factors as in PEFT's file; the tensors are the model's own."""
        config, state = live_adapter(self.model, self.name, "tenants")
        return {**config, "task_type": "CAUSAL_LM"}, state

    def finite(self) -> bool:
        """Return whether all factors are finite."""
        return all(bool(p.detach().isfinite().all()) for p in self.parameters.values())

    def write(self, adapter: LoraAdapter) -> None:
        """Take the values of an adapter of the same modules and ranks."""
        with torch.no_grad():
            for path, factors in adapter.modules.items():
                self.parameters[f"{path}.lora_A"].copy_(factors.a)
                self.parameters[f"{path}.lora_B"].copy_(factors.b)

    def delete(self) -> None:
        """Take it out of the model."""
        for layer in self.layers.values():
            layer.delete_adapter(self.name)
