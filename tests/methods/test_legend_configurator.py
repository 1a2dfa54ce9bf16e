"""Depths that let devices finish together: known results, properties, limits and errors."""

from __future__ import annotations

import itertools
import math
import random
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_ext.federated import LayerPlan
from lora_ext.methods.legend import Estimate, LegendConfigurator, waiting_time

RANKS = tuple(range(1, 13))
KINDS = (Estimate(1, 0.1, 0.01), Estimate(1.2, 0.2, 0.02), Estimate(1.5, 0.4, 0.05))
TWELVE = dict(enumerate([KINDS[0]] * 2 + [KINDS[1]] * 4 + [KINDS[2]] * 6))


def configurator(L: int = 12, **fields) -> LegendConfigurator:
    ranks = tuple(range(1, L + 1))
    return LegendConfigurator(L, fields.pop("bytes_per_layer", ranks), ranks=ranks, **fields)


def time_of(estimate: Estimate, depth: int, sizes=RANKS) -> float:
    return estimate.f + depth * estimate.mu + estimate.beta * sum(sizes[len(sizes) - depth :])


def test_depths_of_twelve_devices_equal_known_ones():
    found = configurator().configure(TWELVE, range(12))
    assert found.target == pytest.approx(2.98)
    assert list(found.depths.values()) == [12, 12, 4, 4, 4, 4, 1, 1, 1, 1, 1, 1]
    assert [found.times[i] for i in (0, 2, 6)] == pytest.approx([2.98, 2.84, 2.50])
    assert found.waiting == pytest.approx(0.2867, abs=5e-5)
    assert found.seconds == pytest.approx(2.98)
    assert found.bytes == 396  # At full depth, 936 bytes would be sent.
    assert found[2] == LayerPlan((8, 9, 10, 11), (9, 10, 11, 12))
    assert (found.over_target, found.uncovered, found.raised) == ((), (), None)
    full = [time_of(estimate, 12) for estimate in TWELVE.values()]
    assert max(full) == pytest.approx(10.20)
    assert waiting_time(full) == pytest.approx(2.8833, abs=5e-5)


@pytest.mark.parametrize("mode", ["fastest", "balanced"])
@pytest.mark.parametrize(
    "estimates",
    [
        {7: Estimate(3, 1, 0.5)},  # a single device
        dict.fromkeys(range(5), Estimate(1, 0.3, 0.01)),  # equal devices
        {0: Estimate(1, 0, 0), 1: Estimate(1, 0, 0)},  # layers cost no time
    ],
)
def test_all_layers_train_if_no_device_waits(mode: str, estimates: dict[int, Estimate]):
    found = configurator(mode=mode).configure(estimates, estimates)
    assert set(found.depths.values()) == {12}
    assert found.waiting == 0


@pytest.mark.parametrize("mode", ["fastest", "balanced", "utility"])
def test_late_device_trains_layers_that_cost_no_time(mode: str):
    estimates = {0: Estimate(1, 0, 0), 1: Estimate(2, 0, 0), 2: Estimate(2, 0.1, 0)}
    found = configurator(mode=mode).configure(estimates, [0, 1])
    assert found.depths == {0: 12, 1: 12}
    late = configurator(deadline=1.5).configure(estimates, estimates)
    assert (late.depths, late.over_target) == ({0: 12, 1: 12, 2: 1}, (1, 2))


def test_balanced_mode_fills_the_time_of_the_slowest_device():
    found = configurator(mode="balanced", k_min=3).configure(TWELVE, range(12))
    # 1.5 + 3 * .4 + .05 * 33, the time of the slowest device.
    assert found.target == pytest.approx(4.35)
    assert list(found.depths.values()) == [12] * 2 + [8] * 4 + [3] * 6
    assert not found.over_target
    fastest = configurator(k_min=3).configure(TWELVE, range(12))
    assert fastest.over_target == tuple(range(6, 12))


