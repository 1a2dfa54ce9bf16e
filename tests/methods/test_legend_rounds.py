"""Rounds without Flower: plans from estimates, estimates from reports, and aggregation."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from federated_rounds import bits, key, make_state, make_update

from lora_ext.federated import LayerPlan, aggregate
from lora_ext.methods.legend import (
    CapacityReport,
    Estimate,
    LegendAllocator,
    LegendConfig,
    SimulatedClock,
    layer_bytes,
    resize_state,
)

L = 12
SPEEDS = {0: Estimate(1.0, 0.1, 1e-6), 1: Estimate(1.0, 0.1, 1e-6), 2: Estimate(1.2, 0.12, 1e-6)}
SIZES = [1000.0 * (17 + layer) for layer in range(L)]


def allocator(config: LegendConfig | None = None, **settings) -> LegendAllocator:
    return LegendAllocator(config or LegendConfig(total=270), SIZES, **settings)


def report(device: int, plan: LayerPlan, factor: float = 1.0) -> dict[str, float]:
    speed, size = SPEEDS[device], sum(SIZES[layer] for layer in plan.layers)
    train = factor * (speed.f + len(plan.layers) * speed.mu)
    return {"train-time-s": train, "down-time-s": speed.beta * size / 2, "bytes": size}


def play(one: LegendAllocator, rounds: range, factor=lambda device, round: 1.0) -> list[list[int]]:
    """Run rounds; return the depth of every device in each round.

    A device's training time is multiplied by ``factor(device, round)``.
    """
    depths = []
    for round in rounds:
        plans = one.plan_round(round, dict.fromkeys(SPEEDS, L))
        depths.append([len(plans[device].layers) for device in SPEEDS])
        for device, plan in plans.items():
            one.observe(round, device, plan, report(device, plan, factor(device, round)))
    return depths


def test_devices_are_probed_twice_and_then_finish_together():
    one = allocator()
    depths = play(one, range(1, 6))
    assert depths == [[12] * 3, [6] * 3, [12, 12, 8], [12, 12, 8], [12, 12, 8]]
    assert one.tracker.estimate(2)[:3] == pytest.approx(SPEEDS[2][:3], rel=1e-3)
    assert one.last is not None
    assert one.last.waiting < 0.1
    plan = one.plan_round(6, dict.fromkeys(SPEEDS, L))[2]
    assert plan == LayerPlan(tuple(range(4, 12)), tuple(range(21, 29)))


def test_depth_of_a_device_falls_when_it_slows_down_and_recovers():
    depths = play(allocator(), range(1, 90), lambda d, r: 10.0 if d == 0 and 20 <= r < 40 else 1.0)
    first = [each[0] for each in depths]
    assert set(first[15:20]) == {12}  # rounds 16 to 20; round 20 is slow, but its plan is older
    assert first[20] < 12
    assert first[30] == 1  # after ten more slow rounds
    back = next(i for i in range(39, 80) if first[i] >= 11)
    assert back - 39 <= 40
    assert min(first[back:]) >= 11
    assert max(abs(a - b) for a, b in itertools.pairwise(first[2:])) <= 3


def test_device_at_constant_depth_periodically_tries_one_more_layer():
    slow = {2: Estimate(1.0, 1.0, 1e-6)}
    one = allocator(LegendConfig(total=270, warmup="prior", explore_every=4), prior=SPEEDS | slow)
    found = []
    for round in range(1, 17):
        plans = one.plan_round(round, dict.fromkeys(SPEEDS, L))
        found.append(len(plans[2].layers))
        metrics = {"train-time-s": 1.0 + found[-1], "down-time-s": 0.01, "bytes": 1e4}
        one.observe(round, 2, plans[2], metrics)
    assert [found[4], found[9], found[14]] == [2, 2, 2]
    assert found.count(1) == 13


def test_three_invalid_reports_in_a_row_lower_the_depth_to_the_least():
    one = allocator(LegendConfig(total=270, k_min=2))
    play(one, range(1, 7))
    before = one.tracker.estimate(0)
    for round in range(7, 10):
        plan = one.plan_round(round, dict.fromkeys(SPEEDS, L))[0]
        assert len(plan.layers) == 12
        one.observe(round, 0, plan, {"train-time-s": math.nan})
    assert one.tracker.estimate(0)[:3] == before[:3]
    # The depth falls immediately, regardless of max_step.
    assert one.plan(10, 0, L).layers == (10, 11)
    one.observe(10, 0, LayerPlan((10, 11)), report(0, LayerPlan((10, 11))))
    # max_step applies again to a rising depth.
    assert len(one.plan_round(11, dict.fromkeys(SPEEDS, L))[0].layers) == 5


def test_device_without_times_is_probed_at_the_least_depth():
    one = allocator()
    for round, depth in ((1, 12), (2, 6), (3, 12), (4, 1), (5, 1)):
        plan = one.plan(round, 0, L)
        assert len(plan.layers) == depth
        one.observe(round, 0, plan, {})


def test_timeouts_lower_the_depth_and_the_third_one_pauses_the_device():
    one = allocator(LegendConfig(total=270, cooldown=2))
    play(one, range(1, 6))
    depths = []
    for round in range(6, 12):
        plans = one.plan_round(round, dict.fromkeys(SPEEDS, L))
        depths.append(len(plans[0].layers) if 0 in plans else None)
        if 0 in plans:
            one.timed_out(round, 0, plans[0], 30.0)
    assert depths == [12, 1, 1, None, None, 1]
    one.tracker.update_timeout(0, 1, 30.0, 11)
    one.tracker.update_timeout(0, 1, 30.0, 11)
    rest = one.plan(12, 0, L)
    assert rest == LayerPlan(())
    with pytest.raises(ValueError, match=r"at least one layer, found none: device is paused"):
        one.observe(12, 0, rest, {"train-time-s": 1.0})
    with pytest.raises(ValueError, match=r"plan: expected at least one layer"):
        one.timed_out(12, 0, rest, 30.0)


def test_depths_are_recomputed_every_n_rounds():
    one = allocator(LegendConfig(total=270, every=4, max_step=12))
    depths = play(one, range(1, 13), lambda d, r: 10.0 if d == 2 and r == 6 else 1.0)
    assert [each[2] for each in depths] == [12, 6, *[8] * 10]
    # After ten rounds at depth 8, round 13 tries one more layer, once.
    assert [each[2] for each in play(one, range(13, 18))] == [9, 8, 8, 8, 8]
    steady = allocator(LegendConfig(total=270, every=4, max_step=12))
    slow = play(steady, range(1, 14), lambda d, r: 10.0 if d == 2 and r >= 6 else 1.0)
    assert [each[2] for each in slow] == [12, 6, 8, 8, 8, 8, 8, 8, 1, 1, 1, 1, 1]


def test_client_limits_bound_probes_and_plans():
    one = allocator()
    for round in (1, 2, 3, 4):
        plans = one.plan_round(round, {0: 3, 1: 12})
        assert len(plans[0].layers) <= 3
        for device, plan in plans.items():
            one.observe(round, device, plan, report(device, plan))
    assert len(plans[0].layers) == 3
    with pytest.raises(ValueError, match=r"limits\[0\]: expected an integer from 2, found 1"):
        allocator(LegendConfig(total=270, k_min=2, warmup="prior"), prior=SPEEDS).plan_round(
            1, {0: 1}
        )


def test_depth_as_count_selects_layers_by_a_function():
    calls = []

    def draw(count: int, round: int, client: int | str) -> tuple[int, ...]:
        calls.append((count, round, client))
        return tuple(reversed(range(count)))

    config = LegendConfig(total=270, warmup="prior", depth_as_count=True)
    one = allocator(config, prior=SPEEDS, draw=draw)
    plans = one.plan_round(1, dict.fromkeys(SPEEDS, L))
    assert calls == [(12, 1, 0), (12, 1, 1), (8, 1, 2)]
    assert plans[2] == LayerPlan(tuple(range(8)), tuple(range(17, 25)))
    # The backward runs through all twelve blocks, so the time is that of depth 12.
    before = one.tracker.estimate(2)
    one.observe(1, 2, plans[2], {**report(2, LayerPlan(tuple(range(12)))), "bytes": sum(SIZES)})
    assert one.tracker.estimate(2) == pytest.approx(before)
    for settings in ({"draw": draw}, {}):
        wrong = LegendConfig(total=270, depth_as_count=not settings)
        with pytest.raises(ValueError, match=r"draw: expected .* with depth_as_count="):
            allocator(wrong, **settings)


def test_restored_allocator_continues_with_the_same_plans():
    one, other = allocator(), allocator()
    play(one, range(1, 8))
    one.timed_out(8, 2, LayerPlan((11,)), 60.0)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert play(one, range(9, 20)) == play(other, range(9, 20))
    assert one.state_dict() == other.state_dict()


def test_state_keeps_the_order_of_clients():
    one, names = allocator(), [f"client {i}" for i in range(9, 0, -1)]
    one.plan_round(1, dict.fromkeys(names, L))
    assert [name for name, _ in one.state_dict()["probes"]] == names


def test_allocator_reads_ranks_and_bytes_from_the_adapter():
    state = make_state(layers=3, rank=2)
    one = LegendAllocator.of(LegendConfig(), state)
    assert one.ranks == (2, 2, 2)
    assert one.configurator.bytes_per_layer == layer_bytes(state, (2, 2, 2))
    config = LegendConfig(total=6)
    with pytest.raises(
        ValueError, match=r"state: expected ranks \(1, 2, 3\) \(use resize_state\), found"
    ):
        LegendAllocator.of(config, state)
    assert LegendAllocator.of(config, resize_state(state, config.ranks(3))[0]).ranks == (1, 2, 3)
    state[key(1, "A", "v")], state[key(1, "B", "v")] = torch.zeros(3, 5), torch.zeros(4, 3)
    with pytest.raises(
        ValueError, match=r"layers\.1\.v: expected rank 2, its layer's rank, found 3"
    ):
        LegendAllocator.of(LegendConfig(), state)


def test_prior_speeds_are_required_by_the_prior_warmup():
    config = LegendConfig(total=270, warmup="prior")
    with pytest.raises(ValueError, match="prior: expected speeds of the devices"):
        allocator(config)
    with pytest.raises(ValueError, match="prior: expected the speeds of device 9, found none"):
        allocator(config, prior=SPEEDS).plan_round(1, {9: 12})


# -------------------------------------------------------------------------------------------------
# Aggregation


def test_layer_is_the_mean_of_devices_that_train_it():
    state = make_state(layers=3)
    updates = [
        make_update(device, range(3 - depth, 3), examples=examples)
        for device, depth, examples in ((1, 1, 10), (2, 2, 30), (3, 3, 60))
    ]
    found = aggregate(state, updates).state
    for layer, of in ((0, (3,)), (1, (2, 3)), (2, (1, 2, 3))):
        for name in (key(layer, "A"), key(layer, "B", "v")):
            parts = [(u.num_examples, u.tensors[name]) for u in updates if u.client in of]
            mean = sum(w * t for w, t in parts) / sum(w for w, _ in parts)
            assert torch.allclose(found[name], state[name] + mean, rtol=0, atol=1e-15)
    deep = updates[2].tensors[key(0, "A")]
    assert torch.equal(found[key(0, "A")], state[key(0, "A")] + deep)


def test_untrained_layers_keep_every_bit():
    state = make_state(layers=3)
    found = aggregate(state, [make_update(1, (2,)), make_update(2, (1, 2))])
    assert found.uncovered == (0,)
    assert torch.equal(bits(found.state[key(0, "A")]), bits(state[key(0, "A")]))


def test_reply_with_ranks_from_before_a_resize_is_rejected():
    state, _ = resize_state(make_state(layers=3), (2, 2, 2))
    old = make_update(1, (1, 2))
    found = aggregate(state, [old, make_update(2, (2,), ranks=(2,))])
    assert found.accepted == (2,)
    assert "rank" in found.rejected[1] or "shape" in found.rejected[1]


# -------------------------------------------------------------------------------------------------
# Simulated clock


def test_clock_adds_the_time_of_the_slowest_device_per_round():
    state = make_state(layers=3)  # float64, 2 modules of rank 3
    each = 8 * 2 * 3 * 9
    speeds = {"slow": Estimate(1.0, 0.5, 1e-3), "fast": Estimate(1.0, 0.0, 0.0)}
    clock = SimulatedClock(speeds, state)
    plans = {"slow": LayerPlan((2,)), "fast": LayerPlan((0, 1, 2))}
    round = clock.advance(plans)
    assert round.times == pytest.approx({"slow": 1.5 + 1e-3 * each, "fast": 1.0})
    assert round.waiting == pytest.approx((round.seconds - 1.0) / 2)
    clock.advance({"slow": LayerPlan((0,), ranks=(1,))})  # the backward runs down to layer 0
    assert clock.seconds == pytest.approx(round.seconds + 2.5 + 1e-3 * each / 3)
    assert clock.advance({}) == ({}, 0.0, 0.0)
    expected = CapacityReport("slow", 1, 1.5, 1e-3 * each / 2, each, 1e-3 * each / 2)
    assert clock.report("slow", plans["slow"]) == pytest.approx(expected)
    frozen = SimulatedClock(speeds, state, send_frozen=True).report("slow", plans["slow"])
    assert frozen.down_time == pytest.approx(3e-3 * each / 2)


def test_kept_depths_obey_a_limit_that_falls():
    one = allocator(LegendConfig(total=270, every=4))
    play(one, range(1, 6))
    plans = one.plan_round(6, {0: 3, 1: L, 2: L})  # round 5 computed the depths, round 6 keeps them
    assert [len(plans[device].layers) for device in SPEEDS] == [3, 12, 8]


def test_probes_obey_the_memory_of_their_device():
    one = allocator(memory={0: 50.0}, mem=lambda k: 10.0 * k)
    assert play(one, range(1, 3)) == [[5, 12, 12], [5, 6, 6]]
    small = allocator(LegendConfig(total=270, k_min=6), memory={0: 50.0}, mem=lambda k: 10.0 * k)
    with pytest.raises(ValueError, match=r"at least 60.0 bytes, which depth 6 needs"):
        small.plan_round(1, dict.fromkeys(SPEEDS, L))
    with pytest.raises(ValueError, match=r"limits\[1\]: expected an integer from 6, found 5"):
        small.plan_round(1, {1: 5})
