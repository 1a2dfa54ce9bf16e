"""Shapley values: known games, properties, three estimators and errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_ext.methods.copra import Shapley, shapley_values


def glove(mask: Tensor) -> float:  # the glove game with one left and two right gloves
    return float(mask[0] and mask[1:].any())


def airport(mask: Tensor) -> float:
    return max((cost for cost, on in zip((1, 2, 3), mask.tolist(), strict=True) if on), default=0)


WORTH = [1.0, -2.0, 3.0, 0.5]
KNOWN = {
    "glove": (glove, [2 / 3, 1 / 6, 1 / 6]),
    "additive": (lambda m: float(m.double() @ torch.tensor(WORTH).double()), WORTH),
    "majority": (lambda m: float(m.sum() >= 2), [1 / 3] * 3),
    "squares": (lambda m: float(m.sum() ** 2), [4.0] * 4),
    "airport": (airport, [1 / 3, 5 / 6, 11 / 6]),
    "one player": (lambda m: 7.0 * m.sum() - 3, [7.0]),
}


def random_game(n: int, seed: int = 0):
    values = torch.randn(2**n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    powers = 2 ** torch.arange(n)
    return lambda mask: values[int(powers[mask].sum())].item()


@pytest.mark.parametrize("game", KNOWN)
def test_exact_values_of_known_games(game: str):
    value_fn, expected = KNOWN[game]
    found = shapley_values(value_fn, len(expected))
    torch.testing.assert_close(found.values, torch.tensor(expected, dtype=torch.float64))
    assert found.evaluations == 2 ** len(expected)
    assert not found.standard_error.any() and found.values.dtype == torch.float64


@pytest.mark.parametrize("method", ["permutation", "owen"])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("game", ["glove", "airport", "majority", "squares"])
def test_sampled_values_are_within_four_standard_errors(method: str, antithetic: bool, game: str):
    value_fn, expected = KNOWN[game]
    generator = torch.Generator().manual_seed(0)
    found = shapley_values(
        value_fn, len(expected), method, 400, generator, antithetic=antithetic, levels=40
    )
    error = (found.values - torch.tensor(expected, dtype=torch.float64)).abs()
    midpoints = 1e-3 if method == "owen" else 1e-12  # error of the midpoint rule: 1 / levels^2
    assert (error <= 4 * found.standard_error + midpoints).all()
    assert found.standard_error.max() < 0.15


@pytest.mark.parametrize("method", ["permutation", "owen"])
def test_standard_errors_equal_the_spread_of_repeated_runs(method: str):
    game, n = random_game(5), 5
    runs: list[Shapley] = []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        runs.append(shapley_values(game, n, method, 4, generator, levels=5))
    spread = torch.stack([run.values for run in runs]).std(0)
    reported = torch.stack([run.standard_error.square() for run in runs]).mean(0).sqrt()
    torch.testing.assert_close(reported, spread, rtol=0.15, atol=0)  # 4 sigma for 300 runs


def test_antithetic_sampling_is_exact_for_games_of_pairs():
    weights = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value_fn = lambda m: float(m.double() @ weights @ m.double())  # noqa: E731
    exact = shapley_values(value_fn, 6).values
    found = shapley_values(value_fn, 6, "permutation", 3, antithetic=True)
    # Exactly one of an order and its reverse has player i after j: the mean of the two is exact.
    torch.testing.assert_close(found.values, exact)


@settings(deadline=None)
@given(n=st.integers(1, 7), seed=st.integers(0, 10**6), orders=st.integers(1, 4))
def test_values_are_efficient_and_additive(n: int, seed: int, orders: int):
    first, second = random_game(n, seed), random_game(n, seed + 1)
    total = first(torch.ones(n, dtype=torch.bool)) - first(torch.zeros(n, dtype=torch.bool))
    exact = shapley_values(first, n)
    assert exact.values.sum().item() == pytest.approx(total, abs=1e-9)
    for antithetic in (False, True):
        generator = torch.Generator().manual_seed(seed)
        sampled = shapley_values(first, n, "permutation", orders, generator, antithetic=antithetic)
        assert sampled.values.sum().item() == pytest.approx(total, abs=1e-9)
    both = shapley_values(lambda m: first(m) + second(m), n).values
    torch.testing.assert_close(both, exact.values + shapley_values(second, n).values)


@settings(deadline=None)
@given(n=st.integers(3, 7), seed=st.integers(0, 10**6))
def test_symmetric_players_have_equal_values_and_null_players_zero(n: int, seed: int):
    game = random_game(n, seed)

    def value_fn(mask: Tensor) -> float:  # players 0 and 1 are symmetric, player 2 is null
        mask = mask.clone()
        mask[:2] = mask[:2].sort().values
        mask[2] = False
        return game(mask)

    for method in ("exact", "permutation", "owen"):
        found = shapley_values(value_fn, n, method, 3).values
        assert found[2] == 0
        if method == "exact":
            torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("method", ["exact", "permutation", "owen"])
def test_coalitions_are_evaluated_once_unless_the_cache_is_off(method: str):
    asked: list[tuple[bool, ...]] = []

    def value_fn(mask: Tensor) -> float:
        assert mask.shape == (4,) and mask.dtype == torch.bool
        asked.append(tuple(mask.tolist()))
        return float(mask.sum())

    found = shapley_values(value_fn, 4, method, 5)
    assert len(asked) == len(set(asked)) == found.evaluations <= 16
    asked.clear()
    found = shapley_values(value_fn, 4, method, 5, cache=False)
    counts = {"exact": 16, "permutation": 5 * 5, "owen": 16 * 5 * 5}
    assert len(asked) == found.evaluations == counts[method]


def test_generator_determines_the_samples():
    game = random_game(6)
    for method in ("permutation", "owen"):
        one, same, other = (
            shapley_values(game, 6, method, 2, torch.Generator().manual_seed(seed)).values
            for seed in (1, 1, 2)
        )
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_standard_error_of_a_single_sample_is_nan():
    found = shapley_values(glove, 3, "permutation", 1)
    assert found.standard_error.isnan().all()
    assert shapley_values(glove, 3, "owen", 1, levels=1).standard_error.isnan().all()
    assert shapley_values(glove, 3, "owen", 1, levels=30).standard_error.isfinite().all()


def test_thirty_and_more_players_can_be_sampled():
    found = shapley_values(lambda m: float(m.sum()), 30, "permutation", 2)
    torch.testing.assert_close(found.values, torch.ones(30, dtype=torch.float64))
    found = shapley_values(lambda m: float(m[-1]), 70, "owen", 1, levels=3)
    assert found.values.tolist() == [0.0] * 69 + [1.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_value_is_refused_with_its_coalition(value: float):
    message = rf"value_fn: expected a finite number, found {value} for the coalition \[0, 2\] of 3"
    asked = []

    def v(mask):
        asked.append(mask.tolist())
        return value if mask.tolist() == [True, False, True] else 0.0

    with pytest.raises(ValueError, match=message):
        shapley_values(v, 3)
    assert asked[-1] == [True, False, True], "expected evaluation to stop at the first error"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((21, "exact"), r"at most 20 players .*found 21; use 'permutation' or 'owen' instead"),
        ((0, "exact"), r"shapley_values: n: expected an integer from 1, found 0"),
        ((3, "monte carlo"), r"method: expected 'exact', 'permutation' or 'owen', found 'monte"),
        ((3, "owen", 0), r"samples: expected an integer from 1, found 0"),
    ],
)
def test_invalid_arguments_are_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        shapley_values(lambda m: 0.0, *arguments)
