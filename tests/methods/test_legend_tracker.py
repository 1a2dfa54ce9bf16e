"""`CapacityTracker`: speeds of devices from their reports, dropped reports and saved state."""

from __future__ import annotations

import json
import math
import random
import statistics

import numpy as np
import pytest

from lora_ext.methods.legend import CapacityReport, CapacityTracker, Estimate

L = 12
TRUE = Estimate(1.0, 0.2, 2e-5)
SIZES = [0, *(sum(1000 * (28 - i) for i in range(k)) for k in range(1, L + 1))]


def report(
    depth: int, speeds: Estimate = TRUE, device: int = 0, factor: float = 1.0, noise=lambda: 1.0
) -> CapacityReport:
    train = (speeds.f + depth * speeds.mu) * factor * noise()
    down = speeds.beta * SIZES[depth] / 2 * noise()
    return CapacityReport(device, depth, train, down, SIZES[depth])


def jitter(seed: int, share: float = 0.1):
    draw = random.Random(seed)
    return lambda: 1 + share * draw.gauss(0, 1)


def seconds(estimate: Estimate, depth: int) -> float:
    return estimate.f + depth * estimate.mu + estimate.beta * SIZES[depth]


def learned(*reports: CapacityReport, **fields) -> CapacityTracker:
    tracker = CapacityTracker(L, **fields)
    for each in reports:
        assert tracker.update(each)
    return tracker


def test_one_report_is_split_by_forward_and_backward_work():
    # The report is of a forward through 12 layers and a backward through 4. A layer costs twice
    # as much in the backward as in the forward.
    found = learned(CapacityReport(0, 4, 10.0, 3.0, 1000)).estimate(0)
    assert found == pytest.approx((6.0, 1.0, 0.006, True))


def test_upload_time_is_used_instead_of_download_time_if_given():
    found = learned(CapacityReport(0, 4, 10.0, 3.0, 1000, up_time=7.0)).estimate(0)
    assert found.beta == pytest.approx(0.01)


def test_two_noise_free_depths_give_the_exact_speeds():
    found = learned(*(report(k) for k in (12, 6, 12, 6, 3))).estimate(0)
    assert found[:3] == pytest.approx(TRUE[:3], rel=1e-3)


def test_beta_is_smoothed():
    tracker = learned(CapacityReport(0, 4, 10.0, 1.0, 100), rho=0.75)
    tracker.update(CapacityReport(0, 4, 10.0, 2.0, 100))
    assert tracker.estimate(0).beta == pytest.approx(0.75 * 0.02 + 0.25 * 0.04)


def test_noisy_reports_of_several_depths_predict_their_times():
    errors, betas = [], []
    for seed in range(40):
        draw, noise = random.Random(seed), jitter(100 + seed)
        depths = [draw.choice((3, 6, 9, 12)) for _ in range(20)]
        found = learned(*(report(k, noise=noise) for k in depths)).estimate(0)
        errors += [abs(seconds(found, k) / seconds(TRUE, k) - 1) for k in set(depths)]
        betas.append(abs(found.beta / TRUE.beta - 1))
    assert statistics.median(errors) <= 0.05
    assert statistics.median(betas) <= 0.05


@pytest.mark.parametrize("depth", [1, 5, 12])
def test_reports_of_one_depth_give_finite_estimates(depth: int):
    noise = jitter(0)
    found = learned(*(report(depth, noise=noise) for _ in range(1000))).estimate(0)
    assert found.f / found.mu == pytest.approx(L / 2)
    assert seconds(found, depth) == pytest.approx(seconds(TRUE, depth), rel=0.08)


def test_estimates_are_never_negative():
    steep = [CapacityReport(0, k, t, 1e-3, 100) for k, t in ((12, 24.0), (6, 13.5), (1, 0.5))]
    found = learned(*steep, outlier=100.0).estimate(0)
    assert (found.f, found.mu > 0) == (0, True)
    falling = [CapacityReport(0, k, t, 1e-3, 100) for k, t in ((12, 1.0), (6, 1.2), (1, 1.5))]
    found = learned(*falling).estimate(0)
    assert (found.mu, found.f > 0.9) == (0, True)


