"""The benchmark of routed experts compares what it times."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the benchmark compares with peft")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import experts
from experts import Case

SIZES = {"rank": 4, "width": 32, "inner": 16, "experts": 4, "choices": 2}
SERVING, TRAINING = Case("decode", 4, 1, 2, **SIZES), Case("train", 4, 3, 2, **SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("case", [SERVING, TRAINING], ids=lambda case: case.kind)
def test_every_provider_is_checked_and_timed(case: Case) -> None:
    rows = list(experts.measure(case, "cpu", rounds=1))
    others = ["base"] if case is SERVING else []
    assert [row["provider"] for row in rows] == ["lora_ext", *others, "peft"]
    assert all(row["worst_error"] <= 1 and row["median"] > 0 for row in rows)


def test_rows_of_another_adapter_are_not_timed() -> None:
    problem = experts.Problem(SERVING, "cpu")
    problem.of_row = problem.of_row[::-1]
    with pytest.raises(SystemExit, match="decode: 4 rows x 1, 2 adapters: off by"):
        experts.check(problem)
