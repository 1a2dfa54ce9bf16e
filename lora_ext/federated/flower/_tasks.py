"""The model of a client, and its task in one round: reading the message and creating the reply."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast, get_args

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor, nn

from lora_ext._checks import choice, integer, number, require
from lora_ext.layers import adapted_layers

from .. import LayerPlan, LoraLayerManager, Update, masked_payload
from .._layers import Others
from .._payload import shapes_of
from .._plan import layer_pairs
from .._update import Upload
from . import _records

Metrics = Mapping[str, Any]

_kept: dict[str, LoraLayerManager] = {}  # manager by Model._token, at most one per process
_PLAN = ("server-round", "layers", "ranks")  # settings that are copied to the record "echo"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Training settings of a client, from the strategy's ``train_config``."""

    lr: float  # learning rate of AdamW; the default is that of Fed-HeLLo's authors
    weight_decay: float
    epochs: int
    seed: int  # argument of the strategy

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        """Read the settings from the record ``config`` of a message."""
        found: dict[str, float] = {}
        for name, default in (("lr", 1e-2), ("weight-decay", 0.0), ("epochs", 1)):
            value, expected = config.get(name, default), "a finite number from 0"
            found[name] = number("message", name, value, 0, expected=expected)
        epochs = integer("message", "epochs", found["epochs"])
        return cls(found["lr"], found["weight-decay"], epochs, _integer(config, "seed"))


@dataclasses.dataclass(frozen=True)
class Task:
    """A training message, decoded and checked against the client's model."""

    message: Message  # message to reply to
    config: ConfigRecord  # settings in the message
    plan: LayerPlan
    round: int
    client: int
    partition: int  # index of the client's data
    #: Tensors with the plan's ranks or, if the plan has none, with at most the model's ranks.
    tensors: dict[str, Tensor]
    others: Others  # state of the layers outside the plan
    shared: list[str]  # names of the parameters to train in addition to the adapter
    state: Mapping[str, Tensor]  # tensors of the client's model
    pattern: str  # regular expression whose first group is the index of a layer in a name

    @classmethod
    def read(
        cls, message: Message, context: Context, state: Mapping[str, Tensor], pattern: str
    ) -> Task:
        """Read a message, and check it against ``state``, the tensors of the client's model.

        Raises:
            ValueError: If the message is not from the strategy, or does not fit the model.
            TypeError: If a setting has the wrong type.
        """
        config = _records.read_config(message)
        plan, shared = LayerPlan.from_config(config), shared_names(config)
        others = choice("message", "others", config.get("others"), get_args(Others))
        arrays = message.content.array_records
        expected = f"a record {_records.LORA!r}"
        require(_records.LORA in arrays, "message", "records", expected, sorted(arrays))
        record = arrays[_records.LORA]
        # The plan defines the expected ranks. If the plan has no ranks, the message's ranks are
        # expected, but at most the model's.
        declared = _records.said_shapes(record, config)
        pairs = layer_pairs("message: model", state, pattern)
        shapes = shapes_of(pairs, state, plan)
        for pair in pairs:
            planned = pair.layer in plan.layers
            for axis, key in enumerate((pair.a, pair.b)) if planned or others == "frozen" else ():
                sizes, found = list(shapes.get(key, state[key].shape)), declared.get(key, ())
                if (plan.ranks is None or not planned) and len(found) == len(sizes):
                    sizes[axis] = min(max(found[axis], 1), sizes[axis])
                shapes[key] = tuple(sizes)
        shapes |= {key: tuple(state[key].shape) for key in shared}
        tensors = _records.unpack(record, config, shapes, "message")
        missing = [key for key in shapes if key not in tensors]
        require(not missing, "message", "lora", "all tensors of the plan", f"none of {missing[:3]}")
        return cls(
            message=message,
            config=config,
            plan=plan,
            round=_integer(config, "server-round"),
            client=_integer(config, "client"),
            partition=int(context.node_config.get(_records.PARTITION, context.node_id)),
            tensors=tensors,
            others=others,
            shared=shared,
            state=state,
            pattern=pattern,
        )

    @property
    def seed(self) -> int:
        """Seed of the client's random numbers in this round, computed from the strategy's seed, the
        round and the client."""
        entropy = [_integer(self.config, "seed"), self.round, self.client]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def cut(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Slice tensors of the model to the shapes of the tensors in the message."""
        return {
            key: value[tuple(map(slice, self.tensors[key].shape))] for key, value in tensors.items()
        }

    def whole(self) -> dict[str, Tensor]:
        """Return the message's adapter, padded with zeros to the shapes of the model's adapter."""
        found: dict[str, Tensor] = {}
        for key, own in self.state.items():
            value = self.tensors.get(key, own[:0])
            found[key] = torch.zeros(own.shape, dtype=value.dtype)
            found[key][tuple(map(slice, value.shape))] = value
        return found

    def reply(self, changes: Mapping[str, Tensor], metrics: Metrics) -> Message:
        """Return the reply.

        Args:
            changes: differences of the trained tensors from the received tensors, for the planned
                layers and the shared parameters.
            metrics: metrics of the training, which must include ``num-examples``.
        """
        sent = dict(changes)
        if choice("message", "upload", self.config.get("upload"), get_args(Upload)) == "value":
            sent = {key: self.tensors[key] + change for key, change in changes.items()}
        if self.config.get("payload") == "dense_masked":
            sent = masked_payload(
                self.whole(),
                Update(self.client, metrics["num-examples"], changes, self.plan),
                weighted_by="num-examples" if self.config.get("weighted") else None,
                max_update_norm=cast(float | None, self.config.get("max-update-norm")),
                pattern=self.pattern,
            )
        record, manifest = _records.pack(sent, bool(self.config.get("pack")))
        echo = {name: self.config[name] for name in _PLAN if name in self.config}
        content = RecordDict(
            {
                _records.LORA: record,
                _records.METRICS: MetricRecord(dict(metrics)),
                _records.ECHO: ConfigRecord({**echo, **manifest}),
            }
        )
        return Message(content, reply_to=self.message)


def shared_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the parameters that clients train in addition to the adapter."""
    return list(config.get("shared", []))


def failed(message: Message, error: Exception) -> Message:
    """Return an error reply of a client that raised ``error``, in Flower's format."""
    reason = f"{type(error).__name__}: {error}"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _integer(config: Mapping[str, Any], name: str) -> int:
    return integer("message", name, config.get(name))


class Model:
    """The model of an app and the manager of its layers, both created on first use.

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
        """Return the task in a message, and the `Tensors` of the model that the task exchanges.

        Raises:
            ValueError: If the message is not from the strategy, does not fit the model, or contains
                a scale that differs from the adapter's. An average of adapters with different
                scales would be wrong.
            TypeError: If a setting has the wrong type.
        """
        manager = self.manager
        tensors = Tensors(manager, shared_names(_records.read_config(message)))
        task = Task.read(message, context, tensors.state(), self.pattern)
        config: Any = task.config
        layers: dict[str, Any] = dict(adapted_layers(manager.model, manager.adapter))
        for name, layer in layers.items() if "scaling" in config else ():
            found, wanted = layer.scaling[manager.adapter], config["scaling"]
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
