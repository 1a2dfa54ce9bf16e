"""Servers that restart, nodes that leave and return, and the names of clients of nodes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from federated_rounds import same_bits
from flower_apps import Classifier, Meddled, Suffixes, batches, initial, run
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from lora_ext.federated import LayerPlan, LocalGrid, LoraStrategy, make_client_app
from lora_ext.federated.flower import from_arrays

CAPABILITY = {0: 1, 1: 1, 2: 2}


class Drawn:
    """Allocator that samples layers with a random generator, whose state a restart must restore."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def plan(self, round: int, client: int | str, capability: int) -> LayerPlan:
        return LayerPlan(tuple(self.generator.permutation(3)[:capability].tolist()))

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.bit_generator.state = state["stream"]


def test_restarted_server_continues_bitwise():
    def make() -> LoraStrategy:
        return LoraStrategy(Drawn(), capability=lambda client: 1 + client % 2, fraction_train=0.7)

    app = make_client_app(Classifier, batches)
    whole = make()
    end = run(whole, LocalGrid(app, 4), rounds=5).arrays
    before = make()
    middle = run(before, LocalGrid(app, 4), rounds=2).arrays
    saved = json.loads(json.dumps(before.state_dict()))
    after = make()
    after.load_state_dict(saved)
    resumed = after.start(LocalGrid(app, 4), middle, 3).arrays
    assert resumed.object_id == end.object_id
    assert after.history == whole.history and [log.round for log in after.history] == [*range(1, 6)]
    assert after.comm.rows == whole.comm.rows
    assert len({log.accepted for log in whole.history}) > 1, "expected rounds to differ"


class Leaving(LocalGrid):
    """Grid without node 1 in the second and third call of ``get_node_ids``."""

    looks = 0

    def get_node_ids(self):
        self.looks += 1
        return [node for node in self.contexts if node != 1 or self.looks not in (2, 3)]


def test_node_that_leaves_and_returns_does_not_stop_the_run():
    strategy = LoraStrategy(Suffixes(), capability=CAPABILITY, min_available_nodes=3)
    run(strategy, Leaving(make_client_app(Classifier, batches), 3), rounds=4, timeout=5.0)
    assert [log.accepted for log in strategy.history] == [(0, 1, 2), (0, 2), (0, 2), (0, 1, 2)]


class Random(LocalGrid):
    """Grid with large random node ids, as in Flower. ``ids`` maps each id to its partition."""

    def __init__(self, app: Any, ids: dict[int, int | None]):
        super().__init__(app, len(ids))
        contexts = list(self.contexts.values())
        self.contexts = dict(zip(ids, contexts, strict=True))
        for (node, partition), context in zip(ids.items(), contexts, strict=True):
            context.node_id = node
            context.node_config = {} if partition is None else {"partition-id": partition}


BIG = 2**62


def test_client_is_named_by_its_partition_under_any_node_id():
    app = make_client_app(Classifier, lambda partition: batches(partition % 7))
    plain = LoraStrategy(Drawn(), capability=CAPABILITY)
    end = run(plain, LocalGrid(app, 3)).arrays.object_id
    strategy = LoraStrategy(Drawn(), capability=CAPABILITY)
    other = run(strategy, Random(app, {BIG + 5: 2, BIG: 0, BIG + 9: 1})).arrays.object_id
    assert other == end and strategy.history == plain.history


def test_client_that_returns_as_another_node_keeps_its_name():
    app = make_client_app(Classifier, batches)
    strategy = LoraStrategy(Suffixes(), capability={0: 1, 1: 2})
    middle = run(strategy, Random(app, {BIG: 0, BIG + 1: 1}), rounds=1).arrays
    strategy.start(Random(app, {BIG: 0, BIG + 2: 1}), middle, 1)
    assert [log.accepted for log in strategy.history] == [(0, 1), (0, 1)]
    assert [log.plans[1] for log in strategy.history] == [LayerPlan((1, 2))] * 2


def test_duplicate_and_invalid_partitions_are_replaced_by_node_ids():
    app = make_client_app(Classifier, lambda partition: batches(partition % 7))
    strategy = LoraStrategy(Suffixes())
    run(strategy, Random(app, {BIG: 0, BIG + 1: 0, BIG + 2: None, BIG + 3: -1}), rounds=1)
    assert strategy.history[0].accepted == (0, BIG + 1, BIG + 2, BIG + 3)


def test_bfloat16_is_sent_as_bits_and_stays_bfloat16():
    start = {key: value.bfloat16() for key, value in initial().items()}
    seen: list[Any] = []

    def bits(reply: Message) -> None:
        seen.extend(reply.content["lora"].values())

    def half() -> torch.nn.Module:
        return Classifier().bfloat16()

    app = make_client_app(half, lambda i: [(x.bfloat16(), y) for x, y in batches(i)])
    strategy = LoraStrategy(Suffixes(), capability=CAPABILITY)
    result = run(strategy, LocalGrid(Meddled(app, {1: bits}), 3), rounds=1, state=start)
    assert strategy.history[0].accepted == (0, 1, 2)
    assert {array.dtype for array in seen} == {"bfloat16"}
    assert {array.numpy().dtype.name for array in seen} == {"uint16"}
    end = from_arrays(result.arrays)
    assert {value.dtype for value in end.values()} == {torch.bfloat16}
    assert all(bool(value.isfinite().all()) for value in end.values())
    assert not same_bits(end, start)


def test_error_sent_by_the_server_names_the_lost_node():
    # Flower's server has node id 1, which may also be the name of a client.
    class Lossy(Random):
        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            replies = list(super().send_and_receive(messages, timeout=timeout))
            if not messages or messages[0].metadata.message_type != "train":
                return replies
            lost = Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=messages[2])
            lost.metadata.__dict__["_src_node_id"] = 1
            return [*replies[:2], lost]

    late: list[Any] = []

    class Strategy(LoraStrategy):
        def timed_out(self, round, client, plan, seconds):
            late.append((round, client, seconds))

    strategy = Strategy(Suffixes(), capability=CAPABILITY)
    grid = Lossy(make_client_app(Classifier, batches), {BIG: 0, BIG + 1: 1, BIG + 2: 2})
    run(strategy, grid, rounds=1, timeout=9.0)
    (log,) = strategy.history
    assert log.accepted == (0, 1) and late == [(1, 2, 9.0)]
    reason = "reply: expected a reply without error, found error 5: gone"
    assert log.rejected == {2: f"node {BIG + 2}: {reason}"}


def test_custom_app_is_named_by_the_partition_in_its_echo_unless_taken():
    inner = make_client_app(Classifier, lambda partition: batches(partition % 7))
    own = ClientApp()  # an app that does not answer queries

    @own.train()
    def train(message: Message, context: Context) -> Message:
        reply = inner(message, context)
        if context.node_id in (BIG + 1, BIG + 2):
            reply.content["echo"]["partition-id"] = 5
        return reply

    strategy = LoraStrategy(Suffixes())
    run(strategy, Random(own, {BIG: None, BIG + 1: None, BIG + 2: None}), rounds=2)
    assert strategy.history[0].accepted == (BIG, BIG + 1, BIG + 2)
    assert strategy.history[1].accepted == (5, BIG, BIG + 2)
