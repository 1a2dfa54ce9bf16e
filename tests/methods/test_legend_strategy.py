"""LEGEND on Flower: depths follow the measured times, also if devices fail, return or restart."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from federated_rounds import same_bits
from scripts import missing
from torch import Tensor

from lora_ext.federated import LayerPlan
from lora_ext.methods import legend
from lora_ext.methods.legend import Estimate, LegendConfig, resize_state

MISSING = missing("flwr")
if MISSING:
    pytest.skip(f"not installed: {MISSING}", allow_module_level=True)

from flower_apps import CLASSES, LAYERS, RANK, WIDTH, Classifier, batches, initial, run  # noqa: E402

from lora_ext.federated import LocalGrid, make_client_app  # noqa: E402
from lora_ext.federated.flower import from_arrays  # noqa: E402

BYTES = 4 * RANK * 2 * WIDTH  # bytes of a layer in one direction
SPEEDS = [Estimate(1, 0.2, 1e-4), Estimate(1.2, 0.4, 2e-4), Estimate(1.5, 1.0, 5e-4)]
PLANNED = {0: (0, 1, 2), 1: (1, 2), 2: (2,)}


class Clients:
    """Three devices with a scripted clock; each trains only its planned layers."""

    def __init__(self, factor: Callable[[int, int], float] = lambda device, round: 1.0):
        self.factor = factor
        self.trained: list[tuple[int, int, int]] = []

    def app(self) -> Any:
        return make_client_app(Classifier, batches, self.train)

    def train(self, model: Any, data: list[Any], config: Mapping[str, Any]) -> dict[str, float]:
        device, round = len(data[0][0]) - 2, int(config["server-round"])
        layers = list(config["layers"])
        factor = self.factor(device, round)
        if factor < 0:
            raise RuntimeError("the device has failed")
        self.trained.append((round, device, len(layers)))
        assert {
            int(n.split(".")[1]) for n, p in model.named_parameters() if p.requires_grad
        } == set(layers)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for x, y in data:
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        speed = SPEEDS[device]
        return {
            "train-time-s": factor * (speed.f + len(layers) * speed.mu),
            "down-time-s": speed.beta * BYTES * len(layers) / 2,
            "num-examples": 10 + device,
        }


class Shuffled(LocalGrid):
    """Grid that shuffles the replies."""

    order = random.Random(0)

    def send_and_receive(self, messages, *, timeout=None):
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.order.shuffle(replies)
        return replies


class Silent(LocalGrid):
    """Grid in which device 2 does not reply in some rounds."""

    rounds: tuple[int, ...] = ()
    asked: list[list[int]]

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.asked = [*getattr(self, "asked", []), sorted(m.metadata.dst_node_id for m in messages)]
        answered = [
            m
            for m in messages
            if m.metadata.dst_node_id != 2
            or m.metadata.message_type != "train"
            or m.content.config_records["config"]["server-round"] not in self.rounds
        ]
        return super().send_and_receive(answered, timeout=timeout)


def federation(
    rounds: int, clients: Clients | None = None, grid: type = LocalGrid, **settings: Any
):
    strategy = legend.Legend(LegendConfig(), **settings)
    clients = clients or Clients()
    result = run(strategy, grid(clients.app(), 3), rounds)
    return strategy, clients, from_arrays(result.arrays)


def test_scripted_clock_leads_to_the_planned_depths():
    strategy, clients, _ = federation(6)
    depths = {d: [k for r, e, k in clients.trained if e == d] for d in range(3)}
    # Device 0 needs 1.64 s for three layers; device 1 needs 1.63 s for one and 2.06 s for two.
    assert depths == {0: [3, 2, 3, 3, 3, 3], 1: [3, 2, 1, 1, 1, 1], 2: [3, 2, 1, 1, 1, 1]}
    assert strategy.history[-1].heights == (1, 1, 3)
    assert strategy.allocator.tracker.estimate(0)[:3] == pytest.approx(SPEEDS[0][:3], rel=1e-2)
    assert strategy.allocator.last.over_target == (2,)


def test_order_of_replies_changes_no_bit():
    first, second = (federation(5, grid=grid)[2] for grid in (LocalGrid, Shuffled))
    assert same_bits(first, second)


def test_failing_device_that_returns_does_not_stop_the_run():
    clients = Clients(lambda device, round: -1.0 if device == 0 and 3 <= round < 6 else 1.0)
    strategy, clients, _ = federation(8, clients)
    assert [len(log.accepted) for log in strategy.history] == [3, 3, 2, 2, 2, 3, 3, 3]
    assert "the device has failed" in strategy.history[2].rejected[0]
    assert not any(log.skipped for log in strategy.history)
    assert {k for r, d, k in clients.trained if d == 0 and r >= 6} == {3}


def test_silent_device_gets_the_least_depth_and_is_then_paused():
    grids = []

    class Grid(Silent):
        rounds = (3, 4, 5)

        def __init__(self, *args: Any):
            super().__init__(*args)
            grids.append(self)

    strategy = legend.Legend(LegendConfig(cooldown=2))
    run(strategy, Grid(Clients().app(), 3), 9, timeout=60.0)
    asked = [2 in log.plans for log in strategy.history]
    assert asked == [True] * 5 + [False] * 2 + [True] * 2
    assert strategy.allocator.tracker.estimate(2).f < 5
    assert [log.plans[2].layers for log in strategy.history[-2:]] == [(2,), (2,)]


def test_lower_layers_are_sent_only_with_send_frozen():
    frames = {}
    for frozen in (False, True):
        strategy = legend.Legend(
            LegendConfig(warmup="prior", send_frozen=frozen), prior=dict(enumerate(SPEEDS))
        )
        run(strategy, LocalGrid(Clients().app(), 3), 1)
        plans = strategy.history[0].plans
        for row in strategy.comm.rows:
            if row.round == 1:
                depth = len(plans[row.client].layers)
                down = LAYERS if frozen else depth
                assert row.up + row.down - row.frames == BYTES * (depth + down)
                frames[frozen, row.client] = row.frames
    assert all(count > 0 for count in frames.values())


def test_restarted_server_continues_bitwise():
    whole, _, end = federation(7)
    first, _, middle = federation(4)
    saved = json.loads(json.dumps(first.state_dict()))
    second = legend.Legend(LegendConfig())
    second.load_state_dict(saved)
    last = from_arrays(run(second, LocalGrid(Clients().app(), 3), 3, state=middle).arrays)
    assert same_bits(last, end)
    assert [log.plans for log in second.history] == [log.plans for log in whole.history]
    assert second.state_dict()["allocator"] == whole.state_dict()["allocator"]


def test_reply_with_another_depth_than_planned_is_rejected():
    class Liar(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = list(super().send_and_receive(messages, timeout=timeout))
            for reply in replies:
                if reply.metadata.src_node_id == 1 and reply.metadata.message_type == "train":
                    reply.content.config_records["echo"]["layers"] = [2]
            return replies

    strategy, _, _ = federation(1, grid=Liar)
    assert strategy.history[0].accepted == (0, 2)
    assert "echo: expected LayerPlan(layers=(0, 1, 2)" in strategy.history[0].rejected[1]
    assert 1 not in strategy.allocator.tracker


def test_ranks_of_the_config_must_be_those_of_the_adapter():
    config = LegendConfig(total=6)
    state: dict[str, Tensor] = initial()
    with pytest.raises(ValueError, match=r"state: expected ranks \(1, 2, 3\) \(use resize_state\)"):
        run(legend.Legend(config), LocalGrid(Clients().app(), 3), 1, state=state)
    resized, _ = resize_state(state, config.ranks(LAYERS))
    strategy = legend.Legend(config)
    end = from_arrays(run(strategy, LocalGrid(Clients().app(), 3), 2, state=resized).arrays)
    assert {k: v.shape for k, v in end.items()} == {k: v.shape for k, v in resized.items()}
    assert strategy.history[0].plans[0] == LayerPlan((0, 1, 2), (1, 2, 3))
    assert strategy.history[0].rejected == {}


def test_legend_is_imported_on_first_access():
    assert legend.Legend.__module__ == "lora_ext.methods.legend._flower"
    with pytest.raises(AttributeError, match="no attribute 'Legends'"):
        legend.Legends  # noqa: B018
    with pytest.raises(ValueError, match="expected before_round to run first"):
        legend.Legend().plan_round(1, {0: 3})
    assert CLASSES  # The model of these tests has a head, which is in no plan.


def test_state_saved_again_before_the_first_round_is_complete():
    first, _, _ = federation(4)
    saved = json.loads(json.dumps(first.state_dict()))
    second = legend.Legend(LegendConfig())
    second.load_state_dict(saved)
    assert json.loads(json.dumps(second.state_dict())) == saved


def test_config_of_another_type_is_refused():
    with pytest.raises(TypeError, match="Legend: config: expected a LegendConfig, found str"):
        legend.Legend("balanced")  # pyright: ignore[reportArgumentType]
