"""SPLoRA makes no tensor larger than an eighth of a weight, and scores SmolLM2 in 100 MB."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_ext
from lora_ext.methods.splora import SploraConfig, ediem_scores, project_factor

SCRIPT = Path(__file__).with_name("splora_memory.py")
SIZE, RANK = 4096, 8


class Sizes(TorchDispatchMode):
    """Mode that records the bytes of the largest tensor made by any operator, without views."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest, self.by = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                if t.untyped_storage().nbytes() > self.largest:
                    self.largest, self.by = t.untyped_storage().nbytes(), str(func)
        return found


def large_layer(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(SIZE, SIZE, generator=g).to(dtype)
    a, b = torch.randn(RANK, SIZE, generator=g), torch.randn(SIZE, RANK, generator=g)
    return a, b, base, base + base.flip(0) * 0.125


def score(a: torch.Tensor, b: torch.Tensor, base: torch.Tensor, aligned: torch.Tensor) -> None:
    ediem_scores(
        {"up.lora_A.weight": a, "up.lora_B.weight": b},
        {"up.weight": base},
        {"up.weight": aligned},
        SploraConfig(direction="smallest", reference="permutation", n_samples=2),
    )


def map_alone(a: torch.Tensor, b: torch.Tensor, base: torch.Tensor, aligned: torch.Tensor) -> None:
    project_factor(b, base, aligned)


@pytest.mark.parametrize("run", [score, map_alone])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_a_large_layer_take_at_most_an_eighth_of_a_weight(
    run: Callable[..., None], dtype: torch.dtype
):
    tensors = large_layer(dtype)
    weight = tensors[2].nbytes
    with Sizes(*tensors) as sizes:
        run(*tensors)
    print(f"largest of {dtype}: {sizes.largest / weight:.3f} of a weight, made by {sizes.by}")
    assert 0 < sizes.largest <= weight / 8


@pytest.mark.slow
def test_smollm2_is_scored_within_a_hundred_megabytes(tmp_path: Path):
    # Base and aligned model are folders; the adapter has every linear layer of every block.
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    from lora_ext.interop import smollm2
    from lora_ext.nn import LoraConfig, wrap

    try:
        base = smollm2.converted_folder()
        model, _ = smollm2.load_smollm2()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    wrap(model, LoraConfig(r=8, init_lora_weights=False))
    from lora_ext.adapter import LoraAdapter

    adapter = LoraAdapter.from_model(model)
    adapter.save(tmp_path / "adapter")
    (tmp_path / "aligned").mkdir()
    weights = {k: t * 1.01 for k, t in load_file(base / "model.safetensors").items()}
    save_file(weights, tmp_path / "aligned" / "model.safetensors")
    folders = [str(f) for f in (tmp_path / "adapter", base, tmp_path / "aligned")]
    tree = {**os.environ, "PYTHONPATH": str(Path(lora_ext.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *folders],
        capture_output=True,
        text=True,
        check=True,
        env=tree,
    )
    mebibytes, layers = done.stdout.split()
    print(f"{float(mebibytes):.1f} MiB of additional memory, {layers} layers")
    assert int(layers) == len(adapter.modules) == 210
    assert float(mebibytes) < 100e6 / 2**20
