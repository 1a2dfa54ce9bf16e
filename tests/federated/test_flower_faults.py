"""Invalid, late and missing replies on Flower: each is logged by node, and the run continues."""

from __future__ import annotations

import functools
import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from federated_rounds import same_bits
from flower_apps import MODULE, Classifier, Meddled, Suffixes, Wire, batches, initial, run
from flwr.app import Array, Message, RecordDict

from lora_ext.federated import LayerPlan, LocalGrid, LoraStrategy, make_client_app
from lora_ext.federated.flower import from_arrays, to_arrays

A2, B2 = MODULE.format(2, "A"), MODULE.format(2, "B")
CAPABILITY = {0: 1, 1: 1, 2: 2}


def npy(value: np.ndarray, pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, value, allow_pickle=pickle)
    return file.getvalue()


def federation(meddle: dict[int, Any], rounds: int = 1, **settings: Any):
    """Run a federation in which ``meddle`` maps nodes to functions that change their replies.
    Return the strategy and the final state."""
    app = Meddled(make_client_app(Classifier, batches), meddle)
    strategy = LoraStrategy(Suffixes(), **{"capability": CAPABILITY, **settings})
    result = run(strategy, LocalGrid(app, 3), rounds)
    return strategy, from_arrays(result.arrays)


def array(key: str, **fields: Any):
    """Return a function that sets fields of the array ``key`` of a reply."""

    def meddle(reply: Message) -> None:
        for name, value in fields.items():
            setattr(reply.content["lora"][key], name, value)

    return meddle


def tensor(key: str, value: np.ndarray | None, new_key: str | None = None):
    def meddle(reply: Message) -> None:
        record = reply.content["lora"]
        if value is None:
            del record[key]
        else:
            record[new_key or key] = Array(value)

    return meddle


def metrics(**values: Any):
    def meddle(reply: Message) -> None:
        record = reply.content["metrics"]
        for name, value in values.items():
            name = name.replace("_", "-")
            if value is None:
                del record[name]
            else:
                record[name] = value

    return meddle


def echo(**values: Any):
    def meddle(reply: Message) -> None:
        for name, value in values.items():
            reply.content["echo"][name.replace("_", "-")] = value

    return meddle


def without(record: str):
    def meddle(reply: Message) -> None:
        del reply.content[record]

    return meddle


class Loud:
    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


