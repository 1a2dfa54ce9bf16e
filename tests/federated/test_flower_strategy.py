"""`LoraStrategy` for Flower: its messages to clients, and its hooks for subclasses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from federated_rounds import same_bits
from flower_apps import Classifier, Meddled, Suffixes, batches, initial, run
from flwr.app import ConfigRecord, Message
from scripts import load_script

from lora_ext.federated import LayerPlan, LocalGrid, LoraStrategy, make_client_app
from lora_ext.federated.flower import from_arrays, to_arrays

MOST_STAYS = 10  # maximum number of files through which the calls of a round may pass


def local(nodes: int = 3, **settings: Any) -> LocalGrid:
    return LocalGrid(make_client_app(Classifier, batches, **settings), nodes)


def test_run_changes_only_the_trained_layers():
    strategy = LoraStrategy(Suffixes(), capability={0: 1, 1: 1, 2: 2})
    end = from_arrays(run(strategy, local()).arrays)
    start = initial()
    moved = {key for key in end if not same_bits({key: end[key]}, {key: start[key]})}
    assert moved == {key for key in end if ".layers.0." not in key}
    last = strategy.history[-1]
    assert (last.round, last.accepted, last.rejected, last.heights) == (2, (0, 1, 2), {}, (0, 1, 3))
    assert last.uncovered == (0,)


@pytest.mark.parametrize("payload", ["sliced", "dense_masked"])
def test_calls_of_a_round_visit_few_files(monkeypatch: pytest.MonkeyPatch, payload: str):
    ways = load_script(monkeypatch, "tests/serving", "test_ways")
    monkeypatch.setattr(ways, "ROOMS", ("federated", "adapter", "layers", "rows"))
    strategy, grid = LoraStrategy(Suffixes(), payload=payload), local()
    arrays = to_arrays(initial())
    with ways.Way(lambda _: True) as asking:
        sent = list(strategy.configure_train(1, arrays, ConfigRecord({}), grid))
    replies = list(grid.send_and_receive(sent))
    with ways.Way(lambda _: True) as averaging:
        strategy.aggregate_train(1, replies)
    assert strategy.history[0].accepted == (0, 1, 2)
    for way in (asking, averaging):
        assert not way.climbs | way.returns
        assert 1 < len(way.stays) <= MOST_STAYS, " ".join(way.stays)


def test_batched_backend_equals_the_loop():
    ends = []
    for backend in ("loop", "batched"):
        strategy = LoraStrategy(Suffixes(), capability={0: 1, 1: 2, 2: 3})
        ends.append(from_arrays(run(strategy, local(backend=backend)).arrays))
    for key, value in ends[0].items():
        assert (value - ends[1][key]).abs().max() < 1e-5, key


class Hooks(LoraStrategy):
    """Strategy that plans all clients together and records all calls of its hooks."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.calls: list[tuple[Any, ...]] = []

    def before_round(self, round, state):
        self.calls.append(("before", round, sorted(state) == sorted(initial())))

    def plan_round(self, round, clients):
        self.calls.append(("plan", round, dict(clients)))
        return {client: LayerPlan((round % 3,)) for client in clients if client != 1}

    def observe(self, round, client, plan, metrics):
        known = {"train-time-s", "down-time-s", "bytes", "num-examples", "train-loss"}
        self.calls.append(("observe", round, client, plan, known <= set(metrics)))
        assert metrics["bytes"] == 4 * 2 * 3 * 6  # A and B of one module, float32

    def timed_out(self, round, client, plan, seconds):
        self.calls.append(("late", round, client, plan, seconds))


def test_subclass_can_plan_all_clients_and_observes_every_reply():
    strategy = Hooks()
    run(strategy, local(), rounds=2)
    assert strategy.calls == [
        call
        for round in (1, 2)
        for call in (
            ("before", round, True),
            ("plan", round, {0: 3, 1: 3, 2: 3}),
            ("observe", round, 0, LayerPlan((round,)), True),
            ("observe", round, 2, LayerPlan((round,)), True),
        )
    ]


class Shrinking(LoraStrategy):
    """Strategy that gives the last layer rank 1 from round 2 on."""

    def before_round(self, round, state):
        if round == 2:
            cut = {
                key: value[:1] if "lora_A" in key else value[:, :1] for key, value in state.items()
            }
            return {k: cut[k] if ".layers.2." in k else v for k, v in state.items()}


@pytest.mark.parametrize("pack", [False, True])
def test_ranks_may_change_between_rounds(pack):
    # The model of a client has the largest rank; it is trained with the rank of the plan.
    ends = []
    for backend in ("loop", "batched"):
        strategy = Shrinking(Suffixes(), capability={0: 0, 1: 1, 2: 2}, pack=pack)
        ends.append(from_arrays(run(strategy, local(backend=backend), rounds=3).arrays))
        assert [log.accepted for log in strategy.history] == [(1, 2)] * 3
    ranks = {k.split(".")[3]: v.shape[0] for k, v in ends[0].items() if "lora_A" in k}
    assert ranks == {"0": 3, "1": 3, "2": 1}
    for key, value in ends[0].items():
        assert (value - ends[1][key]).abs().max() < 1e-5, key


def test_global_adapter_of_a_larger_rank_is_an_error_reply():
    state = {
        key: torch.cat([value, value], 0 if "lora_A" in key else 1)
        for key, value in initial().items()
    }
    strategy = LoraStrategy(Suffixes())
    run(strategy, local(1), rounds=1, state=state)
    assert "expected shape [3, 6], found shape [6, 6]" in strategy.history[0].rejected[0]


def test_strategy_without_an_allocator_raises():
    with pytest.raises(ValueError, match="allocator: expected an allocator, or a subclass"):
        run(LoraStrategy(), local())


@pytest.mark.parametrize("trained_in", ["loop", "batched"])
def test_client_with_another_scale_is_an_error_reply(trained_in):
    for scaling, accepted in ((2 / 3, (0,)), (1.0, ())):  # 2 / 3 is alpha / rank.
        strategy = LoraStrategy(Suffixes(), scaling=scaling)
        run(strategy, local(1, backend=trained_in), rounds=1)
        assert strategy.history[0].accepted == accepted
    reason = "message: scaling of layers.0: expected 1, found 0.666667"
    assert reason in strategy.history[0].rejected[0]


def test_random_numbers_of_a_client_depend_only_on_seed_round_and_client():
    def replies_of_1(nodes: int, seed: int = 0) -> list[str]:
        seen: list[str] = []

        def look(reply: Message) -> None:
            seen.append(reply.content["lora"].object_id)

        app = Meddled(make_client_app(lambda: Classifier(0.5), batches), {1: look})
        capability = {node: 1 if nodes > 2 else node for node in range(nodes)}
        strategy = LoraStrategy(Suffixes(), capability=capability, seed=seed, server_lr=1e-9)
        run(strategy, LocalGrid(app, nodes), rounds=2)
        return seen

    alone, among = replies_of_1(2), replies_of_1(4)
    assert alone[0] == among[0], "expected the same adapter in both runs"
    assert alone[0] != alone[1] and alone[0] != replies_of_1(2, seed=1)[0]
