"""Many clients trained as the rows of one batch, on one base model.

Each step of all clients is one forward and one backward: every weight of the base is read once,
and a layer gives the rows of each client the client's own factors. What a client computes is what
it would compute alone, up to the rounding of the base's products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext.adapter.peft_keys import PREFIX
from lora_ext.nn import LoraFactors, Swap, adapted_layers, lora_forward, shift_labels
from lora_ext.nn.blocks import block_index
from lora_ext.nn.rows import rows_of
from lora_ext.ops._checks import require

from .batches import merged, own_outputs
from .clients import ClientRound, ClientSpec, adamw
from .keys import PATTERN, Pair, layer_pairs
from .layers import Others
from .plan import LayerPlan
from .update import Client, Update

#: ``loss_fn(output, batch)``: one client's rows of the logits, and its batch, to its mean loss.
LossFn = Callable[[Tensor, Any], Tensor]

WHERE = "BatchedClients"
_GLOBAL = -1  # in the place of a client: the factors of rows whose client has a layer frozen


class UnsupportedModule(ValueError):
    """A module under which a client's rows would not be what they are alone."""


class BatchedClients:
    """Clients that share one frozen base model and train together.

    Client k's loss is the mean over its own rows, and the sum of the losses is differentiated. A
    client has its own AdamW and clips its own gradient. One with fewer batches leaves the batch
    when it is done. One whose loss is not finite is failed: its loss leaves the sum, then its rows
    leave the batch, and nobody else's values change.

    During :meth:`run_round` the layers of the adapter are swapped for layers with the clients'
    factors; after it the very layers are back. The model stays in the mode that it is in.

    Args:
        model: its adapted layers are :mod:`lora_ext.nn`'s or PEFT's linear ones, before or after
            ``from_peft``.
        clients: of different names.
        slots: how many train at once; None for all.
        optimizer: "adamw".
        loss_fn: gets the client's rows of the model's output (its ``logits`` where it has them),
            cut to the length of the client's sequences where they were padded, and the batch.
            Default is the cross-entropy: of the next token for a mapping with ``labels``, of y for
            ``(x, y)``.
        dtype: of the clients' factors; default is that of the global adapter.
        pattern: finds the index of a layer in a name. adapter: the one whose layers are trained.
        others: what layers outside a client's plan are for its rows, "frozen" or "disabled".

    Raises:
        UnsupportedModule: dropout in training, batch normalisation over the batch, DoRA, a bias of
            the adapter, a merged one, or a layer that is not linear, naming the module.
        ValueError: settings out of range, a name twice.

    Source: Fed-HeLLo's and LEGEND's simulations, as segments of one batch (our choice).
    """

    def __init__(
        self,
        model: nn.Module,
        clients: Sequence[ClientSpec],
        *,
        slots: int | None = None,
        optimizer: str = "adamw",
        loss_fn: LossFn | None = None,
        dtype: torch.dtype | None = None,
        pattern: str = PATTERN,
        adapter: str = "default",
        others: Others = "frozen",
    ):
        names = [spec.client for spec in clients]
        require(len(set(names)) == len(names), WHERE, "clients", "each name once", names)
        require(bool(names), WHERE, "clients", "at least one", "none")
        require(slots is None or slots > 0, WHERE, "slots", "a number above 0, or None", slots)
        require(optimizer == "adamw", WHERE, "optimizer", "'adamw'", repr(optimizer))
        require(others in get_args(Others), WHERE, "others", get_args(Others), repr(others))
        self.model = model
        self.clients = {spec.client: spec for spec in clients}
        self.slots = slots or len(names)
        self.loss_fn = loss_fn or _default_loss
        self.dtype = dtype
        self.pattern = pattern
        self.adapter = adapter
        self.others: Literal["frozen", "disabled"] = others
        self._check_model()

    def run_round(
        self,
        plans: Mapping[Client, LayerPlan] | Sequence[LayerPlan],
        global_lora: Mapping[str, Tensor],
        round: int = 0,
    ) -> list[Update]:
        """Train the clients that have a plan, each from the global adapter with a fresh optimizer.

        Args:
            plans: by client, or one for each in their order.
            global_lora: the whole global adapter, as ``LoraLayerManager.state_slice()`` gives it.
            round: of the round's dropout, which is refused so far.

        Returns:
            the changes of the planned layers, in the order of the clients: num_examples counts the
            rows of all steps, loss is the mean over the steps. A failed one has no tensors.

        Raises:
            ValueError: a plan or a global adapter that does not fit; batches that do not go
                together. The model is as before then, too.
        """
        if not isinstance(plans, Mapping):
            given = list(plans)
            require(len(given) == len(self.clients), WHERE, "plans", len(self.clients), len(given))
            plans = dict(zip(self.clients, given, strict=True))
        for client in plans:
            require(client in self.clients, WHERE, "plans", "known clients", repr(client))
        self._check_model()
        pairs = layer_pairs(f"{WHERE}: global_lora", global_lora, self.pattern)
        layers = self._layers(pairs, global_lora)
        pattern = self.pattern
        states = [
            ClientRound(spec, plans[spec.client], global_lora, pattern, self.dtype)
            for spec in self.clients.values()
            if spec.client in plans
        ]
        for start in range(0, len(states), self.slots):
            self._train(states[start : start + self.slots], pairs, layers, global_lora)
        return [state.update(global_lora) for state in states]

    def _train(
        self,
        states: list[ClientRound],
        pairs: list[Pair],
        layers: Mapping[str, tuple[str, Any]],
        global_lora: Mapping[str, Tensor],
    ) -> None:
        batch = _Rows()
        replacements: dict[str, nn.Module] = {}
        for pair in pairs:
            name, layer = layers[pair.module]
            where = layer.lora_A[self.adapter].weight
            a, b = (
                global_lora[key].detach().to(where.device, self.dtype) for key in (pair.a, pair.b)
            )
            factors = {_GLOBAL: (a, b)} if self.others == "frozen" else {}
            for place, state in enumerate(states):
                if pair.a in state.tensors:
                    state.to(pair, where.device)
                    factors[place] = (state.tensors[pair.a], state.tensors[pair.b])
            scaling = layer.scaling[self.adapter]
            base = layer.get_base_layer()
            replacements[name] = _ClientsLayer(base, factors, scaling, batch, len(states))
        swap = Swap(self.model, replacements, WHERE)
        try:
            optimizer = adamw(states)
            while active := [(i, s) for i, s in enumerate(states) if s.has_batch]:
                self._step(active, batch, optimizer)
        finally:
            swap.restore(self.model, WHERE)

    def _step(
        self,
        active: list[tuple[int, ClientRound]],
        batch: _Rows,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        inputs, segments = merged([state.batch for _, state in active], WHERE)
        places = [i for i, _ in active]
        batch.set([i for i, s in zip(places, segments, strict=True) for _ in range(s.rows)])
        output = self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs)
        losses = [
            self._loss(state, own)
            for (_, state), own in zip(active, own_outputs(output, segments, WHERE), strict=True)
        ]
        values = torch.stack([loss.detach().double() for loss in losses]).tolist()
        for (_, state), value in zip(active, values, strict=True):
            state.failed = not math.isfinite(value)
        going = [loss for (_, s), loss in zip(active, losses, strict=True) if not s.failed]
        trained = [t for _, state in active if not state.failed for t in state.tensors.values()]
        if going and trained:
            torch.stack(going).sum().backward(inputs=trained)
        for _, state in active:
            state.clip()
        if optimizer is not None:
            optimizer.step()  # of whoever has a gradient
            optimizer.zero_grad()
        for (_, state), value in zip(active, values, strict=True):
            state.advance(value)

    def _loss(self, state: ClientRound, output: Tensor) -> Tensor:
        loss = self.loss_fn(output, state.batch)
        scalar = isinstance(loss, Tensor) and loss.dim() == 0
        found = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        require(scalar, WHERE, f"loss_fn: client {state.spec.client}", "a scalar tensor", found)
        return loss

    def _layers(
        self, pairs: list[Pair], global_lora: Mapping[str, Tensor]
    ) -> dict[str, tuple[str, Any]]:
        """By module in the base model, its name in the model and the layer; checked."""
        found: dict[str, tuple[str, Any]] = {
            name.removeprefix(PREFIX): (name, layer)
            for name, layer in adapted_layers(self.model, self.adapter).items()
        }
        for module in found:
            inside = block_index(f"{module}.lora_A.weight", self.pattern) is not None
            known = any(pair.module == module for pair in pairs)
            require(known or not inside, WHERE, "global_lora", f"factors of {module}", "none")
        for pair in pairs:
            require(pair.module in found, WHERE, pair.a, "a module of the model", "none")
            layer = found[pair.module][1]
            for key, axis, size in (
                (pair.a, 1, layer.in_features),
                (pair.b, 0, layer.out_features),
            ):
                shape = global_lora[key].shape
                require(shape[axis] == size, WHERE, key, f"shape[{axis}] = {size}", list(shape))
        return found

    def _check_model(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                alone = not module.training and module.running_mean is not None
                _supported(alone, name, "rows that do not see each other", "batch normalisation")
            for setting, p in _dropouts(module):
                off = not module.training or p == 0
                _supported(off, name, "no dropout in training", f"{setting} = {p}")
        for name, layer in adapted_layers(self.model, self.adapter).items():
            if block_index(f"{name}.lora_A.weight", self.pattern) is None:
                continue
            checked: Any = layer
            linear = self.adapter in checked.lora_A and (
                checked.lora_A[self.adapter].weight.dim() == 2
            )
            _supported(linear, name, "a linear layer", type(layer).__name__)
            _supported(not checked.use_dora[self.adapter], name, "LoRA", "DoRA")
            _supported(not checked.lora_bias[self.adapter], name, "lora_A and lora_B", "a bias")
            merged_in = list(checked.merged_adapters)
            _supported(not merged_in, name, "adapters apart from the weight", merged_in)


def _dropouts(module: nn.Module) -> list[tuple[str, float]]:
    """What a module may drop with, as a module of its own or in a function of its forward."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return [("p", module.p)]
    own = module.__dict__.items()  # attention_dropout of transformers, dropout of torch's attention
    return [(name, p) for name, p in own if "dropout" in name and isinstance(p, float)]


def _supported(holds: bool, name: str, expected: object, found: object) -> None:
    if not holds:
        raise UnsupportedModule(f"{WHERE}: {name}: expected {expected}, found {found}")


class _Rows:
    """Which client has each sequence of the step; all layers look here."""

    def __init__(self) -> None:
        self._clients: list[int] = []
        self._ids: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def set(self, clients: list[int]) -> None:
        """Begin a step: ``clients[i]`` has sequence i."""
        if clients != self._clients:
            self._clients, self._ids = clients, {}

    def ids(self, table: tuple[int, ...], device: torch.device) -> Tensor:
        """``(sequences,)``: the entry of ``table`` that each one's client has; kept per step."""
        key = table, device
        if key not in self._ids:
            entries = [table[client] for client in self._clients]
            self._ids[key] = torch.tensor(entries, device=device)
        return self._ids[key]


class _ClientsLayer(nn.Module):
    """A base layer whose rows have the factors of their clients, the global ones, or none."""

    def __init__(
        self,
        base_layer: nn.Module,
        factors: Mapping[int, tuple[Tensor, Tensor]],
        scaling: float,
        batch: _Rows,
        num_clients: int,
    ):
        super().__init__()
        self.base_layer = base_layer
        self.factors = [LoraFactors(a, b, scaling) for a, b in factors.values()]
        places = {client: place for place, client in enumerate(factors)}
        shared = places.get(_GLOBAL, -1)
        self.table = tuple(places.get(client, shared) for client in range(num_clients))
        self.batch = batch
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(sequences, ..., I)`` to ``(sequences, ..., O)``."""
        ids = self.batch.ids(self.table, x.device)
        rows = rows_of(ids, len(self.factors), x.shape[:-1])
        return lora_forward(x, self.base_layer, self.factors, rows)


def _default_loss(output: Tensor, batch: Any) -> Tensor:
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    if isinstance(batch, Mapping):
        require("labels" in batch, WHERE, "batches", "labels, or a loss_fn", sorted(batch))
        labels = batch["labels"].to(output.device)
        if output.dim() == 3:  # of language models
            labels = shift_labels(labels)
        return F.cross_entropy(output.flatten(0, -2), labels.flatten())
    require(isinstance(batch, tuple | list), WHERE, "batches", "(x, y), or a loss_fn", type(batch))
    return F.cross_entropy(output, batch[1].to(output.device))
