"""The circuit benchmark's peers compute what the op does."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_circuit


@pytest.mark.parametrize("kind", ["cp", "hmm"])
@pytest.mark.parametrize("case", bench_circuit.CASES)
@pytest.mark.parametrize("observed", [bench_circuit.gathered, bench_circuit.crossed])
def test_what_one_writes_in_torch_is_the_scan(kind: str, case: str, observed) -> None:
    shape = bench_circuit.Shape(kind, rows=3, n_token=4, components=5, vocab=7)
    args = bench_circuit.inputs(shape)
    plain = bench_circuit.providers(shape, case, compiled=False)["torch"]
    found = bench_circuit.call(case, lambda *a: plain(*a, observed=observed), args)()
    assert bench_circuit.error(shape, case, found) <= 1


@pytest.mark.parametrize("case", bench_circuit.CASES)
def test_a_result_that_is_off_is_not_timed(case: str) -> None:
    shape = bench_circuit.Shape("cp", rows=3, n_token=4, components=5, vocab=7)
    ours = bench_circuit.providers(shape, case, compiled=False)["lora_ext"]
    found = bench_circuit.call(case, lambda *a: ours(*a) * (1 + 1e-3), bench_circuit.inputs(shape))
    with pytest.raises(SystemExit, match="result is off"):
        bench_circuit.error(shape, case, found())


def test_every_provider_of_every_case_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = bench_circuit.Shape("hmm", rows=2, n_token=3, components=4, vocab=5)
    copy = torch.ones(4)
    monkeypatch.setattr(bench_circuit, "copy_call", lambda _: (lambda: copy.clone(), 32))
    rows = list(bench_circuit.measure(shape, rounds=1, compiled=False))
    expected = {(case, name) for case in bench_circuit.CASES for name in ("lora_ext", "torch")}
    assert {(row.case, row.provider) for row in rows} == expected
    assert all(row.over_lora_ext == 1 for row in rows if row.provider == "lora_ext")
