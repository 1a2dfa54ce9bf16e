"""Training of adapters per row in two processes with different rows equals one process."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from data_parallel import BOUND, WAYS, assert_same, trained
from processes import TwoProcesses
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_ext
from lora_ext.nn import LoraConv, LoraEmbedding, LoraLinear

RANKS = {"red": 4, "green": 2, "blue": 3}
ROWS = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(1))

#: Adapter names of the rows of the first and the second process; None if there is no block.
NAMES: dict[str, tuple[Any, Any]] = {
    "disjoint": (["red", "red"], ["green", "blue"]),
    "in another order": (["green", "red"], ["red", "green"]),
    "base alone": ([None, None], ["blue", "red"]),
    "no block": (None, ["green", "blue"]),
    "one name": ("blue", ["red", "green"]),
}


class Model(nn.Module):
    """Model with one layer of each kind. Each layer has three trainable adapters of different
    ranks."""

    def __init__(self, dora: tuple[str, ...] = (), checkpoints: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = LoraEmbedding(nn.Embedding(11, 8), "red", RANKS["red"])
        self.patches = LoraConv(nn.Conv1d(8, 10, 2, 2), "red", RANKS["red"])
        self.first = LoraLinear(nn.Linear(10, 12), "red", RANKS["red"], use_dora="red" in dora)
        self.last = LoraLinear(nn.Linear(12, 5), "red", RANKS["red"])
        for layer in self.children():
            for name in ("green", "blue"):
                use_dora = layer is self.first and name in dora
                layer.add_adapter(name, RANKS[name], use_dora=use_dora)
            layer.base_layer.requires_grad_(False)
        self.checkpoints = checkpoints
        for key, parameter in self.double().named_parameters():
            if "lora_" in key:
                parameter.requires_grad_(True)
                if "magnitude" not in key:
                    nn.init.normal_(parameter, std=0.4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.patches(self.embed(tokens).mT).mT  # (B, L / 2, 10)
        if self.checkpoints:
            x = checkpoint(self.first, torch.tanh(x), use_reentrant=False)
        else:
            x = self.first(torch.tanh(x))
        return self.last(torch.tanh(x)).square().mean((1, 2))  # (B,)


def step(rank: int | None, way: str | None, case: str, **options: Any) -> dict[str, Tensor]:
    """Return the adapters after training in one of two processes or, if ``rank`` is None, in a
    single process with all rows."""
    model = Model(**options)
    first, second = NAMES[case]
    names = (
        [first, second][rank]
        if rank is not None
        else [*(first if isinstance(first, list) else [first or "red"] * 2), *second]
    )
    rows = ROWS if rank is None else ROWS.chunk(2)[rank]

    def loss(wrapped: nn.Module) -> Tensor:
        with contextlib.nullcontext() if names is None else lora_ext.adapters(names):
            return wrapped(rows).mean()

    return trained(model, way, [model.first, model.last], loss)


def start(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", NAMES)
def test_training_adapters_in_two_processes_equals_one_process(
    way: str, case: str, two_processes: TwoProcesses
):
    found, other = two_processes.run(step, way, case)
    assert all(torch.equal(found[key], other[key]) for key in found)
    assert_same(found, step(None, None, case), start(Model()), BOUND.get(way, 1e-9))


@pytest.mark.parametrize("way", WAYS)
def test_training_dora_in_two_processes_equals_one_process(way: str, two_processes: TwoProcesses):
    options = {"dora": ("red", "blue")}
    found, _ = two_processes.run(_process_step, way, "disjoint", options)
    assert_same(
        found,
        step(None, None, "disjoint", **options),
        start(Model(**options)),
        BOUND.get(way, 1e-9),
    )


@pytest.mark.parametrize("way", WAYS)
def test_training_checkpointed_layers_in_two_processes_equals_one_process(
    way: str, two_processes: TwoProcesses
):
    options = {"checkpoints": True}
    found, _ = two_processes.run(_process_step, way, "disjoint", options)
    assert_same(found, step(None, None, "disjoint"), start(Model()), BOUND.get(way, 1e-9))


def _process_step(rank: int, way: str, case: str, options: dict[str, Any]) -> dict[str, Tensor]:
    return step(rank, way, case, **options)