devices = st.lists(
    st.tuples(*(st.floats(0.01, 3) for _ in range(3))).map(lambda e: Estimate(*e)),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(devices, st.integers(1, 6), st.data())
def test_depths_are_the_largest_within_the_target(found, L: int, data: st.DataObject):
    k_min = data.draw(st.integers(1, L))
    mode = data.draw(st.sampled_from(["fastest", "utility", "balanced"]))
    result = configurator(L, k_min=k_min, mode=mode).configure(
        dict(enumerate(found)), range(len(found))
    )
    ranks = range(1, L + 1)
    best = None
    for depths in itertools.product(range(k_min, L + 1), repeat=len(found)):
        times = [time_of(e, k, ranks) for e, k in zip(found, depths, strict=True)]
        late = [
            t > result.target * (1 + 1e-9) and k > k_min for t, k in zip(times, depths, strict=True)
        ]
        if not any(late) and (best is None or depths > best):
            best = depths if best is None else tuple(map(max, best, depths))
    assert tuple(result.depths.values()) == best


@settings(deadline=None, max_examples=60)
@given(devices, st.integers(1, 6))
def test_utility_mode_minimises_time_per_trained_rank(found, L: int):
    result = configurator(L, mode="utility").configure(dict(enumerate(found)), range(len(found)))
    ranks = range(1, L + 1)

    def cost(depths) -> float:
        seconds = max(time_of(e, k, ranks) for e, k in zip(found, depths, strict=True))
        return seconds / sum(sum(ranks[L - k :]) for k in depths)

    taus = sorted({time_of(e, k, ranks) for e in found for k in range(1, L + 1)})
    each = [
        [max([k for k in range(1, L + 1) if time_of(e, k, ranks) <= tau], default=1) for e in found]
        for tau in taus
    ]
    assert cost(result.depths.values()) == pytest.approx(min(map(cost, each)))


def test_utility_mode_weights_devices_by_their_data():
    estimates = {0: Estimate(1, 0.1, 0), 1: Estimate(1, 1, 0)}
    chosen = [
        configurator(3, mode="utility", shares={0: p, 1: 1 - p}).configure(estimates, (0, 1)).depths
        for p in (0.99, 0.01)
    ]
    # Seconds per trained rank: 2 / 5.97 and 3 / 5.99 for p = 0.99; 2 / 3.03, 3 / 5.01 and 4 / 6
    # for p = 0.01.
    assert chosen == [{0: 3, 1: 1}, {0: 3, 1: 2}]


@given(
    st.tuples(*(st.floats(0, 3) for _ in range(3))),
    st.tuples(*(st.floats(0, 1) for _ in range(3))),
    st.floats(0.1, 20),
)
def test_depth_decreases_with_time_and_increases_with_the_target(base, more, deadline: float):
    fast = Estimate(0, 0, 0)  # not selected below, so it does not set the target
    slower = tuple(a + b for a, b in zip(base, more, strict=True))
    one = configurator(deadline=deadline)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimates = {0: Estimate(*base), 1: Estimate(*slower)}
        # Otherwise the target is below the deadline, which then has no effect.
        assume(min(time_of(e, 12) for e in estimates.values()) >= deadline)
        depths = one.configure(estimates, (0, 1)).depths
        later = configurator(deadline=2 * deadline).configure({0: Estimate(*base), 2: fast}, (0,))
    assert depths[1] <= depths[0] <= later.depths[0]


def test_times_that_differ_by_rounding_are_equal():
    estimates = {0: Estimate(0.3, 0, 0), 1: Estimate(0.1 + 0.2, 0, 0)}
    found = configurator().configure(estimates, (0, 1))
    assert found.times[0] != found.times[1]
    assert found.depths == {0: 12, 1: 12}


def test_order_of_selected_devices_is_ignored():
    one = configurator(byte_budget=300, mode="balanced")
    order = list(range(12))
    expected = one.configure(TWELVE, order, round=5)
    for seed in range(5):
        random.Random(seed).shuffle(order)
        found = one.configure(TWELVE, order, round=5)
        assert list(found.items()) == list(expected.items())
        assert vars(found) == vars(expected)


# -------------------------------------------------------------------------------------------------
# Limits


def test_memory_limits_the_depth_and_sets_the_target():
    one = configurator(memory={0: 5, 1: 5}, mem=lambda k: k)
    found = one.configure(TWELVE, range(12))
    assert found.depths[0] == 5
    # The fastest device at the depth that its memory allows: 1 + 5 * .1 + .01 * 50.
    assert found.target == pytest.approx(2.0)
    assert found.uncovered == tuple(range(7))


def test_device_without_memory_for_the_least_depth_is_refused():
    one = configurator(memory={3: 1.5}, mem=lambda k: k, k_min=2)
    one.configure(TWELVE, (0, 1))
    with pytest.raises(
        ValueError, match=r"memory\[3\]: expected at least 2 bytes, which depth 2 ne"
    ):
        one.configure(TWELVE, (0, 3))


def test_fastest_device_with_enough_memory_periodically_trains_all_layers():
    slow = {0: Estimate(1, 1, 0), 1: Estimate(1, 0.9, 0), 2: Estimate(1, 0, 0)}
    one = configurator(memory={2: 2}, mem=lambda k: k, cover_every=3)
    by_round = {r: one.configure(slow, slow, round=r) for r in range(1, 8)}
    assert [r for r, found in by_round.items() if not found.uncovered] == [3, 6]
    assert (by_round[3].raised, by_round[3].depths[1]) == (1, 12)
    assert by_round[3].extra_wait == pytest.approx(by_round[3].waiting - by_round[2].waiting)
    assert by_round[3].extra_wait > 0
    assert one.configure(slow, slow).uncovered  # No round number: `cover_every` has no effect.


def test_byte_budget_lowers_devices_that_send_most_for_their_data():
    shares = {0: 0.7, 1: 0.1, 2: 0.1, 3: 0.1}
    same = dict.fromkeys(range(4), Estimate(1, 0.1, 0))
    one = configurator(4, shares=shares, byte_budget=31)  # cumulative rank sums U: 4, 7, 9, 10
    assert one.configure(same, same).depths == {0: 4, 1: 2, 2: 2, 3: 2}
    found = configurator(4, shares=shares, byte_budget=30).configure(same, same)
    assert found.depths == {0: 4, 1: 1, 2: 2, 3: 2}
    assert found.bytes == 28


def test_byte_budget_precedes_coverage_and_warns_if_exceeded():
    one = configurator(
        4, byte_budget=9, memory={0: 1}, mem=lambda k: 0 if k < 3 else 2, cover_every=1
    )
    same = dict.fromkeys(range(2), Estimate(1, 0.1, 0))
    assert one.configure(same, same, round=1).bytes <= 9
    tight = configurator(4, byte_budget=7)
    with pytest.warns(UserWarning, match="even depth 1 of all devices exceeds 7 bytes"):
        assert set(tight.configure(same, same).depths.values()) == {1}


def test_depth_changes_by_at_most_max_step_except_after_a_fault():
    one = configurator(max_step=3)
    before = {0: 1, 1: LayerPlan(tuple(range(12))), 6: 12, 7: 12}
    after = one.configure(TWELVE, (0, 1, 2, 6, 7), previous=before).depths
    assert after == {0: 4, 1: 12, 2: 4, 6: 9, 7: 9}  # device 2 is new
    assert one.configure(TWELVE, (0, 6), previous={}).depths == {0: 12, 6: 1}


def test_depths_stay_if_waiting_is_below_eps():
    before = {0: 11, 1: 12}
    same = dict.fromkeys(range(2), Estimate(10, 0.1, 0))
    assert configurator(eps=0.1).configure(same, same, previous=before).depths == before
    assert configurator().configure(same, same, previous=before).depths == {0: 12, 1: 12}
    # Limits apply even if the change is too small to replace the other depths.
    found = configurator(eps=0.1).configure(same, same, previous=before, limits={1: 11})
    assert found.depths == {0: 11, 1: 11}


def test_untrusted_device_trains_the_least_and_sets_no_target():
    estimates = {**TWELVE, 0: Estimate(0.1, 0, 0, trusted=False)}
    found = configurator(k_min=2).configure(estimates, range(3))
    assert found.depths[0] == 2
    assert found.target == pytest.approx(2.98)
    alone = configurator(k_min=2).configure(estimates, (0,))
    assert alone.depths == {0: 2}


def test_one_warning_if_all_devices_exceed_the_deadline():
    one = configurator(deadline=0.5)
    with pytest.warns(UserWarning, match="all devices exceed the target time at depth 1") as caught:
        found = one.configure(TWELVE, range(12))
    assert len(caught) == 1
    assert set(found.depths.values()) == {1}
    assert found.over_target == tuple(range(12))


def test_rank_cap_lowers_ranks_and_bytes_of_a_device():
    one = configurator(4, bytes_per_layer=(10, 20, 30, 40), rank_caps={1: 2})
    same = dict.fromkeys(range(2), Estimate(1, 0.1, 0))
    found = one.configure(same, same)
    assert found[0].ranks == (1, 2, 3, 4)
    assert found[1].ranks == (1, 2, 2, 2)
    assert found.bytes == 100 + 70


# -------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"L": 0, "bytes_per_layer": (), "ranks": ()}, "L: expected an integer from 1, found 0"),
        (
            {"bytes_per_layer": (1, 2)},
            "bytes_per_layer: expected one value for each of 3 layers, found 2",
        ),
        (
            {"bytes_per_layer": (1, 0, 2)},
            r"bytes_per_layer\[1\]: expected a number above 0, found 0",
        ),
        ({"bytes_per_layer": (1, math.nan, 2)}, r"bytes_per_layer\[1\]: expected a number above 0"),
        ({"ranks": (1, 2)}, "ranks: expected one value for each of 3 layers"),
        ({"ranks": (1, 2, 0)}, r"ranks\[2\]: expected an integer from 1, found 0"),
        ({"k_min": 0}, r"k_min: expected an integer from 1 to 3, found 0"),
        ({"k_min": 4}, r"k_min: expected an integer from 1 to 3, found 4"),
        ({"k_min": 2, "k_max": 1}, r"k_max: expected an integer from 2 to 3, found 1"),
        ({"mode": "slow"}, "mode: expected one of .*, found 'slow'"),
        ({"max_step": 0}, "max_step: expected an integer from 1"),
        ({"cover_every": 0}, "cover_every: expected an integer from 1"),
        ({"eps": -0.1}, "eps: expected a number from 0"),
        ({"byte_budget": 0}, "byte_budget: expected a number above 0"),
        ({"memory": {0: 1}}, r"mem: expected a function if memory is given, found None"),
        ({"shares": {0: -1}}, r"shares\[0\]: expected a number from 0, found -1"),
        ({"rank_caps": {0: 0}}, r"rank_caps\[0\]: expected an integer from 1"),
    ],
)
def test_invalid_settings_are_refused(fields: dict, message: str):
    given = {"L": 3, "bytes_per_layer": (1, 2, 3), "ranks": (1, 2, 3), **fields}
    with pytest.raises(ValueError, match=f"LegendConfigurator: {message}"):
        LegendConfigurator(**given)


