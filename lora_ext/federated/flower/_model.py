"""The model of a client, and what is done to it beside its layers."""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.layers import adapted_layers

from .. import LoraLayerManager

_kept: dict[str, LoraLayerManager] = {}  # one at most, in a worker of a simulation


class Model:
    """The model of an app, and its layers, made when they are first needed.

    They live as long as the app. Flower's simulation unpickles the app for every message: there the
    model is not pickled, and the one that was used last stays with the worker's process.
    """

    def __init__(self, model_fn: Callable[[], nn.Module], pattern: str, adapter: str):
        self._model_fn = model_fn
        self.pattern = pattern
        self.adapter = adapter
        self._token = uuid.uuid4().hex
        self._manager: LoraLayerManager | None = None
        self._unpickled = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_manager": None, "_unpickled": True}

    @property
    def manager(self) -> LoraLayerManager:
        """The layers of the model."""
        if self._manager is None and self._unpickled:
            self._manager = _kept.get(self._token)
        if self._manager is None:
            self._manager = LoraLayerManager(self._model_fn(), self.pattern, self.adapter)
        if self._unpickled:
            _kept.clear()
            _kept[self._token] = self._manager
        return self._manager


def check_scaling(manager: LoraLayerManager, config: Mapping[str, Any]) -> None:
    """Compare the scale of the adapter with the server's, where that says one: averaged with the
    others, an adapter of another scale would be none of theirs."""
    if "scaling" not in config:
        return
    for name, layer in adapted_layers(manager.model, manager.adapter).items():
        found: float = cast(Any, layer).scaling[manager.adapter]
        same = math.isclose(found, config["scaling"], rel_tol=1e-6)
        require(same, "message", f"scaling of {name}", f"{config['scaling']:g}", f"{found:g}")


class Tensors:
    """What a client has of the global state: its layers, and parameters beside the adapter that
    every client trains and sends, such as a head.

    Args:
        shared: names of the latter, as ``model.named_parameters()`` has them.
    """

    def __init__(self, manager: LoraLayerManager, shared: Sequence[str]):
        known = dict(manager.model.named_parameters())
        for name in shared:
            require(name in known, "message", "shared", "parameters of the model", repr(name))
        self._manager = manager
        self._shared = {name: known[name] for name in shared}

    def state(self, layers: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Copies of some layers, or of all, and of the parameters, on the CPU."""
        shared = {name: p.detach().cpu().clone() for name, p in self._shared.items()}
        return {**self._manager.state_slice(layers), **shared}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put values into the model."""
        self._manager.load_slice({k: v for k, v in tensors.items() if k not in self._shared})
        for name, parameter in self._shared.items():
            parameter.copy_(tensors[name])

    @contextlib.contextmanager
    def trained(self) -> Iterator[None]:
        """A block in which the parameters take gradients."""
        before = [(parameter, parameter.requires_grad) for parameter in self._shared.values()]
        try:
            for parameter, _ in before:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, trains in before:
                parameter.requires_grad_(trains)
                parameter.grad = None
