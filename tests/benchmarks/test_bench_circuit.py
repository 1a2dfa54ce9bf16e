"""The circuit benchmark's peers compute what the op does."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_circuit

from lora_ext import ops


@pytest.mark.parametrize("kind", ["cp", "hmm"])
def test_the_torch_expression_is_the_scan(kind: str) -> None:
    shape = bench_circuit.Shape(kind, rows=3, n_token=4, components=5, vocab=7)
    assert bench_circuit.check(shape) <= 1
    leaf, prior, trans, x = bench_circuit.inputs(shape)
    prefixes = bench_circuit.eager_prefixes(leaf, prior, trans, x)
    torch.testing.assert_close(ops.circuit_scan(kind, leaf, prior, trans, x).prefix, prefixes)
