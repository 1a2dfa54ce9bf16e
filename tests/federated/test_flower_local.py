"""`LocalGrid`, the client and server apps, and settings rejected before any message is sent."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from flower_apps import LAYERS, RANK, Classifier, Suffixes, batches, initial, run
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lora_ext import federated
from lora_ext.federated import (
    PATTERN,
    BatchedClients,
    ClientSpec,
    LayerPlan,
    LocalGrid,
    LoraLayerManager,
    LoraStrategy,
    make_client_app,
    make_server_app,
)
from lora_ext.federated.flower import _tasks as model_of_apps
from lora_ext.federated.flower import from_arrays, to_arrays
from lora_ext.federated.flower._tasks import Model

ROOT = Path(__file__).parents[2]
CAPABILITY = {0: 1, 1: 2, 2: 3}


def app() -> ClientApp:
    return make_client_app(Classifier, batches)


def test_batched_clients_can_be_the_nodes_of_a_local_grid():
    model = Classifier()
    specs = [ClientSpec(name, batches(i), lr=1e-2) for i, name in enumerate("abc")]
    grid = LocalGrid(BatchedClients(model, specs), 3)
    strategy = LoraStrategy(Suffixes(), capability=CAPABILITY)
    end = from_arrays(run(strategy, grid).arrays)
    assert [log.accepted for log in strategy.history] == [(0, 1, 2)] * 2
    looped = LoraStrategy(Suffixes(), capability=CAPABILITY)
    wanted = from_arrays(run(looped, LocalGrid(app(), 3)).arrays)
    for key, value in wanted.items():
        assert (value - end[key]).abs().max() < 1e-5, key


def test_batched_clients_are_refused_if_the_server_sends_no_frozen_layers():
    grid = LocalGrid(BatchedClients(Classifier(), [ClientSpec("a", batches(0), lr=1e-2)]), 1)
    strategy = LoraStrategy(Suffixes(), send_frozen=False)
    run(strategy, grid, rounds=1)
    reason = "client_app: expected others='disabled', as in the strategy, found 'frozen'"
    assert reason in strategy.history[0].rejected[0]


def test_client_with_nan_loss_is_an_error_reply():
    def data(partition: int):
        return [(x * (float("nan") if partition == 1 else 1), y) for x, y in batches(partition)]

    strategy = LoraStrategy(Suffixes(), capability=CAPABILITY)
    run(strategy, LocalGrid(make_client_app(Classifier, data, backend="batched"), 3), rounds=1)
    (log,) = strategy.history
    assert log.accepted == (0, 2) and "is not finite" in log.rejected[1]


def test_app_that_returns_no_message_is_an_error_reply():
    silent = ClientApp()

    @silent.train()
    def train(message: Message, context: Context) -> Message:
        return None

    strategy = LoraStrategy(Suffixes(), capability=CAPABILITY)
    run(strategy, LocalGrid(silent, 3), rounds=1)
    (log,) = strategy.history
    expected = "LocalGrid: client_app: expected an app that returns a Message, found one that"
    assert all(f"{expected} returns NoneType" in log.rejected[node] for node in range(3))


def test_nodes_keep_their_context_and_receive_copies_of_records():
    counted = ClientApp()

    @counted.train()
    def train(message: Message, context: Context) -> Message:
        record = context.state.config_records.get("count", ConfigRecord({"n": 0}))
        record["n"] = record["n"] + 1
        context.state["count"] = record
        message.content["config"]["mine"] = context.node_id
        return Message(message.content, reply_to=message)

    grid = LocalGrid(counted, 2)
    content = RecordDict({"config": ConfigRecord({"x": 1})})
    for count in (1, 2):
        replies = grid.send_and_receive([Message(content, node, "train") for node in (1, 0)])
        assert [m.metadata.src_node_id for m in replies] == [1, 0], "expected message order"
        assert [m.content["config"]["mine"] for m in replies] == [1, 0]
        assert [c.state["count"]["n"] for c in grid.contexts.values()] == [count] * 2
    assert "mine" not in content["config"]
    ids = list(grid.push_messages([Message(content, 0, "train")]))
    (reply,) = grid.pull_messages(ids)
    assert reply.metadata.reply_to_message_id == ids[0] and not list(grid.pull_messages(ids))
    assert list(grid.send_and_receive([Message(content, 7, "train")])) == [], "there is no node 7"


def test_server_app_starts_from_the_model_and_evaluates_it():
    kept: list[Any] = []
    seen: list[ConfigRecord] = []

    def train(model: torch.nn.Module, data: Any, config: ConfigRecord) -> dict[str, float]:
        seen.append(config)
        return {}

    def score(model: torch.nn.Module) -> dict[str, float]:
        manager = LoraLayerManager(model)
        return {"norm": float(sum(v.norm() for v in manager.state_slice().values()))}

    server = make_server_app(
        lambda: LoraStrategy(Suffixes()),
        Classifier,
        score,
        train_config={"lr": 0.5, "epochs": 2},
        on_result=lambda strategy, result: kept.append((strategy, result)),
    )
    settings = {"num-server-rounds": 2, "timeout": 9.0, "lr": 0.25, "folder": "out"}
    context = Context(1, 1, {}, RecordDict(), settings)
    server(LocalGrid(make_client_app(Classifier, batches, train), 2), context)
    ((strategy, result),) = kept
    assert strategy.round == 2 and list(result.evaluate_metrics_serverapp) == [0, 1, 2]
    start = float(sum(v.norm() for v in initial().values()))
    assert abs(result.evaluate_metrics_serverapp[0]["norm"] - start) < 1e-6
    assert {(c["lr"], c["epochs"], c.get("folder")) for c in seen} == {(0.25, 2, None)}
    assert context.state["lora"] == result.arrays


def test_deployment_app_runs_on_a_local_grid(capsys):
    path = ROOT / "examples/federated_app/federation.py"
    spec = importlib.util.spec_from_file_location("federation", path)
    federation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(federation)
    grid = LocalGrid(federation.client_app, 2)
    for node, context in grid.contexts.items():
        context.node_config["capability"] = node + 1
    settings = {"num-server-rounds": 3, "timeout": 60, "lr": 0.05, "epochs": 2}
    federation.server_app(grid, Context(1, 1, {}, RecordDict(), settings))
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("REPORT")]
    report = json.loads(line.removeprefix("REPORT"))
    assert [log["accepted"] for log in report["rounds"]] == [[0, 1]] * 3
    assert report["accuracy"]["3"] > report["accuracy"]["0"]


SETTINGS = {
    "server_lr": ({"server_lr": 0}, "server_lr: expected a finite number above 0, found 0"),
    "fraction": ({"fraction_train": 0.0}, "fraction_train: expected a number above 0, up to 1"),
    "min_replies": ({"min_replies": 0}, "min_replies: expected an integer from 1, found 0"),
    "rank_agg": ({"rank_agg": "mean"}, "rank_agg: expected one of .* found 'mean'"),
    "stack": ({"rank_agg": "stack"}, "rank_agg: expected a method returning an"),
    "payload": ({"payload": "all"}, "payload: expected .* found 'all'"),
    "masked svd": (
        {"payload": "dense_masked", "rank_agg": "svd"},
        "rank_agg: expected 'covered' with payload 'dense_masked', found svd",
    ),
    "seed": ({"seed": -1}, "seed: expected an integer from 0, found -1"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_invalid_settings_are_refused(name):
    settings, reason = SETTINGS[name]
    with pytest.raises(ValueError, match=reason):
        LoraStrategy(Suffixes(), **settings)


def test_model_is_made_once_per_worker_and_released_with_its_app(monkeypatch: pytest.MonkeyPatch):
    # Release the models that this process keeps, after the test.
    monkeypatch.setattr(model_of_apps, "_kept", {})
    made: list[weakref.ref[torch.nn.Module]] = []

    def model() -> torch.nn.Module:
        found = Classifier()
        made.append(weakref.ref(found))
        return found

    mine = make_client_app(model, batches)
    run(LoraStrategy(Suffixes()), LocalGrid(mine, 2))
    assert len(made) == 1 and made[0]() is not None
    del mine
    gc.collect()
    assert made[0]() is None
    there = Model(model, PATTERN, "default")
    kept = [copy.copy(there).manager for _ in range(3)]  # Unpickling makes such copies.
    assert len(made) == 2 and kept[0] is kept[1] is kept[2]


class TooDeep:
    def plan(self, round: int, client: int | str, capability: int) -> LayerPlan:
        return LayerPlan((LAYERS,))


class TooWide:
    def plan(self, round: int, client: int | str, capability: int) -> LayerPlan:
        return LayerPlan((0,), (RANK + 1,))


class Forgetful:
    def plan(self, round: int, client: int | str, capability: int) -> None:
        return None


BAD = {
    "nobody's": (Suffixes(), {0: 1}, ValueError, "capability: expected a number for client 1 of n"),
    "too many": (Suffixes(), {0: 1, 1: 4}, ValueError, "client 1: expected 0 to 3 layers, found 4"),
    "negative": (Suffixes(), lambda client: -1, ValueError, "client 0: expected 0 to 3 layers"),
    "a bool": (Suffixes(), {0: 1, 1: True}, TypeError, "client 1: expected an integer, found True"),
    "a layer beyond": (TooDeep(), None, ValueError, r"plan.layers: expected layers among \[0, 1"),
    "no plan": (Forgetful(), None, TypeError, "plan of client 0: expected a LayerPlan, found None"),
    "a rank beyond": (TooWide(), None, ValueError, "plan.ranks: .*: expected at most 3, found 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_plans_and_capabilities_raise_before_training(name):
    allocator, capability, kind, reason = BAD[name]

    def nobody(partition: int):
        raise AssertionError("the client was trained")

    with pytest.raises(kind, match=reason):
        run(
            LoraStrategy(allocator, capability=capability),
            LocalGrid(make_client_app(Classifier, nobody), 2),
        )


def test_new_client_without_a_capability_does_not_stop_the_run():
    grid = LocalGrid(app(), 3)
    late = grid.contexts.pop(2)
    strategy = LoraStrategy(Suffixes(), capability={0: 1, 1: 1})

    def arrives(round: int, arrays: Any) -> None:
        if round == 1:
            grid.contexts[2] = late

    strategy.start(grid, to_arrays(initial()), 2, evaluate_fn=arrives)
    with pytest.raises(ValueError, match="capability: expected a number for client 2"):
        strategy.start(grid, to_arrays(initial()), 1)
    assert [log.accepted for log in strategy.history] == [(0, 1)] * 2


def test_clients_of_capability_0_are_skipped_and_nodes_may_set_capabilities():
    strategy = LoraStrategy(Suffixes(), capability={0: 0, 1: 1})
    run(strategy, LocalGrid(app(), 2), rounds=1)
    assert list(strategy.history[0].plans) == [1]
    grid = LocalGrid(app(), 3)
    for node, context in grid.contexts.items():
        context.node_config["capability"] = (2, 99, -5)[node]
    strategy = LoraStrategy(Suffixes())
    run(strategy, grid, rounds=1)
    plans = strategy.history[0].plans
    assert plans == {0: LayerPlan((1, 2)), 1: LayerPlan((0, 1, 2))}


def test_invalid_apps_and_grids_are_refused():
    for settings, reason in (
        ({"backend": "ray"}, "backend: expected 'loop' or 'batched', found 'ray'"),
        ({"backend": "batched", "train_fn": print}, "train_fn: expected None with backend"),
    ):
        with pytest.raises(ValueError, match=reason):
            make_client_app(Classifier, batches, **settings)
    with pytest.raises(TypeError, match="client_app: expected a ClientApp, found NoneType"):
        LocalGrid(None, 1)
    with pytest.raises(ValueError, match="num_nodes: expected at least 1, found 0"):
        LocalGrid(app(), 0)
    clients = BatchedClients(Classifier(), [ClientSpec("a", batches(0), lr=1e-2)])
    with pytest.raises(ValueError, match="num_nodes: expected 1, one per client, found"):
        LocalGrid(clients, 2)


def python(code: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return found.stdout


@pytest.mark.slow
def test_without_flower_the_rest_works_and_errors_name_the_extra():
    code = (
        "import sys; sys.modules['flwr'] = None\n"
        "from lora_ext import federated\n"
        "federated.aggregate, federated.BatchedClients, federated.LayerPlan((0,))\n"
        "for name in ('LocalGrid', 'LoraStrategy', 'make_client_app', 'make_server_app'):\n"
        "    try: getattr(federated, name)\n"
        "    except ImportError as error: print(error)\n"
    )
    lines = python(code).splitlines()
    assert len(lines) == 4
    assert all(
        "pip install --no-build-isolation '.[fed]'" in line and "flwr" in line for line in lines
    )


@pytest.mark.slow
def test_importing_the_package_imports_no_flower_and_telemetry_is_off():
    code = (
        "import sys, lora_ext.federated as f; print('flwr' in sys.modules); f.LocalGrid\n"
        "from flwr.supercore import telemetry; print(telemetry.FLWR_TELEMETRY_ENABLED)"
    )
    assert python(code).split() == ["False", "0"]
    with pytest.raises(AttributeError, match="no attribute 'Grid'"):
        _ = federated.Grid
