"""A small model on vectors, its data, and federations of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.federated import LayerPlan, LoraLayerManager
from lora_ext.interop.flower import LoraStrategy, to_arrays
from lora_ext.nn import LoraLinear

WIDTH, RANK, LAYERS, CLASSES = 6, 3, 3, 4
MODULE = "base_model.model.layers.{}.lora_{}.weight"


class Classifier(nn.Module):
    """Three blocks with an adapter each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        linears = [nn.Linear(WIDTH, WIDTH).requires_grad_(False) for _ in range(LAYERS)]
        settings = {"r": RANK, "init_lora_weights": False, "lora_alpha": 2}
        self.layers = nn.ModuleList(LoraLinear(linear, **settings) for linear in linears)
        self.head = nn.Linear(WIDTH, CLASSES).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def batches(partition: int) -> list[tuple[Tensor, Tensor]]:
    """Two steps; client i has i + 2 rows in each."""
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
    """The layers nearest to the output, as many as the client can train."""

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
    """A whole run; Flower's result."""
    return strategy.start(grid, to_arrays(state or initial()), rounds, **settings)
