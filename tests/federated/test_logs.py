"""Logs: sums of bytes, entries per round, and their JSON representation."""

from __future__ import annotations

import json

import pytest
import torch
from federated_rounds import key, make_state, make_update

from lora_ext.federated import CommLog, CommRow, LayerPlan, RoundLog, aggregate, pack_tensors


def test_bytes_are_summed_by_round_and_over_rounds():
    log = CommLog()
    log.record(1, 7, down=100, frames=10, full=300)
    log.record(1, "b", up=30, down=100)
    log.record(1, 7, up=50, frames=5)  # the reply of client 7
    log.record(2, 7, up=20, full=100)
    assert log.rows == [
        CommRow(1, 7, 50, 100, 15, 300),
        CommRow(1, "b", 30, 100, 0, 0),
        CommRow(2, 7, 20, 0, 0, 100),
    ]
    assert (log.total(), log.total("down"), log.total("frames", 1)) == (100, 200, 15)
    assert log.cumulative("up") == {1: 80, 2: 100}
    assert log.share == 300 / 400
    again = CommLog()
    assert again.share == 0
    again.load_state_dict(json.loads(json.dumps(log.state_dict())))
    assert again.rows == log.rows


def test_invalid_byte_counts_are_refused_and_change_nothing():
    log = CommLog()
    log.record(1, 7, up=3)
    with pytest.raises(ValueError, match=r"CommLog.record: down: expected bytes from 0, found -1"):
        log.record(1, 7, up=1, down=-1)
    with pytest.raises(TypeError, match=r"CommLog.record: up: expected an int, found 1.5"):
        log.record(1, 7, up=1.5)
    with pytest.raises(ValueError, match=r"CommLog.total: name: expected .*'full'.*, found side"):
        log.total("side")
    with pytest.raises(ValueError, match="rows: expected six entries"):
        log.load_state_dict({"rows": [[1, 7, 3]]})
    assert log.rows == [CommRow(1, 7, up=3)]


def test_round_log_round_trips_through_json():
    state = make_state()
    bad = make_update(9)
    bad.tensors[key(0, "A")] = torch.ones(1, 5)
    replies = [make_update(1, (0, 2), (1, 2)), make_update("b", (2,)), bad]
    plans = {reply.client: reply.plan for reply in replies}
    result = aggregate(state, replies, max_update_norm=0.5)
    entry = RoundLog.of(3, plans, result, num_layers=3)
    assert entry.heights == (1, 0, 2)
    assert (entry.accepted, entry.uncovered, set(entry.rejected)) == ((1, "b"), (1,), {9})
    assert set(entry.clipped) == {1, "b"}
    plain = entry.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert RoundLog.from_dict(plain) == entry
    skipped = RoundLog.of(4, {1: LayerPlan((0,))}, aggregate(state, []), 3)
    assert skipped.skipped
    assert RoundLog.from_dict(json.loads(json.dumps(skipped.to_dict()))) == skipped


def test_flat_message_has_one_array():
    tensors = make_update(1).tensors
    assert len(pack_tensors(tensors, flat=True).arrays) == 1
    assert len(pack_tensors(tensors).arrays) == len(tensors)