@pytest.mark.parametrize("part", ["f", "mu", "beta"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_invalid_estimates_are_refused_and_never_clipped(part: str, value: float):
    bad = KINDS[0]._replace(**{part: value})
    with pytest.raises(ValueError, match=rf"estimates\[1\].{part}: expected a number from 0"):
        configurator().configure({0: KINDS[0], 1: bad}, (0, 1))


@pytest.mark.parametrize(
    ("selected", "fields", "message"),
    [
        ((), {}, "selected: expected at least one device, found none"),
        ((0, 1, 0), {}, r"selected: expected each device only once, found \[0\]"),
        ((0, 99), {}, "estimates: expected one for device 99, found none"),
        ((0, 1), {"limits": {1: 0}}, r"limits\[1\]: expected an integer from 1, found 0"),
    ],
)
def test_invalid_selections_are_refused(selected: tuple[int, ...], fields: dict, message: str):
    with pytest.raises(ValueError, match=f"configure: {message}"):
        configurator().configure(TWELVE, selected, **fields)


def test_waiting_time_is_zero_only_if_all_finish_together():
    assert waiting_time([2.5, 2.5, 2.5]) == 0
    assert waiting_time({"a": 1, "b": 2, "c": 6}) == pytest.approx(3)
    assert waiting_time([3]) == 0
    for times, message in (
        ([], "at least one time"),
        ([1, -1], "finite seconds >= 0"),
        ([math.nan], "finite seconds >= 0, found nan"),
    ):
        with pytest.raises(ValueError, match=f"waiting_time: times: expected {message}"):
            waiting_time(times)


def test_numpy_numbers_are_accepted():
    sizes = np.arange(1, 13)
    estimates = {i: Estimate(*map(np.float64, each[:3])) for i, each in TWELVE.items()}
    one = LegendConfigurator(np.int64(12), sizes, ranks=sizes, k_min=np.int64(1))
    previous = dict.fromkeys(TWELVE, np.int64(4))
    found = one.configure(estimates, np.arange(12), previous=previous)
    assert found == configurator().configure(TWELVE, range(12), previous=dict.fromkeys(TWELVE, 4))
    half = Estimate(np.float32(1), np.float32(0.5), 0)
    assert one.configure({0: half}, [0]).depths == {0: 12}


def test_arguments_are_copied():
    caps, memory, shares = {0: 2}, {0: 5.0}, {0: 1.0}
    made = LegendConfigurator(
        4, [8] * 4, ranks=[4] * 4, memory=memory, mem=float, shares=shares, rank_caps=caps
    )
    assert made.k_max == 4
    estimates = {0: Estimate(1.0, 0.1, 0.001)}
    before = made.configure(estimates, [0])
    caps[0], memory[0], shares[0] = 1, 1.0, 0.0
    assert made.configure(estimates, [0]) == before
    assert before[0].ranks == (2,) * 4