OBJECTS = npy(np.array([[Loud()] * 6] * 3, dtype=object), pickle=True)
ONES = np.ones((3, 6), np.float32)
NAN = np.full((3, 6), np.nan, np.float32)
FAULTS = {
    "one row is not broadcast": (
        tensor(A2, ONES[:1]),
        rf"{A2}: expected shape \[3, 6\], found shape \[1, 6\]",
    ),
    "a forged shape": (
        array(A2, shape=(1, 6)),
        rf"{A2}: shape: expected \[3, 6\] as in its bytes, found \[1, 6\]",
    ),
    "bytes of another shape than they are said to have": (
        array(A2, data=npy(ONES[:1])),
        rf"{A2}: shape: expected \[1, 6\] as in its bytes, found \[3, 6\]",
    ),
    "a forged dtype": (
        array(A2, dtype="float64"),
        rf"{A2}: dtype: expected float32 as in its bytes, found float64",
    ),
    "bits that are said to be bfloat16": (
        array(A2, dtype="bfloat16"),
        rf"{A2}: dtype: expected float32 as in its bytes, found uint16",
    ),
    "objects": (array(A2, data=OBJECTS), rf"{A2}: dtype: expected floating-point .*, found object"),
    "a pickle": (
        array(A2, stype="pickle"),
        rf"{A2}: expected stype 'numpy.ndarray', found 'pickle'",
    ),
    "no array": (array(A2, data=b"PK"), rf"{A2}: not a .npy file"),
    "integers": (tensor(A2, ONES.astype(np.int32)), rf"{A2}: dtype: expected .*, found int32"),
    "an unknown name": (
        tensor(A2, ONES, "x.lora_A.weight"),
        "x.lora_A.weight: expected a tensor of the plan, found another tensor",
    ),
    "outside the plan": (
        tensor(A2, ONES, MODULE.format(0, "A")),
        rf"{MODULE.format(0, 'A')}: expected a tensor of the plan",
    ),
    "half a pair": (tensor(B2, None), rf"{B2}: expected .* found none"),
    "NaN": (tensor(A2, NAN), rf"{A2}: expected finite values, found 18 that are not finite"),
    "no examples": (metrics(num_examples=0), "num-examples: expected a number above 0.* found 0"),
    "examples left out": (metrics(num_examples=None), "num-examples: expected .* found NoneType"),
    "a stale echo": (echo(server_round=0), "echo: expected round 1, found 0"),
    "an echo of another kind": (echo(server_round="1"), "echo: expected round 1, found '1'"),
    "another plan": (
        echo(layers=[1, 2]),
        r"echo: expected LayerPlan\(layers=\(2,\).* found LayerPlan\(layers=\(1, 2\)",
    ),
    "a plan that is none": (echo(layers=[2, 2]), "echo: expected .*: .*found 2 twice"),
    "ranks that nobody asked for": (echo(ranks=[1]), "echo: expected .* ranks=None.* ranks=.1,"),
    "no echo": (without("echo"), r"records: expected a record 'echo', found \['lora', 'metrics'\]"),
    "no arrays": (without("lora"), "records: expected a record 'lora'"),
    "no metrics": (without("metrics"), "records: expected a record 'metrics'"),
    "nothing at all": (
        lambda reply: setattr(reply, "content", RecordDict()),
        r"records: expected a record 'echo', found \[\]",
    ),
    "a manifest for arrays that are none": (
        echo(names=[A2], dtypes=["float32"], dims=[2], sizes=[3, 6]),
        "arrays: expected only 'packed'",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_invalid_reply_is_rejected_and_the_others_are_averaged(name):
    meddle, reason = FAULTS[name]
    rejections: list[Any] = []
    strategy, end = federation(
        {1: meddle}, on_reject=lambda round, client, why: rejections.append((round, client, why))
    )
    (log,) = strategy.history
    assert log.accepted == (0, 2) and not log.skipped
    assert set(log.rejected) == {1}
    assert re.search(rf"^node 1: .*{reason}", log.rejected[1]), log.rejected[1]
    assert rejections == [(1, 1, log.rejected[1])]
    assert same_bits(end, without_client_1()), "expected the state of a run without the client"


@functools.cache
def without_client_1() -> dict[str, torch.Tensor]:
    return federation({}, capability={0: 1, 1: 0, 2: 2})[1]


def test_exception_in_a_client_is_an_error_reply():
    def raising(partition: int):
        if partition == 1:
            raise OSError("disk failed")
        return batches(partition)

    for backend in ("loop", "batched"):
        strategy = LoraStrategy(Suffixes(), capability=CAPABILITY)
        app = make_client_app(Classifier, raising, backend=backend)
        end = from_arrays(run(strategy, LocalGrid(app, 3), rounds=1).arrays)
        (log,) = strategy.history
        reason = "node 1: reply: expected a reply without error, found error 2: "
        reason += "OSError: disk failed"
        assert log.accepted == (0, 2) and log.rejected == {1: reason}
        for key, value in without_client_1().items():
            assert (value - end[key]).abs().max() < 1e-6, f"{backend}: {key}"


def test_client_without_data_is_rejected_without_an_error():
    strategy = LoraStrategy(Suffixes(), capability=CAPABILITY)
    app = make_client_app(Classifier, lambda i: [] if i == 1 else batches(i))
    run(strategy, LocalGrid(app, 3), rounds=1)
    assert strategy.history[0].accepted == (0, 2)
    assert "num-examples: expected a number above 0" in strategy.history[0].rejected[1]


def test_too_few_replies_leave_the_adapter_unchanged_and_the_run_continues():
    start = to_arrays(initial())
    hashes = []
    strategy = LoraStrategy(Suffixes(), capability=CAPABILITY, min_replies=2)
    meddle = {0: metrics(num_examples=0), 1: lambda reply: None, 2: tensor(A2, ONES[:1])}
    fixed = {"round": 0}

    def bad_until_round_3(reply: Message) -> Any:
        fixed["round"] = reply.content["echo"]["server-round"]
        if fixed["round"] < 3:
            return meddle[reply.metadata.src_node_id](reply)

    app = Meddled(make_client_app(Classifier, batches), dict.fromkeys(range(3), bad_until_round_3))
    result = strategy.start(
        LocalGrid(app, 3),
        start,
        3,
        evaluate_fn=lambda _, arrays: hashes.append(arrays.object_id),
    )
    assert [log.skipped for log in strategy.history] == [True, True, False]
    assert strategy.history[0].reason == "replies: expected at least 2, found 1"
    assert hashes[:3] == [start.object_id] * 3 and hashes[3] != start.object_id
    assert result.arrays.object_id == hashes[3]
    assert list(result.train_metrics_clientapp) == [3]


def test_run_of_skipped_rounds_returns_the_initial_adapter():
    strategy = LoraStrategy(Suffixes(), capability=CAPABILITY)

    def raising(partition: int):
        raise OSError

    start = to_arrays(initial())
    result = strategy.start(LocalGrid(make_client_app(Classifier, raising), 3), start, 2)
    assert result.arrays.object_id == start.object_id
    assert [log.skipped for log in strategy.history] == [True, True]


class Clock:
    """Clock that only advances when a client trains."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_straggler_times_out_and_later_clients_are_not_started():
    clock, trained = Clock(), []

    def slow(partition: int):
        trained.append(partition)
        clock.now += 100.0 if partition == 1 and len(trained) < 3 else 1.0
        return batches(partition)

    late: list[Any] = []

    class Strategy(LoraStrategy):
        def timed_out(self, round, client, plan, seconds):
            late.append((round, client, plan, seconds))

    strategy = Strategy(Suffixes(), capability=CAPABILITY)
    grid = LocalGrid(make_client_app(Classifier, slow), 3, clock=clock)
    run(strategy, grid, rounds=2, timeout=30.0)
    first, second = strategy.history
    assert first.accepted == (0,) and trained == [0, 1, 0, 1, 2]
    reason = "node {0}: no reply within 30 s"
    assert first.rejected == {client: reason.format(client) for client in (1, 2)}
    assert late == [(1, 1, LayerPlan((2,)), 30.0), (1, 2, LayerPlan((1, 2)), 30.0)]
    assert second.accepted == (0, 1, 2), "expected that the next round uses the node again"


def test_late_reply_is_rejected_by_its_echo():
    kept: list[Message] = []

    def late(replies: list[Message]) -> list[Message]:
        kept.append(replies[1])
        return [replies[0], replies[2]] if len(kept) == 1 else [kept[0], *replies]

    strategy = LoraStrategy(Suffixes(), capability=CAPABILITY)
    rejections: list[Any] = []
    strategy.on_reject = lambda round, client, reason: rejections.append((round, client, reason))
    run(strategy, Wire(make_client_app(Classifier, batches), 3, late), rounds=2)
    assert [log.accepted for log in strategy.history] == [(0, 2), (0, 1, 2)]
    assert strategy.history[1].rejected == {}, "expected that the reply of this round is accepted"
    assert rejections[-1] == (2, 1, "node 1: echo: expected round 2, found 1")


@pytest.mark.parametrize("kind", ["equal", "another", "at another speed"])
def test_two_replies_of_a_node_are_accepted_only_if_equal(kind):
    def twice(replies: list[Message]) -> list[Message]:
        again = Message(
            RecordDict({name: r.copy() for name, r in replies[1].content.items()}),
            reply_to=Message(RecordDict(), 1, "train"),
        )
        if kind == "another":
            metrics(num_examples=7)(again)
        if kind == "at another speed":
            metrics(train_time_s=99.0)(again)
        return [*replies, again]

    strategy = LoraStrategy(Suffixes(), capability=CAPABILITY)
    run(strategy, Wire(make_client_app(Classifier, batches), 3, twice), rounds=1)
    (log,) = strategy.history
    assert log.accepted == ((0, 1, 2) if kind == "equal" else (0, 2))
    reason = "node 1: client 1: reply: expected one or equal replies, found two that differ"
    assert log.rejected == ({} if kind == "equal" else {1: reason})


def test_reply_of_a_node_that_received_no_message_is_rejected():
    strategy = LoraStrategy(Suffixes(), capability={0: 1, 1: 0, 2: 2})

    def stranger(replies: list[Message]) -> list[Message]:
        copy = Message(replies[0].content, reply_to=Message(RecordDict(), 1, "train"))
        return [*replies, copy]

    run(strategy, Wire(make_client_app(Classifier, batches), 3, stranger), rounds=1)
    (log,) = strategy.history
    reason = "node 1: reply: expected no reply, as no message was sent, found a reply"
    assert log.rejected == {"node 1": reason}
    assert log.accepted == (0, 2)


def test_order_of_replies_changes_no_bit():
    ends = [
        run(
            LoraStrategy(Suffixes(), capability=CAPABILITY),
            Wire(make_client_app(Classifier, batches), 3, order),
        ).arrays.object_id
        for order in (list, reversed, lambda replies: [replies[i] for i in (1, 2, 0)])
    ]
    assert len(set(ends)) == 1


def test_fortran_ordered_arrays_are_read_correctly():
    def turned(reply: Message) -> None:
        record = reply.content["lora"]
        for key in list(record):
            record[key] = Array(np.asfortranarray(record[key].numpy()))
            assert b"'fortran_order': True" in record[key].data

    _, end = federation({1: turned})
    _, plain = federation({})
    assert same_bits(end, plain)


def test_nan_never_enters_the_adapter():
    nan = {1: tensor(A2, NAN)}
    with pytest.raises(ValueError, match=f"client 1: {A2}: expected finite values"):
        federation(nan, nan_policy="raise")
    strategy, end = federation(nan, nan_policy="drop_tensor")
    assert strategy.history[0].accepted == (0, 1, 2)
    assert all(bool(value.isfinite().all()) for value in end.values())


def test_update_above_the_norm_bound_is_clipped_and_logged():
    strategy, _ = federation({1: tensor(A2, 1000 * ONES)}, max_update_norm=1.0)
    (log,) = strategy.history
    assert log.accepted == (0, 1, 2) and 0 < log.clipped[1] < 1e-3


def test_missing_modules_are_accepted_with_partial_ok():
    def half(reply: Message) -> None:
        for factor in "AB":
            del reply.content["lora"][MODULE.format(1, factor)]

    strategy, _ = federation({2: half}, partial_ok=True)
    assert strategy.history[0].accepted == (0, 1, 2) and strategy.history[0].uncovered == (0, 1)
