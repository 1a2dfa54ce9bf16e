"""Dropout masks of a client are the same when it is trained alone and in any batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from adapted_models import KINDS, adapted
from client_models import (
    Classifier,
    assert_close,
    cross_entropy,
    loop,
    next_token,
    specs,
    tokens,
)
from federated_rounds import same_bits
from torch import Tensor, nn

from lora_ext.federated import BatchedClients, ClientSpec, LayerPlan, LoraLayerManager
from lora_ext.federated.batched import client_seed, step_seeds
from lora_ext.nn import adapted_layers

PLANS = [LayerPlan((2,)), LayerPlan((0, 2), (3, 2)), LayerPlan((1,)), LayerPlan((0, 1, 2))]


def with_own_masks(model: nn.Module, spec: ClientSpec, round: int, loss_of: Any) -> Any:
    """Return a loss function that first sets the dropout seeds of the client's next step."""
    found: dict[str, Any] = dict(adapted_layers(model))
    layers = [found[name] for names in LoraLayerManager(model).modules for name in names]
    seed = client_seed(spec.seed, round, spec.client)
    steps = iter(range(len(spec.batches)))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seeds = step_seeds([seed], next(steps), len(layers))[0]
        for layer, own in zip(layers, seeds, strict=True):
            layer.dropout_seed["default"] = own.reshape(1)
        return loss_of(model, batch)

    return loss


def test_seeds_depend_only_on_seed_round_client_step_and_module():
    names = (1, 2, "1", "b")
    seeds = [client_seed(s, r, c) for s in (0, 1) for r in (0, 1) for c in names]
    assert len(set(seeds)) == 16 and all(0 <= seed < 2**64 for seed in seeds)
    assert client_seed(0, 3, 7) == 2869391127745300335
    together = step_seeds(seeds, 2, 5)
    assert together.shape == (16, 5) and together.dtype == torch.int64
    assert together.unique().numel() == 80 and together.min() >= 0
    assert torch.equal(step_seeds(seeds[3:4], 2, 5), together[3:4])
    assert not torch.equal(step_seeds(seeds, 1, 5), together)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # SplitMix64 of seed 0
    assert step_seeds([0], 0, 3).tolist() == [[n >> 1 for n in published]]
    assert step_seeds([0], 1, 1).tolist() == [[published[1] >> 1]]


@pytest.mark.parametrize("others", ["frozen", "disabled"])
@pytest.mark.parametrize("slots", [None, 2, 1])
def test_clients_in_a_batch_have_the_masks_of_the_loop(others: str, slots: int | None):
    model = Classifier(lora_dropout=0.4).double().train()
    manager = LoraLayerManager(model)
    state = manager.state_slice()
    batched = BatchedClients(model, specs(), slots=slots, others=others)
    found = batched.run_round(PLANS, state, round=3)
    assert all(layer.lora_dropout["default"].p == 0.4 for layer in model.layers)
    for update, spec, plan in zip(found, specs(), PLANS, strict=True):
        loss_of = with_own_masks(model, spec, 3, cross_entropy)
        assert_close(update, loop(model, manager, state, spec, plan, others, loss_of), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_for_longer_sequences_changes_no_mask(kind: str):
    model = adapted(kind, lora_dropout=0.4).double().train()
    state = LoraLayerManager(model).state_slice()
    lengths = [[4, 6], [7], [3, 3, 5], [9]]
    clients = [ClientSpec(i, tokens(n, i, rows=1 + i % 3), lr=0.05) for i, n in enumerate(lengths)]
    found = BatchedClients(model, clients).run_round(PLANS, state)
    lone = adapted("ours", lora_dropout=0.4).double().train()
    manager = LoraLayerManager(lone)
    manager.load_slice(state)
    for update, spec, plan in zip(found, clients, PLANS, strict=True):
        loss_of = with_own_masks(lone, spec, 0, next_token)
        assert_close(update, loop(lone, manager, state, spec, plan, loss_of=loss_of), 1e-10)


def test_masks_depend_on_round_and_seed_but_not_on_the_order_of_clients():
    model = Classifier(lora_dropout=0.4).double().train()
    state = LoraLayerManager(model).state_slice()
    clients = specs()

    def run(clients: list[ClientSpec], round: int = 0) -> dict[Any, dict[str, Tensor]]:
        plans = dict(zip((s.client for s in specs()), PLANS, strict=True))
        updates = BatchedClients(model, clients).run_round(plans, state, round)
        return {u.client: dict(u.tensors) for u in updates}

    first = run(clients)
    turned = run(clients[::-1])
    for client, changes in first.items():
        assert max((changes[k] - turned[client][k]).abs().max() for k in changes) < 1e-10
    seeded = [dataclasses.replace(clients[0], seed=1), *clients[1:]]
    for others in (run(clients, round=1), run(seeded)):
        assert not same_bits(first[1], others[1])
    assert same_bits(run(seeded)["b"], first["b"])
    model.eval()
    assert not same_bits(run(clients)[1], first[1])
    assert same_bits(run(clients)[1], run(clients, round=1)[1])
