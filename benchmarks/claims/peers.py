"""Federated baselines, which differ in the factors that are trained, sent and averaged in a round.

Clients train one after another, with all layers at the same rank.

* FedAvg: both factors, averaged.
* FFA-LoRA (arXiv 2403.12313): A keeps its random values, B is trained and averaged.
* RoLoRA (arXiv 2502.04106): B in odd rounds, A in even ones.
* FedSA-LoRA (arXiv 2410.01463): both are trained, A is averaged, B stays with its client.
* FedEx-LoRA (arXiv 2410.09432): FedAvg; the mean of the products minus the product of the means is
  added to the base weights.

HetLoRA and FlexLoRA are not here: ``aggregate(rank_agg=...)`` implements their ranks per client.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from federated_digits import Run, World, client_spec, load_state, right, shared_state, trimmed
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_ext.adapter import PREFIX
from lora_ext.federated import LayerPlan, LoraLayerManager, Update, aggregate
from lora_ext.nn import adapted_layers

NAMES = ("FedAvg", "FFA-LoRA", "RoLoRA", "FedSA-LoRA", "FedEx-LoRA")
State = dict[str, Tensor]


class Peer:
    """Federation with one of the methods; the first round is 1.

    Attributes:
        own: With FedSA-LoRA, the factors B of each client that has trained, by parameter name.
    """

    def __init__(self, name: str, world: World):
        self.name, self.world = name, world
        self.model: Any = world.adapted()
        self.manager = LoraLayerManager(self.model)
        self.head = shared_state(world, self.model)
        self.state: State = {**self.manager.state_slice(), **self.head}
        self.plan = LayerPlan(tuple(range(self.manager.num_layers)))
        self.own: dict[int, State] = {}

    def run(self, shares: Sequence[Any]) -> Run:
        """Run all rounds; the accuracy is that of the global state, without a client's own B.

        The bytes downloaded are counted as equal to those uploaded. This omits FedEx's residual,
        and the factor that changed in a round of RoLoRA for which the client was not drawn.
        """
        sizes, found = self.world.sizes, Run()
        for round in range(1, sizes.rounds + 1):
            draw = np.random.default_rng([self.world.seed, round])
            drawn = sorted(draw.choice(sizes.clients, sizes.per_round, replace=False).tolist())
            updates = [self.trained(client, shares[client], round) for client in drawn]
            if self.name == "FedEx-LoRA":
                self.add_residual(updates)
            self.state = aggregate(self.state, updates, shared=tuple(self.head)).state
            load_state(self.manager, self.head, self.state)
            found.right.append(right(self.model, self.world.testing))
            found.accuracy.append(found.right[-1].float().mean().item())
            for client in drawn:
                nbytes = sum(t.nbytes for t in self.sent(updates[0].tensors, round).values())
                found.comm.record(round, client, up=nbytes, down=nbytes, full=2 * nbytes)
        return found

    def trained(self, client: int, share: Any, round: int) -> Update:
        """Return the changes of a client's training, with zeros for tensors that the client does
        not send."""
        start = {**self.state, **self.own.get(client, {})}
        load_state(self.manager, self.head, start)
        parameters = {name: self.model.get_parameter(in_model(name)) for name in start}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self.head or self.trains(name, round))
        spec = client_spec(self.world, share, client, round)
        training = [p for p in parameters.values() if p.requires_grad]
        adam = torch.optim.AdamW(training, lr=spec.lr, weight_decay=0.0)
        losses: list[float] = []
        for x, y in spec.batches:
            adam.zero_grad()
            loss = cross_entropy(self.model(trimmed(x)), y)
            loss.backward()
            adam.step()
            losses.append(loss.item())
        changes = {name: p.detach() - start[name] for name, p in parameters.items()}
        if self.name == "FedSA-LoRA":
            kept = {name for name in changes if "lora_B" in name}
            self.own[client] = {name: parameters[name].detach().clone() for name in kept}
            changes |= {name: torch.zeros_like(changes[name]) for name in kept}
        rows = sum(len(y) for _, y in spec.batches)
        return Update(client, rows, changes, self.plan, sum(losses) / len(losses))

    def trains(self, name: str, round: int) -> bool:
        """Return whether the factor is trained in the round."""
        if self.name == "FFA-LoRA":
            return "lora_B" in name
        if self.name == "RoLoRA":
            return ("lora_B" in name) == (round % 2 == 1)
        return True

    def sent(self, tensors: Mapping[str, Tensor], round: int) -> State:
        """Return the tensors of an update that the client sends in a round."""
        stays = "lora_B" if self.name == "FedSA-LoRA" else "nothing"
        return {
            name: t
            for name, t in tensors.items()
            if name in self.head or (self.trains(name, round) and stays not in name)
        }

    @torch.no_grad()
    def add_residual(self, updates: Sequence[Update]) -> None:
        """Add ``sum_i w_i B_i A_i - B A``, with the means A and B, to the base weights."""
        total = sum(update.num_examples for update in updates)
        weights = [update.num_examples / total for update in updates]
        for name, layer in adapted_layers(self.model).items():
            keys = [f"{PREFIX}{name}.lora_{factor}.weight" for factor in "AB"]
            a, b = ([self.state[k] + u.tensors[k] for u in updates] for k in keys)
            w = torch.tensor(weights)
            means = [torch.einsum("n,nij->ij", w, torch.stack(each)) for each in (a, b)]
            exact = torch.einsum("n,noi,nij->oj", w, torch.stack(b), torch.stack(a))
            residual = exact - means[1] @ means[0]
            layer.base_layer.weight += layer.scaling["default"] * residual  # pyright: ignore

    def accuracy_of(self, client: int) -> Tensor:
        """Return whether a client's model classifies each test sample correctly, ``(n,)`` bool."""
        load_state(self.manager, self.head, {**self.state, **self.own.get(client, {})})
        return right(self.model, self.world.testing)


def in_model(name: str) -> str:
    """Return the name that a parameter of the state has in the model."""
    return re.sub(r"(lora_[AB])\.weight$", r"\1.default.weight", name.removeprefix(PREFIX))
