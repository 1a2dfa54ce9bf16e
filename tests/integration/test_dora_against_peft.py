"""DoRA adapters of a pool compute what PEFT computes, alone and beside plain LoRA in one batch."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import assert_alone_and_mixed_equal_peft, make_model, make_pair

import lora_ext
from lora_ext.adapter import save_adapter

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "red": {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
        "green": {"r": 12, "target_modules": "all-linear", "use_dora": True, "use_rslora": True},
        "blue": {"r": 8, "target_modules": ["q_proj", "o_proj"]},
    },
    "gpt2": {
        "red": {"r": 4, "target_modules": ["c_attn"], "use_dora": True},
        "green": {"r": 12, "target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True},
        "blue": {"r": 8, "target_modules": ["c_attn", "c_fc"], "lora_bias": True},
    },
    "bert": {
        "red": {"r": 4, "target_modules": ["query", "value"], "use_dora": True},
        "green": {"r": 12, "target_modules": "all-linear", "use_dora": True},
        "blue": {"r": 8, "target_modules": ["query", "pooler.dense", "classifier"]},
    },
}
NAMES = ["red", "green", "__base__", "blue", "green", None, "red"]
# float64 throughout, but for the scale, which the pool keeps in float32: these are exact there or,
# like 16 / sqrt(12), wrong by 2**-25 of themselves. Activations are of size one.
BOUND = 1e-6


def make(family: str, directory: Path) -> tuple[Any, Any, lora_ext.AdapterPool]:
    return make_pair(family, directory, CONFIGS[family], torch.float64)


@pytest.mark.parametrize("family", CONFIGS)
def test_alone_and_mixed_equal_peft(family: str, tmp_path: Path) -> None:
    model, reference, _ = make(family, tmp_path)
    moved = assert_alone_and_mixed_equal_peft(model, reference, NAMES, BOUND)
    assert moved.min() > 1e-3


def test_every_spelling_of_the_magnitude_loads(tmp_path: Path) -> None:
    _, reference, pool = make("llama", tmp_path)
    state = {k: v for k, v in reference.state_dict().items() if "lora_" in k and ".red." in k}
    config = reference.peft_config["red"]
    keys = [k for k in state if "magnitude" in k]
    assert keys and all(k.endswith("lora_magnitude_vector.red.weight") for k in keys)
    for end in (".red.weight", ".red", ".weight", ""):
        renamed = {
            k.removesuffix(".red.weight") + end if "magnitude" in k else k: v
            for k, v in state.items()
        }
        pool.load("again", (config, renamed))
        slab = pool.modules["model.layers.0.self_attn.q_proj"]
        with pool.acquire(["red", "again"]) as (red, again):
            assert torch.equal(slab.magnitude[red], slab.magnitude[again])
        pool.unload("again")


def test_peft_loads_the_magnitudes_that_save_adapter_wrote(tmp_path: Path) -> None:
    _, reference, _ = make("llama", tmp_path)
    state = {k: v for k, v in reference.state_dict().items() if ".green." in k}
    save_adapter(tmp_path / "ours", reference.peft_config["green"], state)
    loaded: Any = peft.PeftModel.from_pretrained(
        make_model("llama").double(), tmp_path / "ours", adapter_name="green"
    )
    again = loaded.state_dict()
    assert any("magnitude" in key for key in state)
    assert all(torch.equal(again[key], value) for key, value in state.items())
