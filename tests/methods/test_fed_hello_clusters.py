"""Layers clustered by importance: known results, and comparison with all other clusterings."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ext.methods.fed_hello import cluster_weights


def levels_of(scores, k=3, levels=(1, 2, 3)):
    weights = cluster_weights(scores, k, levels)
    assert weights.dtype == torch.float64 and float(weights.sum()) == pytest.approx(1, abs=1e-12)
    return (weights / weights.min()).round(decimals=9).tolist()


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.11, 5, 5.2, 9], [1, 1, 2, 2, 3]),
        ([9, 5.2, 0.1, 5, 0.11], [3, 2, 1, 2, 1]),  # in the order of the layers
        ([4.0, 4.0, 4.0], [1, 1, 1]),
        ([2.0, 1.0, 2.0, 1.0], [2, 1, 2, 1]),  # fewer distinct scores than groups
        ([0.0, 0.0, 7.0], [1, 1, 2]),
        ([3.0], [1]),
        ([0, 1, 2, 3], [1, 2, 3, 3]),  # Of equally good partitions, the first one is chosen.
        ([1e-300, 2e-300, 1e300], [1, 2, 3]),
        ([-1.0, 0.0, 1.0], [1, 2, 3]),
    ],
)
def test_levels_increase_with_the_score_of_the_group(scores, expected):
    assert levels_of(scores) == expected


def test_numbers_of_groups_and_levels_can_be_set():
    assert levels_of([1.0, 2.0, 9.0], k=1) == [1, 1, 1]
    assert levels_of([1.0, 2.0, 9.0], k=2, levels=(1, 5)) == [1, 1, 5]
    assert levels_of([1.0, 2.0, 9.0, 20.0], k=4, levels=(1, 2, 4, 8)) == [1, 2, 4, 8]


@given(scores=st.lists(st.integers(0, 30), min_size=1, max_size=8), k=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_clusters_minimise_the_sum_of_squares(scores, k):
    groups = [round(level) for level in levels_of(scores, k, (1, 2, 3, 4))]
    # All levels are integers, because the first group is never empty.
    assert groups == levels_of(scores, k, (1, 2, 3, 4))

    def squares(parts):
        return sum(sum((v - sum(p) / len(p)) ** 2 for v in p) for p in parts if p)

    found = squares(
        [[s for s, g in zip(scores, groups, strict=True) if g == i] for i in set(groups)]
    )
    ordered = sorted(scores)
    count = min(k, len(set(scores)))
    cuts = itertools.combinations(range(1, len(scores)), count - 1)
    best = min(
        squares([ordered[a:b] for a, b in itertools.pairwise((0, *c, len(scores)))]) for c in cuts
    )
    assert found == pytest.approx(best, abs=1e-9)
    assert len(set(groups)) == count
    by_score = dict(zip(scores, groups, strict=True))
    assert [by_score[s] for s in scores] == groups  # equal scores share a group
    assert [g for _, g in sorted(by_score.items())] == sorted(by_score.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], 0), "k: expected an integer from 1, found 0"),
        (([1.0], 2, (1,)), "levels: expected at least k = 2 levels, found [1]"),
        (([1.0], 1, (0,)), "levels: expected finite numbers above 0, found [0]"),
        (([], 3), "scores: expected shape (L,), found [0]"),
        (([[1.0]], 3), "scores: expected shape (L,), found [1, 1]"),
        (([1.0, float("inf")], 3), "scores: expected finite numbers, found [1.0, inf]"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cluster_weights(*arguments)
