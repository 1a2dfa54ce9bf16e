"""`CopraSchedule`: probabilities, distribution of the masks, and their seeds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_ext.methods.copra import CopraConfig, CopraSchedule


def schedule(groups: int = 4, total: int = 100, **fields) -> CopraSchedule:
    return CopraSchedule(CopraConfig(**fields), groups, total)


@pytest.mark.parametrize(("step", "p"), [(0, 0.1), (30, 0.46), (75, 1), (99, 1), (1000, 1)])
def test_probability_rises_to_one_after_three_quarters(step: int, p: float):
    assert schedule().probability(step) == pytest.approx(p)


@pytest.mark.parametrize(("ratio", "total", "steps"), [(0.75, 10, 8), (0.07, 100, 7), (1e-9, 5, 1)])
def test_ramp_ends_at_the_first_whole_step(ratio: float, total: int, steps: int):
    one = schedule(total=total, ramp_ratio=ratio, p0=0.2, p1=0.9)
    assert one.ramp_steps == steps
    assert one.probability(steps - 1) < 0.9 == one.probability(steps)


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        ("linear", 0.5),
        ("sine", math.sqrt(0.5)),
        ("exponential", (math.exp(0.5) - 1) / (math.e - 1)),
        ("constant", 0.0),
        (lambda fraction: fraction**3, 0.125),
        (lambda fraction: 5 * fraction, 1.0),  # The result is limited to p1.
    ],
    ids=["linear", "sine", "exponential", "constant", "cubic", "beyond p1"],
)
def test_ramps_at_their_middle_equal_the_formulas(ramp, expected: float):
    one = schedule(ramp=ramp, p0=0.2, p1=0.6, ramp_ratio=1.0)
    assert one.probability(50) == pytest.approx(0.2 + 0.4 * expected)
    assert one.probability(100) == 0.6


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_ramp_outside_zero_to_one_is_refused(value: float):
    with pytest.raises(ValueError, match=r"CopraSchedule: ramp: expected a function .* found"):
        schedule(ramp=lambda fraction: value).probability(3)


@pytest.mark.parametrize(("p0", "mean"), [(0.0, 0.625), (0.1, 0.6625)])
def test_mean_activation_equals_the_formula_up_to_one_step(p0: float, mean: float):
    assert schedule(total=400, p0=p0).mean_activation() == pytest.approx(mean, abs=1 / 400)


def test_expected_active_is_the_mean_of_the_truncated_binomial():
    assert schedule().expected_active(0) == pytest.approx(1.163129, abs=1e-6)
    assert schedule(min_active=0).expected_active(0) == pytest.approx(0.4)
    assert schedule(p0=0.0).expected_active(0) == 1
    assert schedule(p0=0.0, min_active=3).expected_active(0) == 3
    assert schedule().expected_active(75) == 4


def chi_square(counts: list[int], chances: list[float]) -> float:
    total = sum(counts)
    return sum((c - total * p) ** 2 / (total * p) for c, p in zip(counts, chances, strict=True))


# Bounds are 0.999 quantiles of chi-square: a correct sampler fails for one seed in a thousand.
@pytest.mark.parametrize(
    ("p", "least", "bound"), [(0.1, 1, 16.27), (0.6, 1, 16.27), (0.3, 0, 18.47), (0.5, 2, 13.82)]
)
def test_counts_follow_the_truncated_binomial(p: float, least: int, bound: float):
    one = schedule(p0=p, p1=p, min_active=least)
    counts = [0] * 5
    for step in range(20000):
        counts[int(one.mask(step).sum())] += 1
    assert counts[:least] == [0] * least
    chances = [math.comb(4, k) * p**k * (1 - p) ** (4 - k) for k in range(least, 5)]
    assert chi_square(counts[least:], [c / sum(chances) for c in chances]) < bound


def test_groups_and_pairs_are_sampled_uniformly():
    one = schedule(p0=0.0, min_active=2, total=10**6, ramp="constant")
    masks = torch.stack([one.mask(step) for step in range(12000)])
    pairs = [int((masks[:, i] & masks[:, j]).sum()) for i in range(4) for j in range(i)]
    assert chi_square(pairs, [1 / 6] * 6) < 20.52


@pytest.mark.parametrize("p0", [0.0, 5e-324, 1e-300, 1e-12])
def test_vanishing_probability_is_sampled_without_delay(p0: float):
    one = schedule(groups=30, p0=p0, ramp="constant", min_active=2)
    assert {int(one.mask(step).sum()) for step in range(50)} == {2}


@given(
    groups=st.integers(1, 80),
    total=st.integers(1, 50),
    step=st.integers(0, 60),
    p=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    ratio=st.floats(0.01, 1),
    seed=st.integers(-(2**70), 2**70),
    data=st.data(),
)
def test_masks_have_min_active_groups_and_depend_on_seed_and_step(
    groups: int, total: int, step: int, p: list[float], ratio: float, seed: int, data
):
    least = data.draw(st.integers(0, groups))
    fields = {"p0": p[0], "p1": p[1], "ramp_ratio": ratio, "min_active": least, "seed": seed}
    one, other = (schedule(groups, total, **fields) for _ in range(2))
    other.mask(step + 1)
    torch.manual_seed(step)
    mask = one.mask(step)
    assert mask.shape == (groups,) and mask.dtype == torch.bool
    assert least <= mask.sum() <= groups
    assert torch.equal(mask, other.mask(step))
    expected = one.expected_active(step)
    assert least - 1e-9 <= expected <= groups + 1e-9
    if p[1] == 1 and step >= one.ramp_steps:
        assert mask.all()


def test_masks_are_the_same_on_every_machine():
    found = [schedule(6, 10, p0=0.4, seed=3).mask(step).int().tolist() for step in range(3)]
    assert found == [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 1]]


def test_masks_differ_between_seeds_and_steps():
    masks = {
        tuple(schedule(24, 10, p0=0.5, seed=seed).mask(step).tolist())
        for seed in range(5)
        for step in range(5)
    }
    assert len(masks) == 25


def test_sampling_does_not_use_torchs_generator():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    schedule().mask(7)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"p0": -0.1}, r"CopraConfig: p0: expected a number in \[0, 1\], found -0.1"),
        ({"p0": math.nan}, r"CopraConfig: p0: .* found nan"),
        ({"p1": 1.1}, r"CopraConfig: p1: expected a number in \[0, 1\], found 1.1"),
        ({"p1": math.nan}, r"CopraConfig: p1: .* found nan"),
        ({"p0": 0.6, "p1": 0.5}, r"CopraConfig: p0: expected at most p1 = 0.5, found 0.6"),
        ({"p0": "0.1"}, r"CopraConfig: p0: expected a number in \[0, 1\], found '0.1'"),
        ({"ramp_ratio": 0.0}, r"CopraConfig: ramp_ratio: expected a number in \(0, 1\], found 0.0"),
        ({"ramp_ratio": 1.5}, r"CopraConfig: ramp_ratio: .* found 1.5"),
        ({"ramp_ratio": math.nan}, r"CopraConfig: ramp_ratio: .* found nan"),
        ({"ramp": "cubic"}, r"CopraConfig: ramp: expected a function or one of .* found 'cubic'"),
        ({"min_active": -1}, r"CopraConfig: min_active: expected an integer from 0, found -1"),
        ({"min_active": 1.5}, r"CopraConfig: min_active: .* found 1.5"),
        ({"seed": None}, r"CopraConfig: seed: expected an integer, found None"),
        ({"sync": "barrier"}, r"CopraConfig: sync: expected one of .* found 'barrier'"),
    ],
)
def test_errors_name_invalid_fields(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CopraConfig(**fields)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4, 0), ValueError, r"CopraSchedule: total_steps: expected an integer from 1, found 0"),
        ((4, 2.5), TypeError, r"CopraSchedule: total_steps: expected an integer from 1, found 2.5"),
        (
            (4, True),
            TypeError,
            r"CopraSchedule: total_steps: expected an integer from 1, found True",
        ),
        ((0, 5), ValueError, r"CopraSchedule: num_groups: expected an integer from 1, found 0"),
    ],
)
def test_invalid_numbers_of_steps_and_groups_are_refused(arguments, error, message: str):
    with pytest.raises(error, match=message):
        CopraSchedule(CopraConfig(), *arguments)


def test_min_active_above_the_number_of_groups_is_refused():
    message = r"CopraSchedule: min_active: expected at most the number of groups, 4, found 5"
    with pytest.raises(ValueError, match=message):
        schedule(min_active=5)


@pytest.mark.parametrize("method", ["probability", "mask", "expected_active"])
def test_negative_steps_are_refused(method: str):
    with pytest.raises(
        ValueError, match=r"CopraSchedule: step: expected an integer from 0, found -1"
    ):
        getattr(schedule(), method)(-1)
    with pytest.raises(
        TypeError, match=r"CopraSchedule: step: expected an integer from 0, found 1.0"
    ):
        getattr(schedule(), method)(1.0)
