"""Sums of masked updates, divided by the weights, equal the mean of clients with the layer."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from federated_rounds import RANK, key, make_state, make_update, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_ext.federated import LayerPlan, aggregate, aggregate_masked, masked_payload


def summed(shares: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return functools.reduce(lambda x, y: {k: x[k] + y[k] for k in x}, shares)


@settings(max_examples=15, deadline=None)
@given(
    data=st.data(),
    server_lr=st.sampled_from([1.0, 0.4]),
    weighted_by=st.sampled_from(["num-examples", None]),
)
def test_sums_of_shares_give_the_covered_mean(data, server_lr: float, weighted_by: str | None):
    state = make_state()
    replies = []
    for i in range(data.draw(st.integers(1, 4))):
        layers = sorted(data.draw(st.sets(st.integers(0, 2), min_size=1)))
        ranks = [data.draw(st.integers(1, RANK)) for _ in layers]
        replies.append(make_update(i, layers, ranks, 1 + 10 * i))
    options = {"weighted_by": weighted_by, "max_update_norm": 5.0}
    shares = [masked_payload(state, reply, **options) for reply in replies]
    assert len({tuple((k, v.shape, v.dtype) for k, v in share.items()) for share in shares}) == 1
    found = aggregate_masked(state, summed(shares), server_lr=server_lr)
    wanted = aggregate(state, replies, server_lr=server_lr, **options)
    for k, value in wanted.state.items():
        assert (found[k] - value).abs().max() < 1e-12
        layer = int(k.split(".layers.")[1].split(".")[0])
        assert (found[k] is state[k]) == (layer in wanted.uncovered)


def test_float32_sums_equal_the_mean_up_to_rounding():
    state = make_state(dtype=torch.float32)
    replies = [make_update(i, examples=i, dtype=torch.float32) for i in (1, 2, 3)]
    share = masked_payload(state, replies[0])
    assert {v.dtype for v in share.values()} == {torch.float32}
    found = aggregate_masked(state, summed([masked_payload(state, r) for r in replies]))
    wanted = aggregate(state, replies).state
    assert all(torch.allclose(found[k], wanted[k], atol=1e-6) for k in state)


def test_share_is_zero_outside_the_plan():
    state = make_state()
    share = masked_payload(state, make_update(1, (1,), (2,), examples=10))
    assert share["layers.1.q.rank_weights"].tolist() == [10, 10, 0]
    assert share["layers.0.q.rank_weights"].tolist() == [0, 0, 0]
    assert not share[key(0, "A")].any()
    assert not share[key(1, "A")][2:].any()


def test_masked_payload_refuses_invalid_updates():
    state, bad = make_state(), make_update(1)
    bad.tensors[key(0, "A")] = torch.full((3, 5), math.nan)
    with pytest.raises(ValueError, match=r"^masked_payload: client 1: .*expected finite values"):
        masked_payload(state, bad)
    with pytest.raises(ValueError, match=r"plan.layers: expected layers among \[0, 1, 2\], found"):
        masked_payload(state, dataclasses.replace(make_update(1), plan=LayerPlan((5,))))


def test_invalid_sums_are_refused_and_change_nothing():
    state = make_state()
    before = {k: v.clone() for k, v in state.items()}
    sums = masked_payload(state, make_update(1))
    weights = "layers.0.q.rank_weights"
    for name, value, message in (
        (key(0, "A"), torch.ones(1, 5), r"expected shape \(3, 5\), found \(1, 5\)"),
        (key(0, "A"), torch.full((3, 5), math.inf), "expected finite floating-point values"),
        (key(0, "A"), torch.ones(3, 5, dtype=torch.int64), "expected finite floating-point values"),
        (weights, torch.tensor([-1.0, 1, 1]), "layers.0.q: expected weights of at least 0"),
        ("x", torch.ones(1), r"sums: expected exactly the names of 18 tensors, found .* \['x'"),
    ):
        with pytest.raises(ValueError, match=message):
            aggregate_masked(state, {**sums, name: value})
    del sums[weights]
    with pytest.raises(ValueError, match=r"missing or unknown names .'layers.0.q.rank_weights'"):
        aggregate_masked(state, sums)
    with pytest.raises(ValueError, match="server_lr: expected a finite number above 0, found 0"):
        aggregate_masked(state, sums, server_lr=0)
    assert same_bits(state, before)
