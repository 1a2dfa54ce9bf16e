"""Partitions of samples among clients: requested numbers of classes, sizes, seeds and errors."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ext.federated import partition_dirichlet, partition_pathological

LABELS = np.repeat(np.arange(10), 100)


def whole(shares, samples):
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(samples))
    assert all((np.diff(share) > 0).all() for share in shares)


@given(
    classes=st.integers(1, 6),
    clients=st.integers(1, 9),
    each=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_clients_have_the_requested_number_of_classes_and_all_samples(classes, clients, each, seed):
    each = min(each, classes)
    if clients * each < classes:
        return
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), 25)) * 7 - 3
    shares = partition_pathological(labels, clients, each, seed=seed)
    whole(shares, len(labels))
    assert [len(np.unique(labels[share])) for share in shares] == [each] * clients
    counts = [[np.sum(labels[share] == c * 7 - 3) for share in shares] for c in range(classes)]
    owners = [sum(n > 0 for n in row) for row in counts]
    assert max(owners) - min(owners) <= 1
    assert all(n == 0 or n >= 2 for row in counts for n in row)


def test_shares_of_a_class_differ_in_size():
    sizes = [len(share) for share in partition_pathological(LABELS, 20, 2, seed=0)]
    assert len(set(sizes)) > 10 and min(sizes) >= 4


def test_one_client_per_class_and_all_classes_per_client_are_accepted():
    shares = partition_pathological(LABELS, 10, 1, seed=0)
    assert sorted(np.unique(LABELS[share]).item() for share in shares) == list(range(10))
    assert [len(share) for share in shares] == [100] * 10
    alone = partition_pathological(LABELS, 1, 10, seed=0)
    assert np.array_equal(alone[0], np.arange(1000))


def test_partitions_are_determined_by_their_seed():
    for split in (
        lambda seed: partition_pathological(LABELS, 12, 3, seed=seed),
        lambda seed: partition_dirichlet(LABELS, 12, 0.3, seed=seed),
    ):
        first, second, other = split(0), split(0), split(1)
        assert all(map(np.array_equal, first, second))
        assert not all(map(np.array_equal, first, other))


@given(clients=st.integers(1, 8), alpha=st.sampled_from([0.3, 1.0, 100.0]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_dirichlet_assigns_all_samples_and_at_least_min_size(clients, alpha, seed):
    shares = partition_dirichlet(LABELS, clients, alpha, seed=seed, min_size=3)
    whole(shares, len(LABELS))
    assert min(map(len, shares)) >= 3


def test_large_alpha_gives_equal_shares_and_small_alpha_few_classes():
    equal = partition_dirichlet(LABELS, 5, 1e6, seed=0)
    assert {np.sum(LABELS[share] == c) for share in equal for c in range(10)} <= {19, 20, 21}
    skewed = partition_dirichlet(LABELS, 5, 0.01, seed=0)
    largest = [np.bincount(LABELS[np.concatenate(skewed)], minlength=10)]
    assert np.array_equal(largest[0], np.full(10, 100))
    most = np.array([[np.sum(LABELS[share] == c) for share in skewed] for c in range(10)]).max(1)
    assert np.mean(most) > 90


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition_pathological([], 2, 1, seed=0), "labels: expected shape (N,), N > 0"),
        (lambda: partition_pathological([[1]], 1, 1, seed=0), "labels: expected shape (N,), N > 0"),
        (
            lambda: partition_pathological(LABELS, 0, 1, seed=0),
            "n_clients: expected an integer from 1, found 0",
        ),
        (
            lambda: partition_pathological(LABELS, True, 1, seed=0),
            "n_clients: expected an integer from 1, found True",
        ),
        (
            lambda: partition_pathological(LABELS, 12, 3, seed=None),
            "seed: expected an integer from 0, found None",
        ),
        (
            lambda: partition_dirichlet(LABELS, 2, 1.0, seed=-1),
            "seed: expected an integer from 0, found -1",
        ),
        (
            lambda: partition_pathological(LABELS, 12, 11, seed=0),
            "classes_per_client: expected at most 10, the number of classes, found 11",
        ),
        (
            lambda: partition_pathological(LABELS, 4, 2, seed=0),
            "classes_per_client: expected at least 3, so that every class is used, found 2",
        ),
        (
            lambda: partition_pathological(LABELS, 60, 10, seed=0),
            "labels: expected at least 120 samples of class 0, 2 per client, found 100",
        ),
        (
            lambda: partition_dirichlet(LABELS, 2, 0.0, seed=0),
            "alpha: expected a finite number above 0, found 0.0",
        ),
        (
            lambda: partition_dirichlet(LABELS, 2, float("nan"), seed=0),
            "alpha: expected a finite number above 0, found nan",
        ),
        (
            lambda: partition_dirichlet(LABELS, 6, 1.0, seed=0, min_size=200),
            "labels: expected at least 1200 samples, found 1000",
        ),
        (
            lambda: partition_dirichlet(LABELS, 6, 0.01, seed=0, min_size=150),
            "min_size: expected a split with at least 150 samples per client within 100 draws",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
