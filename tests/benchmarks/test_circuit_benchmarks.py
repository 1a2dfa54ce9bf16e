"""The benchmarks of circuits: the baselines equal the circuit, and wrong results are not timed."""

import argparse
import sys
from dataclasses import replace

import bench_circuit
import chain_peers
import circuit_decode
import circuit_engine
import common
import pytest
import torch

from lora_ext import ops
from lora_ext.circuits import Categorical, Circuit, RegionGraph


@pytest.mark.parametrize("kind", ["cp", "hmm"])
@pytest.mark.parametrize("case", bench_circuit.CASES)
@pytest.mark.parametrize("observed", [bench_circuit.gathered, bench_circuit.crossed])
def test_baseline_in_torch_equals_the_scan(kind: str, case: str, observed) -> None:
    shape = bench_circuit.Shape(kind, rows=3, n_token=4, components=5, vocab=7)
    args = bench_circuit.inputs(shape)
    plain = bench_circuit.providers(shape, case, compiled=False)["torch"]
    found = bench_circuit.call(case, lambda *a: plain(*a, observed=observed), args)()
    assert bench_circuit.error(shape, case, found) <= 1


@pytest.mark.parametrize("case", bench_circuit.CASES)
def test_wrong_training_result_is_not_timed(case: str) -> None:
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
def test_wrong_decoding_result_is_not_timed(monkeypatch, case):
    p = circuit_decode.Problem.make("btree", 2, "cpu", torch.float32)
    run = circuit_decode.CASES[case]

    def wrong(of, p):
        first, *rest = run(of, p)
        return (first + 1, *rest) if of is ops else (first, *rest)

    monkeypatch.setitem(circuit_decode.CASES, case, wrong)
    with pytest.raises(SystemExit, match=f"btree {case}: off by inf"):
        circuit_decode.check(case, p, ops)


@pytest.fixture
def chain() -> tuple[Circuit, torch.Tensor]:
    torch.manual_seed(0)
    circuit = Circuit(RegionGraph.hmm(5, 3, Categorical(4)))
    return circuit, torch.randint(4, (6, 5))


@pytest.mark.parametrize("form", [chain_peers.stacked, chain_peers.scaled])
def test_stacked_chain_has_the_values_and_gradients_of_the_circuit(chain, form) -> None:
    circuit, x = chain
    peer = chain_peers.Chain.of(circuit).peer(form, x)
    ours = chain_peers.torch_peer(lambda: circuit.log_prob(x), [circuit.weights])
    torch.testing.assert_close(peer.value(), ours.value())
    torch.testing.assert_close(peer.gradient(), ours.gradient(), rtol=1e-4, atol=1e-5)


def test_einsum_layers_have_the_values_and_gradients_of_the_circuit() -> None:
    torch.manual_seed(0)
    sizes = 64, circuit_engine.DEPTH, circuit_engine.REPETITIONS, 3, 3
    circuit, x = Circuit(RegionGraph.rat_spn(*sizes, Categorical(4))), torch.randint(4, (6, 64))
    parts = circuit_engine.layers_of(circuit)
    peer = chain_peers.torch_peer(lambda: circuit_engine.einsum_layers(*parts, x), parts[1])
    ours = chain_peers.torch_peer(lambda: circuit.log_prob(x), [circuit.weights])
    torch.testing.assert_close(peer.value(), ours.value())
    torch.testing.assert_close(peer.gradient(), ours.gradient(), rtol=1e-4, atol=1e-5)


def test_wrong_baseline_is_not_timed(chain) -> None:
    circuit, x = chain
    right = chain_peers.Chain.of(circuit).peer(chain_peers.stacked, x)
    value = right.value()
    for wrong in (
        replace(right, value=lambda: value * 1.001),
        replace(right, gradient=lambda: right.gradient() * 1.01),
    ):
        with pytest.raises(SystemExit, match="case: peer is off by"):
            circuit_engine.compare("hmm", "case", circuit, {"peer": wrong}, x, rounds=1)


def test_missing_jax_is_skipped_with_a_reason(capsys, monkeypatch) -> None:
    monkeypatch.setattr(circuit_engine, "STEPS", 3)
    options = {"rounds": 1, "compile": False, "least": True}
    args = argparse.Namespace(ranks=[2], jax_python="no-such-python", **options)
    rows = circuit_engine.hmm_table(args)
    assert "jax: skipped: no interpreter no-such-python" in capsys.readouterr().out
    assert {"lora_ext", "torch", "torch, scaled"} <= {row["provider"] for row in rows}


def test_jax_equals_the_circuit_if_it_is_installed(chain) -> None:
    missing = chain_peers.jax_missing(sys.executable)
    if missing:
        pytest.skip(missing)
    circuit, x = chain
    jax = chain_peers.Jax(sys.executable, chain_peers.Chain.of(circuit), x, threads=1)
    for form in chain_peers.FORMS:
        peer = jax.peer(form)
        torch.testing.assert_close(peer.value(), circuit.log_prob(x).detach())
    jax.close()


def test_call_in_another_process_is_timed_by_the_clock_of_that_process() -> None:
    class Elsewhere:
        def __call__(self) -> None: ...
        def seconds(self, count: int) -> float:
            return 7.0 * count

    assert common.interleaved({"far": Elsewhere()}, rounds=1)["far"].median == 7.0
