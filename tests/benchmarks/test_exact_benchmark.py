"""The benchmark of exact models compares what it times."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the benchmark runs a model of transformers")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import exact as benchmark

from lora_ext import ops

SIZES = benchmark.Sizes(12, 6, (9,))


def test_every_case_agrees_with_the_plain_model() -> None:
    model = benchmark.tiny_model()
    found = [*benchmark.measure(model, 2, SIZES, rounds=1, min_seconds=0)]
    assert [r.case.split(",")[0] for r in found] == [
        "attention alone", "prefill of 12", "decode step", "decode step", "training step",
    ]  # fmt: skip
    assert all(r.over > 0 for r in found)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.row_attention
    monkeypatch.setattr(ops, "row_attention", lambda *a, **k: right(*a, **k) * (1 + 1e-2))
    with pytest.raises(SystemExit, match="attention alone, causal, 9: the error"):
        next(benchmark.measure(benchmark.tiny_model(), 2, SIZES, rounds=1, min_seconds=0))
