"""The model of a client, with its layers and shared parameters."""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from flwr.app import Context, Message
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.layers import adapted_layers

from .. import LoraLayerManager
from ._records import read_config
from ._tasks import Task, shared_names

_kept: dict[str, LoraLayerManager] = {}  # manager by Model._token, at most one per process


class Model:
    """The model of an app, with the manager of its layers. It is created on first use.

    Flower's simulation unpickles the app for every message. The model is not pickled. Instead, each
    worker process caches the last model that it used.
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
        """Manager of the model's layers."""
        if self._manager is None and self._unpickled:
            self._manager = _kept.get(self._token)
        if self._manager is None:
            self._manager = LoraLayerManager(self._model_fn(), self.pattern, self.adapter)
        if self._unpickled:
            _kept.clear()
            _kept[self._token] = self._manager
        return self._manager

    def read(self, message: Message, context: Context) -> tuple[Task, Tensors]:
        """Return the task in a message, and access to the tensors that it names.

        Raises:
            ValueError: If the message is not from the strategy, does not fit the model, or contains
                a scale that differs from the adapter's. An average of adapters with different
                scales would be wrong.
            TypeError: If a setting has the wrong type.
        """
        manager = self.manager
        tensors = Tensors(manager, shared_names(read_config(message)))
        task = Task.read(message, context, tensors.state(), self.pattern)
        wanted: Any = task.config.get("scaling")
        layers: Mapping[str, Any] = adapted_layers(manager.model, manager.adapter)
        for name, layer in layers.items() if wanted is not None else ():
            found = layer.scaling[manager.adapter]
            same = math.isclose(found, wanted, rel_tol=1e-6)
            require(same, "message", f"scaling of {name}", f"{wanted:g}", f"{found:g}")
        return task, tensors


class Tensors:
    """Access to the tensors of a client's model that are exchanged with the server.

    These are the adapter's layers, and shared parameters outside the adapter that every client
    trains and sends, such as a head.

    Args:
        manager: manager of the model's layers.
        shared: names of the shared parameters, as in ``model.named_parameters()``.
    """

    def __init__(self, manager: LoraLayerManager, shared: Sequence[str]):
        known = dict(manager.model.named_parameters())
        for name in shared:
            require(name in known, "message", "shared", "names of model parameters", repr(name))
        self._manager = manager
        self._shared = {name: known[name] for name in shared}

    def state(self, layers: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Return copies on the CPU of the given layers (default all) and the shared parameters."""
        shared = {name: p.detach().cpu().clone() for name, p in self._shared.items()}
        return {**self._manager.state_slice(layers), **shared}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors, which must include all shared parameters, into the model."""
        self._manager.load_slice({k: v for k, v in tensors.items() if k not in self._shared})
        for name, parameter in self._shared.items():
            parameter.copy_(tensors[name])

    @contextlib.contextmanager
    def trained(self) -> Iterator[None]:
        """Return a context manager in which the shared parameters require gradients."""
        before = [(parameter, parameter.requires_grad) for parameter in self._shared.values()]
        try:
            for parameter, _ in before:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, trains in before:
                parameter.requires_grad_(trains)
                parameter.grad = None
