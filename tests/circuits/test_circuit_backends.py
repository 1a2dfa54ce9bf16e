"""Circuits on every backend of the ops: the results must agree."""

from __future__ import annotations

import pytest
import torch
from backends import OP_MODULES, Backend
from circuit_graphs import GRAPHS, assignments, circuit_of

from lora_ext.circuits import Categorical, RegionGraph


def run_on_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all later calls of ops on the CPU twins, which support float64."""
    for module in OP_MODULES:
        monkeypatch.setattr(module, "_c", torch.ops.lora_ext)


@pytest.mark.parametrize("precision", ["fp32", "high", "fp16s"])
@pytest.mark.parametrize("name", ["hmm tied", "rat_spn", "poon_domingos"])
def test_values_flows_and_gradients_agree_with_float64(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    if precision != "fp32" and backend.is_twin:
        pytest.skip("CPU twins have only one precision")
    exact = circuit_of(GRAPHS[name](), seed=1)
    circuit = circuit_of(GRAPHS[name](), seed=1).float().to(backend.device)
    circuit.precision = precision
    x = assignments(exact)[::13]
    log_prob = circuit.log_prob(x.to(backend.device))
    log_prob.sum().backward()
    units = circuit.flows(x.to(backend.device)).units

    run_on_twins(monkeypatch)
    expected = exact.log_prob(x)
    expected.sum().backward()
    tolerance = {"fp32": 1e-5, "high": 2e-4, "fp16s": 5e-3}[precision]
    torch.testing.assert_close(log_prob.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(units.cpu().double(), exact.flows(x).units, rtol=1e-4, atol=1e-4)
    assert circuit.weights.grad is not None and exact.weights.grad is not None
    error = (circuit.weights.grad.cpu().double() - exact.weights.grad).abs().max()
    assert error <= 10 * tolerance * exact.weights.grad.abs().max()


def test_samples_and_maps_are_equal_on_every_backend(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = RegionGraph.hmm(5, 3, Categorical(4))
    exact = circuit_of(graph, seed=2)
    circuit = circuit_of(graph, seed=2).float().to(backend.device)
    u = torch.rand(1, 40, 10, generator=torch.Generator().manual_seed(0))
    samples, best = circuit.sample(40, uniforms=u.to(backend.device)), circuit.map().x
    run_on_twins(monkeypatch)
    # No uniform is so close to a cumulative sum of these weights that rounding changes the draw.
    assert torch.equal(samples.cpu(), exact.sample(40, uniforms=u))
    assert torch.equal(best.cpu(), exact.map().x)
