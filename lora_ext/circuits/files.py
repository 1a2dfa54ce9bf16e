"""Circuits as safetensors files; what is read is not trusted."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lora_ext._files import SafetensorsFile, parse_json
from lora_ext.circuits.errors import require
from lora_ext.circuits.layered import compile_graph
from lora_ext.circuits.leaves import fresh_table
from lora_ext.circuits.parameters import Parameters
from lora_ext.circuits.region_graph import RegionGraph

_METADATA = "lora_ext.circuit"
_MAX_UNITS = 1 << 24  # leaf, sum and product units: a small file may describe many


def save(circuit: Parameters, path: str | Path) -> None:
    """``Circuit.save``."""
    from safetensors.torch import save_file  # not with lora_ext: only this needs it

    tensors = {k: t.detach().cpu().contiguous() for k, t in circuit.state_dict().items()}
    text = f'{{"norm": "{circuit.norm}", "graph": {circuit.graph.to_json()}}}'
    save_file(tensors, str(path), {_METADATA: text})


def load(path: str | Path, block: int) -> tuple[RegionGraph, str, dict[str, Tensor]]:
    """Graph, norm and state of the circuit in a file; nothing is read before all is checked."""
    file = SafetensorsFile(Path(path))
    try:
        where = file.where
        data = parse_json(file.metadata.get(_METADATA, "null").encode(), where)
        known = isinstance(data, dict) and data.keys() == {"norm", "graph"}
        require(known, where, "a circuit", f"metadata {[*file.metadata]}")
        norm = data["norm"]
        require(norm in ("logits", "none"), f"{where}: norm", "logits or none", f"{norm!r:.80}")
        graph = RegionGraph.from_json(data["graph"], where)
        units = sum(
            r.units * max(1, r.variables.bit_count()) + graph.num_products(r) for r in graph.regions
        )
        require(units <= _MAX_UNITS, f"{where}: regions", f"at most {_MAX_UNITS} units", units)
        wanted = _state_shapes(graph, block)
        found = {k: info.shape for k, info in file.infos.items()}
        dtypes = {info.dtype for info in file.infos.values()}
        require(found == wanted, where, f"{wanted!r:.300}", f"{found!r:.300}")
        one = len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}
        require(one, where, "tensors in float32 or in float64", dtypes)
        return graph, norm, {k: file.read(k) for k in found}
    finally:
        file.close()


def _state_shapes(graph: RegionGraph, block: int) -> dict[str, tuple[int, ...]]:
    layered = compile_graph(graph, block)
    shapes: dict[str, tuple[int, ...]] = {"weights": (layered.num_weights,)}
    for i, family in enumerate(layered.families):
        for k, t in fresh_table(family.leaf, 0, family.size).items():
            shapes[f"leaves.{i}.{k}"] = (family.rows, *t.shape[1:])
    return shapes
