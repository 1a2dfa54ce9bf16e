"""Training of many clients as the rows of one batch, on one base model.

In each step, the clients' batches are concatenated, and the base model runs one forward and one
backward pass for all clients. Each layer applies a client's factors to that client's rows. The
results equal those of training each client separately, up to rounding of the base model's products.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lora_ext._checks import choice, require
from lora_ext.adapter import PREFIX
from lora_ext.layers import Swap, adapted_layers, block_index, block_name, dropout_now
from lora_ext.rows import _layouts

from .._layers import Others, assigned
from .._payload import shapes_of
from .._plan import PATTERN, Client, LayerPlan, Pair, layer_pairs
from .._update import Update
from ._banks import Bank, ClientsAdamW, SharedBank
from ._batches import LossFn, cross_entropies, logits_of, merged, own_losses, own_outputs
from ._client_layers import WHERE, BatchRows, ClientsLayer, UnsupportedModule, check_model
from ._clients import ClientRound, ClientSpec, step_seeds
from ._shared import SharedModules, shared_names, start_of
from ._staircase import Staircase, Unfit


class BatchedClients:
    """Clients that share one frozen base model and are trained together.

    The loss of a client is the mean over its rows, and the sum of all losses is differentiated.
    Each client has a separate AdamW and separate gradient clipping. A client with fewer batches
    leaves the batch when it has finished. If the loss of a client is not finite, the client has
    failed: its loss is excluded from the sum, its rows leave the batch after the step, and other
    clients are not affected.

    :meth:`run_round` temporarily replaces the adapter's layers by layers with the factors of all
    clients. The model stays in training or evaluation mode.

    Args:
        model: model with adapted linear layers of :mod:`lora_ext.nn` or PEFT, before or after
            ``from_peft``.
        clients: data and settings of the clients, with unique names.
        slots: maximum number of clients in one batch; None for no maximum.
        optimizer: "adamw".
        loss_fn: ``loss_fn(output, batch)`` returns the loss of one client. ``output`` is the
            client's rows of the model's output (or of its ``logits``), without padding added for
            other clients. Default is the cross entropy, of the next token if the batch is a mapping
            with ``labels``, of y if it is ``(x, y)``.
        dtype: dtype of the clients' factors; default is the dtype of the global adapter.
        pattern: regular expression whose first group is the index of a layer in a name.
        adapter: name of the adapter to train.
        shared: names of additional parameters that every client trains, such as those of a head,
            or a regular expression that is searched for in names. Each client has a copy, which
            AdamW trains with the adapter; ``max_grad_norm`` limits the gradient of both together.
            The client's update contains the changes of the copy; average them with
            ``aggregate(shared=batched.shared)``. The parameters must be above the adapted layers.
        others: whether layers outside a client's plan apply the global adapter to its rows
            ("frozen") or no adapter ("disabled").
        staircase: whether to exclude rows from the autograd graph below the lowest layer that their
            client trains. A block that has rows inside and outside the graph then runs in two
            calls. If the blocks do not run once each in order, or cannot run on a part of the rows,
            a warning is issued and all rows stay in the graph.

    Raises:
        UnsupportedModule: If a module has active dropout outside the adapter or batch normalisation
            over the batch; if an adapted module is not linear, or has scaled outputs, a
            bias of the adapter, a merged adapter or another active adapter; or if a
            shared parameter is in or below the layers, is tied to another parameter, or is not
            floating-point.
        ValueError: If an argument is out of range, a client's name is repeated, or ``shared``
            matches nothing.

    Source: the simulations of Fed-HeLLo and LEGEND. Training their clients as segments of one batch
    is our choice.
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
        shared: str | Sequence[str] | None = None,
        others: Others = "frozen",
        staircase: bool = True,
    ):
        names = [spec.client for spec in clients]
        require(len(set(names)) == len(names), WHERE, "clients", "unique names", names)
        require(bool(names), WHERE, "clients", "at least one client", "none")
        require(slots is None or slots > 0, WHERE, "slots", "a number above 0, or None", slots)
        require(optimizer == "adamw", WHERE, "optimizer", "'adamw'", repr(optimizer))
        choice(WHERE, "others", others, get_args(Others))
        self.model = model
        self.clients = {spec.client: spec for spec in clients}
        self.slots = slots or len(names)
        self.loss_fn = loss_fn
        self.dtype = dtype
        self.pattern = pattern
        self.adapter = adapter
        self.others: Others = others
        self.staircase = staircase
        check_model(model, adapter, pattern)
        self.shared = shared_names(model, shared, pattern)

    def run_round(
        self,
        plans: Mapping[Client, LayerPlan] | Sequence[LayerPlan],
        global_lora: Mapping[str, Tensor],
        round: int = 0,
    ) -> list[Update]:
        """Train the clients that have a plan, each from the global adapter with a new optimizer.

        The model's layers are restored at the end, even if an error is raised.

        Args:
            plans: plans by client, or a list with one plan for each client in order.
            global_lora: the whole global adapter, from ``LoraLayerManager.state_slice()``, and the
                shared parameters by name. The default of a shared parameter is the model's value.
            round: number of the round. The round, a client's name and its seed determine the
                client's dropout masks.

        Returns:
            one update per client with a plan, in the order of the clients, with the changes of the
            planned layers and shared parameters, the number of rows of all steps
            (``num_examples``), and the mean loss over the steps. The update of a failed client has
            no tensors.

        Raises:
            ValueError: If a plan or the global adapter does not fit the model, or if batches cannot
                be combined.
            UnsupportedModule: If the model has an unsupported module (see the class), or the losses
                do not depend on trained factors, as with reentrant checkpointing.
        """
        if not isinstance(plans, Mapping):
            given, count = list(plans), len(self.clients)
            require(len(given) == count, WHERE, "plans", f"{count}, one per client", len(given))
            plans = dict(zip(self.clients, given, strict=True))
        for client in plans:
            require(client in self.clients, WHERE, "plans", "names of clients", repr(client))
        check_model(self.model, self.adapter, self.pattern)
        pairs = layer_pairs(f"{WHERE}: global_lora", global_lora, self.pattern)
        layers = self._layers(pairs, global_lora)
        shapes = {plan: shapes_of(pairs, global_lora, plan) for plan in set(plans.values())}
        states = [
            ClientRound(spec, plans[spec.client], shapes[plans[spec.client]], round)
            for spec in self.clients.values()
            if spec.client in plans
        ]
        for start in range(0, len(states), self.slots):
            self._train(states[start : start + self.slots], pairs, layers, global_lora)
        return [state.update() for state in states]

    def _train(
        self,
        states: list[ClientRound],
        pairs: list[Pair],
        layers: Mapping[str, tuple[str, Any]],
        global_lora: Mapping[str, Tensor],
    ) -> None:
        # The index of a client in this list is its place. In the order of decreasing numbers of
        # steps, the clients that are still training have the first places.
        clients = sorted(states, key=lambda c: (-len(c.spec.batches), c.settings))
        rows = BatchRows()
        turned = _layouts.tokens_first(self.model)
        banks: list[Bank] = []
        replacements: dict[str, nn.Module] = {}
        for pair in pairs:
            name, layer = layers[pair.module]
            device = layer.lora_A[self.adapter].weight.device
            a, b = (global_lora[k].detach().to(device, self.dtype) for k in (pair.a, pair.b))
            scaling = float(layer.scaling[self.adapter])
            p = dropout_now(layer.lora_dropout[self.adapter])
            banks.append(Bank(pair, clients, (a, b), self.others == "frozen", scaling, p))
            base = layer.get_base_layer()
            replacements[name] = ClientsLayer(base, banks[-1], rows, name in turned)
        heads = [
            SharedBank(name, start_of(name, self.model, global_lora, self.dtype), len(clients))
            for name in self.shared
        ]
        modules = SharedModules(self.model, heads, rows)
        with contextlib.ExitStack() as stack:
            swap = Swap(self.model, replacements, WHERE)
            stack.callback(swap.restore, self.model, WHERE)
            for config in _caching(self.model):
                stack.enter_context(assigned(config, "use_cache", False))
            stack.enter_context(modules.divided())
            stairs = self._stairs(clients, {layers[p.module][0]: p for p in pairs}, rows)
            if stairs is not None:
                stack.callback(stairs.remove)
            optimizer = ClientsAdamW([*banks, *heads], clients)
            while active := [place for place, c in enumerate(clients) if c.has_batch]:
                optimizer.activate(active[-1] + 1)
                active.sort(key=lambda place: (clients[place].lowest, place))
                self._step(clients, active, rows, optimizer, stairs)
                modules.check_called()
        for bank in (*banks, *heads):
            bank.give(clients)

    def _step(
        self,
        clients: list[ClientRound],
        active: list[int],
        rows: BatchRows,
        optimizer: ClientsAdamW,
        stairs: Staircase | None,
    ) -> None:
        """Do one step for the clients at the places ``active``."""
        going = [clients[place] for place in active]
        batches = [client.batch for client in going]
        inputs, segments = merged(batches, WHERE)
        sizes = [segment.rows for segment in segments]
        rows.set(active, segments)
        banks = [bank for bank in optimizer.banks if isinstance(bank, Bank)]
        if any(bank.p for bank in banks):
            step = len(going[0].losses)  # equal for all clients, since they start together
            seeds = step_seeds([c.seed for c in clients], step, len(banks))
            for module, bank in enumerate(banks):
                bank.draw(seeds[:, module])
        lowest = [c.lowest for c, size in zip(going, sizes, strict=True) for _ in range(size)]
        output = self._forward(inputs, batches, stairs, lowest, rows)
        logits = logits_of(output, segments, WHERE)
        if self.loss_fn is None:
            losses = cross_entropies(logits, batches, segments, rows.owners(logits.device))
        else:
            losses = own_losses(self.loss_fn, own_outputs(logits, segments), batches)
        values = losses.values.tolist()
        with rows.backward():
            gradients = losses.gradients(optimizer.leaves, [*map(math.isfinite, values)])
        training = any(
            c.plan.layers and math.isfinite(v) for c, v in zip(going, values, strict=True)
        )
        factors = gradients[: sum(len(bank.leaves) for bank in banks if bank.trained)]
        fits = not training or not all(gradient is None for gradient in factors)
        expected = "losses that depend on the trained factors"
        found = "losses without gradients for these factors; checkpointing must not be reentrant"
        require(fits, WHERE, "model", expected, found, UnsupportedModule)
        optimizer.step(gradients)
        for client, size, value in zip(going, sizes, values, strict=True):
            client.advance(size, value)

    def _forward(
        self,
        inputs: dict[str, Tensor] | Tensor,
        batches: Sequence[Any],
        stairs: Staircase | None,
        lowest: list[float],
        rows: BatchRows,
    ) -> Any:
        def call() -> Any:
            rows.above = None
            return self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs)

        if stairs is None or stairs.removed:
            return call()
        try:
            with stairs.forward(lowest):
                return call()
        except Unfit as error:
            stairs.remove()
            inputs, _ = merged(batches, WHERE)  # blocks may have changed the inputs in place
            output = call()
            warnings.warn(
                f"{WHERE}: staircase: expected blocks that can run on a part of the rows: "
                f"{error!s:.200}; all rows therefore stay in the autograd graph",
                stacklevel=2,
            )
            return output

    def _stairs(
        self, clients: list[ClientRound], names: Mapping[str, Pair], rows: BatchRows
    ) -> Staircase | None:
        """Return a `Staircase`, or None if every client trains the lowest block, if a layer has no
        single block, or if the first dimension of a layer's input is the tokens."""
        turned = _layouts.tokens_first(self.model)
        blocks: dict[int, str] = {}
        for name, pair in names.items():
            block = block_name(f"{name}.lora_A.weight", self.pattern)
            if block is None or blocks.setdefault(pair.layer, block) != block:
                return None
            if name in turned:
                return None  # the staircase divides the first dimension, here the tokens
        needed = self.staircase and any(c.lowest > min(blocks) for c in clients)
        return Staircase(self.model, blocks, rows) if needed else None

    def _layers(
        self, pairs: list[Pair], global_lora: Mapping[str, Tensor]
    ) -> dict[str, tuple[str, Any]]:
        """Return the name in ``self.model`` and the layer of each adapted module, by base name.

        Raises ValueError unless the factors in ``global_lora`` fit the layers.
        """
        found: dict[str, tuple[str, Any]] = {
            name.removeprefix(PREFIX): (name, layer)
            for name, layer in adapted_layers(self.model, self.adapter).items()
        }
        for module in found:
            inside = block_index(f"{module}.lora_A.weight", self.pattern) is not None
            known = any(pair.module == module for pair in pairs)
            require(known or not inside, WHERE, "global_lora", f"factors of {module}", "none")
        for pair in pairs:
            require(pair.module in found, WHERE, pair.a, "an adapted module's name", "another name")
            layer = found[pair.module][1]
            sides = (pair.a, 1, layer.in_features), (pair.b, 0, layer.out_features)
            for key, axis, size in sides:
                shape = global_lora[key].shape
                require(shape[axis] == size, WHERE, key, f"shape[{axis}] = {size}", list(shape))
        return found


def _caching(model: nn.Module) -> list[Any]:
    """Return the configurations of a transformers model in which ``use_cache`` is True."""
    # Some submodules have a separate configuration, such as the decoder of T5.
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs += [getattr(config, "text_config", None) for config in configs]
    return [config for config in configs if getattr(config, "use_cache", False)]
