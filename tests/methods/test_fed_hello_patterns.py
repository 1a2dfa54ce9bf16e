"""Patterns and sampling of layers: the paper's lists, exact frequencies and errors."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ext.methods.fed_hello import Pattern, gd_layers, pattern_weights, rgd_layers

PATTERNS = [*Pattern]
AUTHORS = [3, 3, 3, 2, 2, 1, 1, 1, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("pattern", "L", "c", "expected"),
    [
        ("uniform", 12, 6, (0, 2, 4, 6, 8, 10)),
        ("uniform", 12, 9, (0, 1, 2, 4, 5, 6, 8, 9, 10)),
        ("bottleneck", 6, 3, (0, 1, 5)),
        ("bottleneck", 6, 4, (0, 1, 4, 5)),
        ("bottleneck", 5, 5, (0, 1, 2, 3, 4)),
        ("triangle", 6, 2, (0, 1)),
        ("inverted_triangle", 6, 2, (4, 5)),
        (Pattern.INVERTED_TRIANGLE, 1, 1, (0,)),
        ("uniform", 1, 0, ()),
    ],
)
def test_layers_of_a_pattern_equal_the_papers(pattern, L, c, expected):
    assert gd_layers(pattern, L, c) == expected


@given(pattern=st.sampled_from(PATTERNS), L=st.integers(1, 30), data=st.data())
@settings(max_examples=100, deadline=None)
def test_patterns_give_the_requested_number_of_layers_and_nest(pattern, L, data):
    c = data.draw(st.integers(0, L))
    layers = gd_layers(pattern, L, c)
    assert len(layers) == c and list(layers) == sorted(set(layers) & set(range(L)))
    if pattern is not Pattern.UNIFORM and c < L:
        assert set(layers) < set(gd_layers(pattern, L, c + 1))


def test_heights_decrease_from_the_dense_ends():
    heights = {
        pattern: [
            sum(layer in gd_layers(pattern, 12, c) for c in (6, 9, 12)) for layer in range(12)
        ]
        for pattern in PATTERNS
    }
    assert heights[Pattern.TRIANGLE] == [3] * 6 + [2] * 3 + [1] * 3
    assert heights[Pattern.INVERTED_TRIANGLE] == [1] * 3 + [2] * 3 + [3] * 6
    # These are the weights in the authors' code.
    assert heights[Pattern.BOTTLENECK] == [3, 3, 3, 2, 2, 1, 1, 1, 2, 3, 3, 3]


def test_weights_equal_the_authors_and_are_interpolated():
    for pattern in PATTERNS:
        for L in (1, 2, 6, 12, 24):
            weights = pattern_weights(pattern, L)
            assert weights.shape == (L,) and weights.dtype == torch.float64
            assert float(weights.sum()) == pytest.approx(1, abs=1e-12) and float(weights.min()) > 0
    assert torch.equal(pattern_weights("bottleneck", 12) * 27, torch.tensor(AUTHORS).double())
    double = pattern_weights("bottleneck", 23)  # Layers 0, 2, 4, ... are the twelve above.
    torch.testing.assert_close(double[::2] / double[0], torch.tensor(AUTHORS).double() / 3)
    torch.testing.assert_close(double[1::2], (double[:-1:2] + double[2::2]) / 2)
    for pattern, expected in (
        ("triangle", [3 / 6, 2 / 6, 1 / 6]),
        ("inverted_triangle", [1 / 6, 2 / 6, 3 / 6]),
        ("uniform", [1 / 3] * 3),
    ):
        assert pattern_weights(pattern, 3).tolist() == pytest.approx(expected)


def of_successive_sampling(weights: list[float], c: int) -> dict[tuple[int, ...], float]:
    """Return the probability of every set, summed over all orders of sampling its layers."""
    found: Counter[tuple[int, ...]] = Counter()
    for order in itertools.permutations(range(len(weights)), c):
        probability, left = 1.0, sum(weights)
        for layer in order:
            probability *= weights[layer] / left
            left -= weights[layer]
        found[tuple(sorted(order))] += probability
    return dict(found)


def p_value(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    total = sum(counts.values())
    cells = {layers: p for layers, p in expected.items() if p > 0}
    assert counts.keys() <= cells.keys()
    square = sum((counts[s] - total * p) ** 2 / (total * p) for s, p in cells.items())
    half = torch.tensor([(len(cells) - 1) / 2, square / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize(
    ("weights", "c"),
    [([1, 2, 3], 1), ([1, 2, 3], 2), ([1.0, 1.0, 5.0, 0.0, 0.5], 3), ([3, 1, 1, 1, 2, 3], 4)],
)
def test_sampled_sets_have_the_exact_probabilities_of_successive_sampling(weights, c):
    draws = 20_000
    counts = Counter(rgd_layers(weights, c, seed=7, round=r, client=r % 5) for r in range(draws))
    expected = of_successive_sampling([float(w) for w in weights], c)
    assert p_value(counts, expected) > 1e-3
    others = Counter(
        rgd_layers([1.0] * len(weights), c, seed=7, round=r, client=0) for r in range(500)
    )
    possible = Counter({s: n for s, n in others.items() if expected.get(s, 0) > 0})
    assert p_value(possible, expected) < 1e-6  # samples with other weights are rejected


@pytest.mark.slow
@given(
    weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12),
    seed=st.integers(0, 2**64),
    round=st.integers(0, 10**6),
    client=st.one_of(st.integers(0, 2**63), st.text()),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_sampled_layers_are_distinct_and_reproducible(weights, seed, round, client, data):
    c = data.draw(st.integers(0, len(weights)))
    layers = rgd_layers(weights, c, seed=seed, round=round, client=client)
    assert len(layers) == c
    assert list(layers) == sorted(set(layers) & set(range(len(weights))))
    doubled = 2 * torch.tensor(weights, dtype=torch.float64)
    assert layers == rgd_layers(doubled, c, seed=seed, round=round, client=client)


def test_samples_depend_on_seed_round_and_client():
    def draw(seed, round, client):
        return rgd_layers([1.0] * 40, 20, seed=seed, round=round, client=client)

    names = (*range(12), 111, "3")
    for axis in range(3):
        given = [tuple(n if i == axis else 1 for i in range(3)) for n in names[: 13 + axis // 2]]
        assert len({draw(*each) for each in given}) == len(given)
    swapped = [(1, 11, 1), (11, 1, 1), (1, 1, 11), (111, 1, 1), (1, 111, 1)]
    assert len({draw(*each) for each in swapped}) == 5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gd_layers("cone", 6, 2), ValueError, "pattern: expected one of ('uniform', 'tri"),
        (lambda: pattern_weights("cone", 6), ValueError, "'bottleneck'), found 'cone'"),
        (lambda: pattern_weights("uniform", 0), ValueError, "L: expected an integer from 1, f"),
        (lambda: gd_layers("uniform", 6, 7), ValueError, "c: expected an integer from 0 to 6, fou"),
        (lambda: gd_layers("uniform", 6, -1), ValueError, "c: expected an integer from 0 to 6, fo"),
        (lambda: gd_layers("uniform", 6, True), TypeError, "c: expected an integer from 0 to 6, f"),
        (lambda: gd_layers("uniform", 6.0, 1), TypeError, "L: expected an integer from 1, found 6"),
        (
            lambda: rgd_layers([1.0, -1.0], 1, seed=0, round=0, client=0),
            ValueError,
            "weights: expected finite numbers >= 0, at least one > 0, found [1.0, -1.0]",
        ),
        (
            lambda: rgd_layers([1.0, float("nan")], 1, seed=0, round=0, client=0),
            ValueError,
            "weights: expected finite numbers >= 0",
        ),
        (
            lambda: rgd_layers([1.0, 0.0, 2.0], 3, seed=0, round=0, client=0),
            ValueError,
            "weights: expected at least 3 weights above 0, found 2",
        ),
        (
            lambda: rgd_layers([[1.0]], 1, seed=0, round=0, client=0),
            ValueError,
            "weights: expected shape (L,), found [1, 1]",
        ),
        (
            lambda: rgd_layers([1.0], 2, seed=0, round=0, client=0),
            ValueError,
            "c: expected an integer from 0 to 1, found 2",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
