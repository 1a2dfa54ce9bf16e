"""A seed is a schedule: the same one replays, reports included, and different ones differ."""

import numpy as np
import pytest
from test_guards import buffers

pytestmark = pytest.mark.slow


def broken_run(emulator, seed: int) -> tuple[list[float], list[str]]:
    values, out = buffers()
    emulator.call("guard_no_barrier_after_wait", 1, values, out, seed=seed)
    return out.tolist(), list(emulator.reports)


def test_a_seed_replays(check):
    for seed in (0, 1, 2, 12345):
        first, again = broken_run(check, seed), broken_run(check, seed)
        np.testing.assert_array_equal(first[0], again[0])
        assert first[1] == again[1]


def test_seeds_differ(check):
    assert len({tuple(broken_run(check, seed)[1]) for seed in range(6)}) > 1


def test_reports_are_capped_and_one_per_line(check):
    _, reports = broken_run(check, 0)
    assert 0 < len(reports) == len(set(reports)) <= 20
