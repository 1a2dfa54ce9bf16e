"""Flower messages: logged bytes, packed and masked payloads, and Flower's client mods."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from federated_rounds import same_bits
from flower_apps import (
    LAYERS,
    RANK,
    WIDTH,
    Classifier,
    Meddled,
    Suffixes,
    Wire,
    batches,
    initial,
    run,
)
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping

from lora_ext.federated import LayerPlan, LocalGrid, LoraStrategy, make_client_app
from lora_ext.federated.flower import from_arrays, to_arrays

CAPABILITY = {0: 1, 1: 2, 2: 3}


class Ranked:
    """Allocator that gives client i the last ``capability`` layers, with rank 1 + i for the last
    one and 2 for the others."""

    def plan(self, round: int, client: int | str, capability: int) -> LayerPlan:
        layers = range(LAYERS - capability, LAYERS)
        return LayerPlan(tuple(layers), (*[2] * (capability - 1), 1 + int(client)))


def end_of(nodes: int = 3, rounds: int = 2, allocator: Any = None, app: Any = None, **settings):
    strategy = LoraStrategy(allocator or Suffixes(), **{"capability": CAPABILITY, **settings})
    app = app or make_client_app(Classifier, batches)
    result = run(strategy, LocalGrid(app, nodes), rounds)
    assert all(len(log.accepted) == nodes for log in strategy.history), strategy.history
    return from_arrays(result.arrays), strategy


@pytest.mark.parametrize("settings", [{}, {"pack": True}, {"send_frozen": False}])
def test_logged_bytes_equal_the_bytes_of_flowers_messages(settings):
    strategy = LoraStrategy(Suffixes(), capability=CAPABILITY, **settings)
    grid = Wire(make_client_app(Classifier, batches), 3)
    run(strategy, grid)
    assert (strategy.comm.total("down"), strategy.comm.total("up")) == (grid.down, grid.up)
    layer = 4 * RANK * (WIDTH + WIDTH)  # float32
    down = 3 * LAYERS if settings.get("send_frozen", True) else 1 + 2 + 3
    sent = strategy.comm.total("down", 1) + strategy.comm.total("up", 1)
    assert sent - strategy.comm.total("frames", 1) == layer * (down + 1 + 2 + 3)


def test_full_bytes_equal_the_bytes_of_all_layers_of_all_clients():
    _, strategy = end_of(capability=None)
    for row in strategy.comm.rows[3:]:
        assert row.full == row.up + row.down
    assert 0.99 < strategy.comm.share <= 1.02  # Unlike ``full``, the bytes sent include queries.


def test_packing_saves_framing_and_changes_no_bit():
    plain, loose = end_of(allocator=Ranked())
    packed, tight = end_of(allocator=Ranked(), pack=True)
    assert same_bits(plain, packed)
    assert tight.comm.total("frames") < loose.comm.total("frames")


def test_uploaded_values_and_deltas_give_the_same_state():
    deltas, _ = end_of(allocator=Ranked())
    values, _ = end_of(allocator=Ranked(), upload="value")
    for key, value in deltas.items():
        assert (value - values[key]).abs().max() < 1e-6, key


def test_plan_without_ranks_sends_no_ranks():
    sent: list[Message] = []

    class Seen(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            sent.extend(messages := list(messages))
            return super().send_and_receive(messages, timeout=timeout)

    for allocator in (Suffixes(), Ranked()):
        strategy = LoraStrategy(allocator, capability=CAPABILITY)
        run(strategy, Seen(make_client_app(Classifier, batches), 3), rounds=1)
    train = [m.content["config"] for m in sent if m.metadata.message_type == "train"]
    assert [config.get("ranks") for config in train] == [None] * 3 + [[1], [2, 2], [2, 2, 3]]
    assert all(config.count_bytes() > 0 for config in train)
    assert all(config["server-round"] == 1 and config["protocol"] == 1 for config in train)


def test_client_without_frozen_layers_trains_only_its_layers():
    seen: list[list[str]] = []

    class Seen(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            seen.extend(list(m.content["lora"]) for m in messages if "lora" in m.content)
            return super().send_and_receive(messages, timeout=timeout)

    ends = []
    for backend in ("loop", "batched"):
        strategy = LoraStrategy(Suffixes(), capability=CAPABILITY, send_frozen=False)
        app = make_client_app(Classifier, batches, backend=backend)
        ends.append(from_arrays(run(strategy, Seen(app, 3)).arrays))
    assert [len(keys) for keys in seen] == [2, 4, 6] * 4
    frozen, _ = end_of()
    for key, value in ends[0].items():
        assert (value - ends[1][key]).abs().max() < 1e-5, key
    assert not same_bits(ends[0], frozen)


@pytest.mark.parametrize("allocator", [Suffixes(), Ranked()])
@pytest.mark.parametrize("weighted_by", ["num-examples", None])
def test_masked_sums_equal_the_covered_mean(allocator, weighted_by):
    plain, _ = end_of(allocator=allocator, weighted_by=weighted_by, rounds=1, server_lr=0.7)
    masked, strategy = end_of(
        allocator=allocator,
        weighted_by=weighted_by,
        rounds=1,
        server_lr=0.7,
        payload="dense_masked",
    )
    for key, value in plain.items():
        assert (value - masked[key]).abs().max() < 1e-6, key  # Masked sums are float32.
    numbers = 2 if isinstance(allocator, Ranked) else 1  # per layer, in the reply's plan
    sizes = {row.up - 8 * numbers * (row.client + 1) for row in strategy.comm.rows[3:]}
    assert len(sizes) == 1, "expected equal sizes for all plans"


MASKED_FAULTS = {
    "too heavy": (
        ("layers.2.rank_weights", lambda v: v * 2),
        "layers.2.rank_weights: expected 6 for 3 ranks, and zeros for all other ranks",
    ),
    "outside the plan": (
        ("base_model.model.layers.0.lora_A.weight", lambda v: v + 1),
        "layers.0.lora_A.weight: expected zeros beyond rank 0",
    ),
    "not finite": (
        ("base_model.model.layers.2.lora_A.weight", lambda v: v * float("nan")),
        "layers.2.lora_A.weight: expected finite values",
    ),
    "missing": (
        ("base_model.model.layers.2.lora_A.weight", None),
        "layers.2.lora_A.weight: expected a tensor from every client",
    ),
}


@pytest.mark.parametrize("name", MASKED_FAULTS)
def test_invalid_share_is_rejected(name):
    (key, change), reason = MASKED_FAULTS[name]

    def meddle(reply: Message) -> None:
        record = reply.content["lora"]
        if change is None:
            del record[key]
        else:
            record[key] = to_arrays({key: change(torch.tensor(record[key].numpy()))})[key]

    app = Meddled(make_client_app(Classifier, batches), {1: meddle})
    settings: dict[str, Any] = {"capability": {0: 1, 1: 1, 2: 1}, "payload": "dense_masked"}
    strategy = LoraStrategy(Suffixes(), **settings)
    run(strategy, LocalGrid(app, 3), rounds=1)
    assert strategy.history[0].accepted == (0, 2)
    assert reason in strategy.history[0].rejected[1]


def test_flowers_clipping_mod_bounds_the_update_of_a_client():
    # The mod requires that a reply has the keys of the message. The server therefore sends only
    # planned layers, and clients upload values instead of differences.
    bound = 1e-3
    changes: list[float] = []
    start = initial()

    def norm(reply: Message) -> None:
        sent = from_arrays(reply.content["lora"])
        changes.append(float(sum((sent[k] - start[k]).square().sum() for k in sent)) ** 0.5)

    app = make_client_app(Classifier, batches, mods=[fixedclipping_mod])
    strategy = LoraStrategy(
        Suffixes(), capability=CAPABILITY, upload="value", send_frozen=False, weighted_by=None
    )
    private = DifferentialPrivacyClientSideFixedClipping(strategy, 0.0, bound, 3)
    grid = LocalGrid(Meddled(app, dict.fromkeys(range(3), norm)), 3)
    end = from_arrays(private.start(grid, to_arrays(start), 1).arrays)
    assert strategy.history[0].accepted == (0, 1, 2)
    assert len(changes) == 3 and all(abs(found - bound) < 1e-5 for found in changes)
    assert not same_bits(end, start)
    assert sum(float((end[k] - start[k]).square().sum()) for k in end) ** 0.5 <= bound * 1.01


def test_shared_head_is_trained_by_all_clients():
    shared = ("head.weight", "head.bias")
    model = Classifier()
    start = {**initial(), **{name: model.get_parameter(name).detach() for name in shared}}
    strategy = LoraStrategy(Suffixes(), capability=CAPABILITY, shared=shared)
    app = make_client_app(Classifier, batches)
    end = from_arrays(run(strategy, LocalGrid(app, 3), rounds=1, state=start).arrays)
    assert strategy.history[0].accepted == (0, 1, 2)
    assert all(not torch.equal(end[name], start[name]) for name in shared)


def test_invalid_evaluation_metrics_do_not_stop_the_run():
    app = make_client_app(Classifier, batches)

    @app.evaluate()
    def evaluate(message: Message, context: Any) -> Message:
        node = context.node_id
        found = {0: {"num-examples": 1, "a": 1.0}, 1: {"num-examples": 3, "a": 5.0}, 2: {"b": [1]}}
        return Message(RecordDict({"metrics": MetricRecord(found[node])}), reply_to=message)

    strategy = LoraStrategy(Suffixes(), fraction_evaluate=1.0)
    grid = Wire(app, 3)
    result = run(strategy, grid, rounds=1)
    assert dict(result.evaluate_metrics_clientapp[1]) == {"a": 4.0}
    assert (strategy.comm.total("down"), strategy.comm.total("up")) == (grid.down, grid.up)


def test_learning_rate_and_epochs_are_sent_by_the_server():
    lrs: list[Any] = []

    def train(model: torch.nn.Module, batches: Any, config: ConfigRecord) -> dict[str, float]:
        lrs.append((config["lr"], config["server-round"], len(batches)))
        return {"train-loss": 0.5}

    strategy = LoraStrategy(Suffixes(), capability=CAPABILITY)
    app = make_client_app(Classifier, batches, train)
    result = run(strategy, LocalGrid(app, 3), rounds=1, train_config=ConfigRecord({"lr": 0.25}))
    assert lrs == [(0.25, 1, 2)] * 3
    assert result.train_metrics_clientapp[1]["train-loss"] == 0.5
    assert strategy.history[0].accepted == (0, 1, 2), "num-examples must count rows"


@pytest.mark.parametrize("kind", ["loop", "batched"])
def test_batches_may_be_an_iterator(kind):
    strategy = LoraStrategy(Suffixes(), capability=CAPABILITY)
    app = make_client_app(Classifier, lambda p: iter(batches(p)), backend=kind)
    run(strategy, LocalGrid(app, 3), rounds=1, train_config=ConfigRecord({"epochs": 2}))
    assert strategy.history[0].accepted == (0, 1, 2)


def test_local_run_starts_no_thread():
    end_of(rounds=1)  # torch starts threads in its first backward
    before = set(threading.enumerate())
    end_of(rounds=1)
    assert set(threading.enumerate()) <= before
