"""Saving circuits, and loading them from files that are not trusted."""

from __future__ import annotations

import json

import pytest
import torch
from circuit_graphs import GRAPHS, assignments, circuit_of, random_graph
from safetensors import safe_open
from safetensors.torch import save_file

from lora_ext.circuits import Circuit


@pytest.mark.parametrize("seed", range(8))
def test_loaded_circuit_equals_the_saved_one(tmp_path, seed):
    circuit = circuit_of(random_graph(seed), seed)
    circuit.save(tmp_path / "c.safetensors")
    loaded = Circuit.load(tmp_path / "c.safetensors")
    assert loaded.graph == circuit.graph and loaded.norm == circuit.norm
    x = assignments(circuit)
    assert torch.equal(loaded.log_prob(x), circuit.log_prob(x))


def parts(path):
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, d: t.pop("weights"), "expected .*weights"),
        (lambda t, d: t.update(weights=torch.zeros(4)), "expected .*weights"),
        (lambda t, d: t.update(weights=torch.zeros(3)), "float32 or in float64"),
        (lambda t, d: t.update(weights=t["weights"].half()), "float32 or in float64"),
        (lambda t, d: t.update(more=torch.zeros(3)), "found .*more"),
        (lambda t, d: d.update(norm="exp"), "norm: expected logits or none"),
        (lambda t, d: d.pop("norm"), "expected a circuit"),
        (lambda t, d: d["graph"].update(regions=[]), "regions: expected at least one, found none"),
        (lambda t, d: d["graph"]["regions"][0].update(units=-1), "units: expected an integer"),
        (lambda t, d: d["graph"]["regions"][0].update(units=2**30), "units, found"),
        (lambda t, d: d["graph"]["regions"][0].update(units=True), "units: expected an integer"),
        (lambda t, d: d["graph"]["regions"][0].update(variables=[2**40]), "variables: expected"),
        (lambda t, d: d["graph"]["regions"][0].update(variables=[2**20]), "an input for every"),
        (lambda t, d: d["graph"]["regions"][0]["leaf"].update(family="os"), "family: expected"),
        (lambda t, d: d["graph"]["regions"][0]["leaf"].update(extra=1), "expected the fields"),
        (
            lambda t, d: d["graph"]["regions"][0]["leaf"].update(num_categories=0),
            "num_categories: expected a positive whole number",
        ),
        (
            lambda t, d: d["graph"]["regions"][1].update(partitions=[["hadamard", 9]]),
            "children: expected regions before region ",
        ),
        (
            lambda t, d: d["graph"]["regions"][1].update(partitions=[["hadamard", "0"]]),
            "partitions: expected",
        ),
        (lambda t, d: d["graph"]["regions"][1].update(partitions={}), "partitions: expected"),
        (lambda t, d: d["graph"]["regions"].append(7), "region 2: expected an object"),
    ],
)
def test_invalid_file_raises(tmp_path, change, message):
    path = tmp_path / "c.safetensors"
    circuit_of(GRAPHS["cp"]()).save(path)
    tensors, metadata = parts(path)
    data = json.loads(metadata["lora_ext.circuit"])
    change(tensors, data)
    save_file(tensors, path, {"lora_ext.circuit": json.dumps(data)})
    with pytest.raises(ValueError, match=message):
        Circuit.load(path)


def test_file_without_a_circuit_raises(tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="expected a circuit"):
        Circuit.load(path)
    save_file({"a": torch.zeros(2)}, path, {"lora_ext.circuit": "{]"})
    with pytest.raises(ValueError, match="expected JSON"):
        Circuit.load(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="header length"):
        Circuit.load(path)