@pytest.mark.parametrize(
    "change",
    [
        *({"train_time": v} for v in (math.nan, math.inf, 0, -1.0, 1e9, "1", None, True)),
        *({"down_time": v} for v in (math.nan, -1.0, 0, 1e9)),
        *({"up_time": v} for v in (math.nan, -1.0)),
        *({"bytes": v} for v in (0, -5, math.inf, math.nan)),
        *({"depth": v} for v in (0, 13, -1, 1.5, True)),
    ],
)
def test_invalid_reports_change_nothing_and_are_counted(change: dict):
    tracker = learned(report(12), report(6))
    before = tracker.estimate(0)
    assert not tracker.update(report(6)._replace(**change))
    assert tracker.estimate(0) == before
    assert tracker.dropped == {0: 1}


def test_three_invalid_reports_lose_trust_until_the_next_valid_one():
    tracker = learned(report(12), report(6))
    bad = report(6)._replace(train_time=math.nan)
    for count in (1, 2, 3):
        tracker.update(bad)
        assert tracker.estimate(0).trusted == tracker.trusted(0) == (count < 3)
    assert tracker.estimate(0)[:3] == pytest.approx(TRUE[:3], rel=0.01)
    tracker.update(report(6))
    assert tracker.estimate(0).trusted
    assert tracker.trusted("never seen")


@pytest.mark.parametrize("factor", [25, 1 / 25])
def test_outlier_is_ignored_once_and_accepted_the_second_time(factor: float):
    tracker = learned(report(12), report(6))
    before = tracker.estimate(0)
    assert not tracker.update(report(6, factor=factor))
    assert tracker.estimate(0) == before
    assert tracker.update(report(6))  # An accepted report separates the two outliers.
    assert not tracker.update(report(6, factor=factor))
    assert tracker.update(report(6, factor=factor))
    assert tracker.ignored == {0: 2}
    found = tracker.estimate(0)
    assert found.f + 6 * found.mu == pytest.approx(factor * (TRUE.f + 6 * TRUE.mu))
    assert found.f / found.mu == pytest.approx(TRUE.f / TRUE.mu, rel=0.01)


def test_outlier_in_transfer_time_is_accepted_the_second_time():
    tracker = learned(report(12), report(6))
    slow = report(6)._replace(down_time=30 * report(6).down_time)
    assert not tracker.update(slow)
    assert tracker.update(slow)
    assert tracker.estimate(0).beta == pytest.approx(30 * TRUE.beta)


@pytest.mark.parametrize("factor", [10, 0.1])
def test_change_of_speed_keeps_the_ratio_of_f_to_mu(factor: float):
    tracker = learned(*(report(k) for k in (12, 6, 12, 6, 1)))
    tracker.update(report(1, factor=factor))
    found = tracker.estimate(0)
    assert found[:2] == pytest.approx((factor * TRUE.f, factor * TRUE.mu), rel=0.01)
    tracker.update(report(1))  # The change of speed lasted one round.
    assert tracker.estimate(0)[:2] == pytest.approx(TRUE[:2], rel=0.01)


def test_times_of_distant_depths_are_no_change_of_speed():
    steep = Estimate(0.1, 1.0, 1e-6)
    found = learned(*(report(k, steep) for k in (12, 1, 12, 1))).estimate(0)
    assert found[:2] == pytest.approx(steep[:2], rel=0.01)


def test_timeout_only_slows_the_estimate_down():
    tracker = learned(report(12), report(6))
    tracker.update_timeout(0, 6, 22.0)
    found = tracker.estimate(0)
    assert found.f + 6 * found.mu == pytest.approx(22.0)
    assert found.f / found.mu == pytest.approx(TRUE.f / TRUE.mu, rel=0.01)
    tracker.update_timeout(0, 6, 1.0)
    assert tracker.estimate(0) == found
    tracker.update_timeout("new", 12, 72.0)
    assert tracker.estimate("new") == pytest.approx((24.0, 4.0, 0.0, True))


