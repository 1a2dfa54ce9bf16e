"""Federated training on digits for two studies: shares of the data, plans, ranks and sent bytes."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the pictures are scikit-learn's")
from federated_digits import QUICK, accuracy, federate, make_world

from lora_ext.federated import LayerPlan
from lora_ext.nn import adapted_layers


@pytest.fixture(scope="module")
def world():
    return make_world(0, QUICK)


def test_every_picture_belongs_to_a_client_and_ranks_may_differ_by_layer(world):
    for partition in ("iid", "3 classes", "dirichlet 0.3"):
        shares = world.shares(partition)
        assert len(shares) == 12
        assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(1437))
    assert len(world.testing[0]) == 360
    layers = adapted_layers(world.adapted([1, 2, 3, 4, 5, 6]))
    assert [layer.r["default"] for layer in layers.values()] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert {layer.scaling["default"] for layer in layers.values()} == {4.0}


def test_run_draws_clients_calls_the_planner_and_counts_bytes(world):
    asked = []

    def planner(round, clients):
        asked.append((round, tuple(clients)))
        return {clients[0]: LayerPlan(()), clients[1]: LayerPlan((0, 5))}

    run = federate(world, world.shares("iid"), planner)
    assert [round for round, _ in asked] == [1, 2]
    assert all(len(set(clients)) == 6 and clients[-1] < 12 for _, clients in asked)
    assert len(run.accuracy) == len(run.history) == 2
    assert [log.heights for log in run.history] == [(1, 0, 0, 0, 0, 1)] * 2
    layer = 2 * 4 * (32 + 32) * 4  # bytes: q and v, rank 4, float32
    assert [tuple(row[2:]) for row in run.comm.rows] == [(2 * layer, 6 * layer, 0, 12 * layer)] * 2
    again = federate(world, world.shares("iid"), planner)
    assert again.accuracy == run.accuracy


def test_federation_supports_rounds_without_training_and_disabled_layers(world):
    states = []
    before = accuracy(world.base, world.testing)
    run = federate(
        world,
        world.shares("iid"),
        lambda round, clients: {},
        clients=(0, 3),
        before=lambda round, state: states.append(state),
    )
    assert run.accuracy == [before, before]  # B stays 0, so adapters change nothing.
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert run.best == before and all(log.skipped for log in run.history)

    def planner(round, clients):
        return {clients[0]: LayerPlan((5,))}

    run = federate(world, world.shares("iid"), planner, others="disabled", rank_agg="covered")
    assert all(row.down == row.up == row.full // 12 for row in run.comm.rows)
