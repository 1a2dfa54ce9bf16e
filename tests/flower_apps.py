"""A small model on vectors, its data, and federations that train it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import client_models
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from lora_ext.federated import LayerPlan, LoraLayerManager
from lora_ext.federated.flower import LocalGrid, LoraStrategy, to_arrays

WIDTH, RANK, LAYERS, CLASSES = client_models.WIDTH, 3, 3, 4
MODULE = "base_model.model.layers.{}.lora_{}.weight"


class Classifier(client_models.Classifier):
    """Three blocks with one adapter each, and a frozen head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(LAYERS, lora_dropout=dropout)
        self.head.requires_grad_(False)


def batches(partition: int) -> list[tuple[Tensor, Tensor]]:
    """Return the batches of two steps; client i has i + 2 rows in each."""
    generator = torch.Generator().manual_seed(partition)
    rows = partition + 2
    return [
        (
            torch.randn(rows, WIDTH, generator=generator),
            torch.randint(0, CLASSES, (rows,), generator=generator),
        )
        for _ in range(2)
    ]


class Suffixes:
    """Strategy that plans the last ``capability`` layers for every client."""

    def plan(self, round: int, client: int | str, capability: int) -> LayerPlan:
        return LayerPlan(tuple(range(LAYERS - capability, LAYERS)))


def initial() -> dict[str, Tensor]:
    return LoraLayerManager(Classifier()).state_slice()


def run(
    strategy: LoraStrategy,
    grid: Any,
    rounds: int = 2,
    state: Mapping[str, Tensor] | None = None,
    **settings: Any,
):
    """Run ``rounds`` rounds and return Flower's result."""
    return strategy.start(grid, to_arrays(state or initial()), rounds, **settings)


class Meddled(ClientApp):
    """App in which some nodes send manipulated replies.

    ``meddle`` maps a node to a function that changes its reply in place or returns another one.
    """

    def __init__(self, app: ClientApp, meddle: Mapping[int, Callable[[Message], Any]]):
        super().__init__()
        self.app = app
        self.meddle = meddle

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.app(message, context)
        node = message.metadata.dst_node_id
        if message.metadata.message_type == "train" and node in self.meddle:
            return self.meddle[node](reply) or reply
        return reply


class Wire(LocalGrid):
    """Grid that counts the bytes in each direction and applies ``change`` to training replies."""

    def __init__(self, app: Any, nodes: int, change: Callable[[list[Message]], Any] | None = None):
        super().__init__(app, nodes)
        self.change = change or list
        self.down = self.up = 0

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.down += sum(r.count_bytes() for m in messages for r in m.content.values())
        replies = list(super().send_and_receive(messages, timeout=timeout))
        if any(m.metadata.message_type == "train" for m in messages):
            replies = list(self.change(replies))
        answered = [reply for reply in replies if reply.has_content()]
        self.up += sum(r.count_bytes() for m in answered for r in m.content.values())
        return replies