def test_three_timeouts_in_a_row_pause_the_device():
    tracker = CapacityTracker(L, cooldown=4)
    for round in (1, 2):
        tracker.update_timeout(0, 12, 5.0, round)
    tracker.update(report(12))
    for round in (4, 5):
        tracker.update_timeout(0, 12, 5.0, round)
        assert not tracker.rests(0, round + 1)
    tracker.update_timeout(0, 12, 5.0, 6)
    assert [r for r in range(5, 14) if tracker.rests(0, r)] == [*range(5, 11)]
    assert not tracker.rests("another", 7)
    tracker.update_timeout(0, 12, 5.0, 11)  # The count restarts after the pause.
    assert not tracker.rests(0, 12)


def test_prior_speeds_are_used_until_reports_replace_them():
    tracker = CapacityTracker(L, prior={0: TRUE})
    assert tracker.estimate(0)[:3] == pytest.approx(TRUE[:3])
    faster = TRUE._replace(f=0.8, mu=0.16)
    for depth in (4, 6) * 20:
        tracker.update(report(depth, faster))
    assert tracker.estimate(0)[:2] == pytest.approx(faster[:2], rel=0.05)


def test_restored_tracker_continues_equally():
    noise = jitter(1)
    one = learned(*(report(k, noise=noise) for k in (12, 6, 9)))
    one.update(report(5, device=3))
    one.update(report(5, factor=30))
    one.update_timeout(3, 5, 60.0, round=2)
    one.update(report(5)._replace(bytes=0))
    other = CapacityTracker(L)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert (other.dropped, other.ignored) == (one.dropped, one.ignored)
    for tracker in (one, other):
        tracker.update(report(5, factor=30))
        tracker.update(report(8))
        tracker.update_timeout(3, 5, 90.0, round=3)
    assert other.state_dict() == one.state_dict()
    assert [other.estimate(i) for i in (0, 3)] == [one.estimate(i) for i in (0, 3)]


def test_invalid_state_changes_nothing():
    tracker = learned(report(12))
    before = tracker.state_dict()
    with pytest.raises((KeyError, TypeError)):
        tracker.load_state_dict({"devices": [[0, {"speed": 3}]], "dropped": [], "ignored": []})
    assert tracker.state_dict() == before


def test_device_without_reports_has_no_estimate():
    tracker = learned(report(12))
    assert 0 in tracker
    assert 5 not in tracker
    with pytest.raises(KeyError, match="a device with reports, found 5"):
        tracker.estimate(5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"L": 0}, "L: expected an integer from 1, found 0"),
        ({"rho": 1}, r"rho: expected a number in \[0, 1\), found 1"),
        ({"rho": -0.1}, "rho: expected"),
        ({"forgetting": 0}, r"forgetting: expected a number in \(0, 1\], found 0"),
        ({"outlier": 1}, "outlier: expected a number above 1"),
        ({"most_seconds": 0}, "most_seconds: expected a number above 0"),
        ({"cooldown": 0}, "cooldown: expected an integer from 1"),
        ({"prior": {4: Estimate(1, -1, 0)}}, r"prior\[4\].mu: expected a number from 0"),
    ],
)
def test_invalid_settings_are_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=f"CapacityTracker: {message}"):
        CapacityTracker(**{"L": 3, **fields})


def test_invalid_timeouts_are_refused():
    with pytest.raises(ValueError, match=r"depth: expected a number in \[1, 12\], found 13"):
        CapacityTracker(L).update_timeout(0, 13, 1.0)
    with pytest.raises(ValueError, match="seconds: expected a finite number above 0, found inf"):
        CapacityTracker(L).update_timeout(0, 3, math.inf)
    with pytest.raises(TypeError, match=r"L: expected an integer from 1, found 3\.0"):
        CapacityTracker(3.0)  # pyright: ignore[reportArgumentType]


def test_numpy_numbers_are_accepted():
    plain, numpy = CapacityTracker(L), CapacityTracker(L)
    for depth in (12, 6, 3):
        one = CapacityReport(0, depth, 1.5 + depth, 0.25, 1000)
        other = CapacityReport(
            0, np.int64(depth), np.float32(1.5 + depth), np.float64(0.25), np.int32(1000)
        )
        assert plain.update(one) and numpy.update(other)  # pyright: ignore[reportArgumentType]
    assert numpy.estimate(0) == plain.estimate(0)
    assert json.dumps(numpy.state_dict()) == json.dumps(plain.state_dict())
