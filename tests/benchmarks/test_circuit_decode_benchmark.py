"""The decoding benchmark checks what it times."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import circuit_decode

from lora_ext import ops


def test_every_case_is_checked_and_timed(monkeypatch):
    monkeypatch.setattr(circuit_decode, "KINDS", ("hmm",))
    monkeypatch.setattr(circuit_decode, "ROWS", (2,))
    with torch.inference_mode():
        rows = list(circuit_decode.bench("cpu", torch.float32, rounds=1))
    assert [(r["case"], r["provider"]) for r in rows] == [
        (case, name) for case in circuit_decode.CASES for name in ("lora_ext", "reference")
    ]
    assert all(float(r["worst_error"]) <= 1 for r in rows)


@pytest.mark.parametrize("case", circuit_decode.CASES)
def test_a_result_that_is_slightly_wrong_is_not_timed(monkeypatch, case):
    p = circuit_decode.Problem.make("btree", 2, "cpu", torch.float32)
    run = circuit_decode.CASES[case]

    def wrong(of, p):
        first, *rest = run(of, p)
        return (first + 1, *rest) if of is ops else (first, *rest)

    monkeypatch.setitem(circuit_decode.CASES, case, wrong)
    with pytest.raises(SystemExit, match=f"btree {case}: off by inf"):
        circuit_decode.check(case, p, ops)
