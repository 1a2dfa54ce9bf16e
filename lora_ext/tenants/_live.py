"""Trainable adapter of a tenant inside the model, and its AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import number, require
from lora_ext.adapter import LoraAdapter, live_adapter
from lora_ext.layers import LoraConfig, LoraLayer, adapted_layers, adapter_parameters, wrap

MOMENTS = ("exp_avg", "exp_avg_sq")
Targets = str | Iterable[str] | None


class LiveAdapter:
    """Adapter of one tenant, with the same unique name in all layers.

    Layers that are not LoRA layers yet are wrapped. The initial values depend only on ``seed``.
    """

    def __init__(self, model: nn.Module, name: str, config: LoraConfig, seed: int):
        self.model, self.name, self.config = model, name, config
        first = not any(isinstance(module, LoraLayer) for module in model.modules())
        with torch.random.fork_rng(devices=[]):  # restores the state of torch's CPU generator
            # The adapter has the dtype of the base model, as in a pool. It is not cast to float32,
            # since the optimizer keeps float32 copies of 16-bit factors.
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
        """Return the value of :attr:`gradients`, and set the attribute to None."""
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


def checked_settings(
    lr: Any, betas: Any, eps: Any, weight_decay: Any, max_grad_norm: Any
) -> dict[str, Any]:
    """Return the arguments of ``optim_step``; raise ValueError if one is invalid."""
    where = "optim_step"
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    require(pair, where, "betas", "two numbers in [0, 1)", repr(betas))
    norm = max_grad_norm
    return {
        "lr": float(number(where, "lr", lr, 0)),
        "betas": tuple(number(where, "betas", beta, 0, below=1) for beta in betas),
        # With eps = 0, the first step would divide 0 by 0: B is initially 0, so the gradient of A
        # is 0.
        "eps": float(number(where, "eps", eps, above=0)),
        "weight_decay": float(number(where, "weight_decay", weight_decay, 0)),
        "max_norm": math.inf if norm is None else number(where, "max_grad_norm", norm, above=0),
    }


class Optimizer:
    """Torch's AdamW for the factors of one adapter.

    For 16-bit factors, AdamW updates float32 copies, which are rounded to the factors after each
    step. Otherwise, updates below the precision of the 16-bit dtype would be lost.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self._parameters = dict(parameters)
        wide = (torch.float32, torch.float64)
        self._trained = {
            name: p if p.dtype in wide else nn.Parameter(p.detach().float())
            for name, p in parameters.items()
        }
        self._adamw = torch.optim.AdamW(self._trained.values(), fused=True)

    def step(self, gradients: list[Tensor] | None, max_norm: float, **settings: Any) -> float:
        """Clip the gradients, take a step, and return the norm of the gradients before clipping.

        If ``gradients`` is None, return 0 and change nothing. The arguments are those of
        :func:`checked_settings`.

        Raises:
            ValueError: If the norm is not finite. Nothing changes in this case.
        """
        if gradients is None:
            return 0.0
        norm = float(torch.nn.utils.get_total_norm(gradients))
        expected = "a norm of the gradients that is finite in float32"
        require(math.isfinite(norm), "optim_step", "gradients", expected, norm)
        if max_norm < math.inf:
            # The formula of torch.nn.utils.clip_grad_norm_.
            factor = min(1.0, max_norm / (norm + 1e-6))
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        for trained, gradient in zip(self._trained.values(), gradients, strict=True):
            trained.grad = gradient
        self._adamw.param_groups[0].update(settings)
        self._adamw.step()
        self._adamw.zero_grad()
        self.round()
        return norm

    def round(self) -> None:
        """Copy the trained values to the factors, rounded to their dtype."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if self._trained[name] is not parameter:
                    parameter.copy_(self._trained[name])

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state: tensors by their names in a checkpoint."""
        found: dict[str, Tensor] = {}
        for name, trained in self._trained.items():
            if trained is not self._parameters[name]:
                found[f"{name}:weight"] = trained.detach()
            for key, value in self._adamw.state.get(trained, {}).items():
                found[f"{name}:{key}"] = value
        return found

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of all tensors that :meth:`tensors` may contain."""
        found: dict[str, torch.Size] = {}
        for name, trained in self._trained.items():
            found |= {f"{name}:{key}": trained.shape for key in ("weight", *MOMENTS)}
            found[f"{name}:step"] = torch.Size()
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore a state that :meth:`tensors` returned. An empty dict resets the optimizer."""
        with torch.no_grad():
            for name, trained in self._trained.items():
                trained.copy_(tensors.get(f"{name}:weight", self._parameters[name]))
                self._adamw.state.pop(trained, None)
                if f"{name}:step" in tensors:
                    state = {k: tensors[f"{name}:{k}"].to(trained, copy=True) for k in MOMENTS}
                    # The fused AdamW requires the step on the device of the weights and does not
                    # check it.
                    step = tensors[f"{name}:step"].to(trained.device, torch.float32, copy=True)
                    self._adamw.state[trained] = {"step": step, **state}
        self.round()
