"""The peers of the circuit engine's benchmark are the circuit, and a wrong one is not timed."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import chain_peers
import circuit_engine
import common

from lora_ext.circuits import Categorical, Circuit, RegionGraph


@pytest.fixture
def chain() -> tuple[Circuit, torch.Tensor]:
    torch.manual_seed(0)
    circuit = Circuit(RegionGraph.hmm(5, 3, Categorical(4)))
    return circuit, torch.randint(4, (6, 5))


@pytest.mark.parametrize("form", [chain_peers.stacked, chain_peers.scaled])
def test_a_stacked_chain_has_the_values_and_gradients_of_the_circuit(chain, form) -> None:
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


def test_a_peer_that_is_off_is_not_timed(chain) -> None:
    circuit, x = chain
    right = chain_peers.Chain.of(circuit).peer(chain_peers.stacked, x)
    value = right.value()
    for wrong in (
        replace(right, value=lambda: value * 1.001),
        replace(right, gradient=lambda: right.gradient() * 1.01),
    ):
        with pytest.raises(SystemExit, match="case: peer is off by"):
            circuit_engine.compare("hmm", "case", circuit, {"peer": wrong}, x, rounds=1)


def test_jax_is_skipped_with_its_reason(capsys, monkeypatch) -> None:
    monkeypatch.setattr(circuit_engine, "STEPS", 3)
    options = {"rounds": 1, "compile": False, "least": True}
    args = argparse.Namespace(ranks=[2], jax_python="no-such-python", **options)
    rows = circuit_engine.hmm_table(args)
    assert "jax: skipped: no interpreter no-such-python" in capsys.readouterr().out
    assert {"lora_ext", "torch", "torch, scaled"} <= {row["provider"] for row in rows}


def test_jax_is_the_circuit_where_it_is_installed(chain) -> None:
    missing = chain_peers.jax_missing(sys.executable)
    if missing:
        pytest.skip(missing)
    circuit, x = chain
    jax = chain_peers.Jax(sys.executable, chain_peers.Chain.of(circuit), x, threads=1)
    for form in chain_peers.FORMS:
        peer = jax.peer(form)
        torch.testing.assert_close(peer.value(), circuit.log_prob(x).detach())
    jax.close()


def test_a_call_of_another_process_is_timed_by_its_own_clock() -> None:
    class Elsewhere:
        def __call__(self) -> None: ...
        def seconds(self, count: int) -> float:
            return 7.0 * count

    assert common.interleaved({"far": Elsewhere()}, rounds=1)["far"].median == 7.0
