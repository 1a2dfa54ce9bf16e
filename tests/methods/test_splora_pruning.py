"""SPLoRA on :class:`LoraAdapter` objects: selection, pruning, projection and saving."""

from __future__ import annotations

import logging
from pathlib import Path

import peft
import pytest
import torch
from adapted_models import adapted, llama
from methods.splora_support import blocks, made, name_of
from torch import nn

import lora_ext
from lora_ext.adapter import LoraAdapter
from lora_ext.methods import splora
from lora_ext.methods.splora import LayerStats, SploraConfig, project_factor, select_layers

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def rows(*scores: float, names: list[str] | None = None) -> list[LayerStats]:
    names = [name_of(i) for i in range(len(scores))] if names is None else names
    return [LayerStats(n, 4, s, 1.0, 1.0, 0.0, s) for n, s in zip(names, scores, strict=True)]


def models() -> tuple[nn.Module, nn.Module]:
    """Return a base model, and an aligned one in which every matrix differs slightly."""
    base, aligned = llama(), llama()
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in aligned.parameters():
            p += 0.01 * torch.randn(p.shape, generator=g)
    return base, aligned


# -------------------------------------------------------------------------------------------------
# Selection

SCORES = rows(3, 1, 2, 1, 5)


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({"num": 0}, []),
        ({"num": 1}, [1]),  # Of two layers with equal scores, the first one is chosen.
        ({"num": 3}, [1, 2, 3]),
        ({"num": 5}, [0, 1, 2, 3, 4]),
        ({"num": 2, "direction": "largest"}, [0, 4]),
        ({"num": 4, "direction": "largest"}, [0, 1, 2, 4]),
        ({"threshold": 2}, [1, 2, 3]),
        ({"threshold": 2, "direction": "largest"}, [0, 2, 4]),
        ({"threshold": float("inf")}, [0, 1, 2, 3, 4]),
        ({"threshold": 0.5}, []),
    ],
    ids=str,
)
def test_selected_layers_are_those_at_one_end_of_the_scores(fields: dict, chosen: list[int]):
    assert select_layers(SCORES, SploraConfig(**{"direction": "smallest", **fields})) == [
        name_of(i) for i in chosen
    ]


def test_blocks_are_pruned_whole_by_the_mean_score_of_their_modules():
    names = [*blocks(2), "model.score"]
    stats = rows(1, 5, 2, 3, 4, names=names)  # Block means are 3 and 2.5; 4 is outside of blocks.
    found = select_layers(stats, SploraConfig(direction="smallest", num=1, granularity="block"))
    assert found == [name_of(1), name_of(1, "v_proj")]
    largest = SploraConfig(num=1, granularity="block", direction="largest")
    assert select_layers(stats, largest) == ["model.score"]
    assert (
        select_layers(stats, SploraConfig(direction="smallest", threshold=3, granularity="block"))
        == names[:4]
    )
    with pytest.raises(ValueError, match="num: expected at most 3, the number of blocks"):
        select_layers(stats, SploraConfig(direction="smallest", num=4, granularity="block"))


# -------------------------------------------------------------------------------------------------
# Pruning


@pytest.mark.parametrize("mode", ["remove", "zero"])
def test_kept_layers_share_their_tensors_and_inputs_are_unchanged(mode: str):
    adapter, base, aligned = made(blocks())
    before = [
        {k: (t, t.clone()) for k, t in s.items()} for s in (adapter.state_dict(), base, aligned)
    ]
    result = splora.apply(
        adapter, base, aligned, SploraConfig(direction="smallest", num=3, mode=mode)
    )
    assert len(result.pruned) == 3 and set(result.pruned) | set(result.kept) == set(blocks())
    assert result.pruned == select_layers(result.stats, result.config)
    for name in result.kept:
        assert result.adapter.modules[name].a is adapter.modules[name].a
        assert result.adapter.modules[name].b is adapter.modules[name].b
    for name in result.pruned:
        if mode == "remove":
            assert name not in result.adapter.modules
        else:
            b = adapter.modules[name].b
            assert torch.equal(result.adapter.modules[name].b, torch.zeros_like(b))
    for state, kept in zip((adapter.state_dict(), base, aligned), before, strict=True):
        for key, (tensor, copy) in kept.items():
            assert state[key] is tensor and torch.equal(tensor, copy)


def test_pruning_none_changes_nothing_and_pruning_all_leaves_no_module():
    adapter, base, aligned = made(blocks())
    none = splora.apply(adapter, base, aligned, SploraConfig(direction="smallest", num=0))
    assert none.adapter == adapter and none.pruned == [] and none.kept == [*blocks()]
    every = splora.apply(adapter, base, aligned, SploraConfig(direction="smallest", num=8))
    assert not every.adapter.modules and every.kept == []


def test_kept_modules_are_named_in_full():
    adapter, base, aligned = made(blocks(), r=2)
    result = splora.apply(adapter, base, aligned, SploraConfig(direction="smallest", num=3))
    assert sorted(result.adapter.config.target_modules) == sorted(result.kept)


def test_log_and_result_contain_direction_and_numbers(
    caplog: pytest.LogCaptureFixture,
):
    adapter, base, aligned = made(blocks())
    config = SploraConfig(num=3, direction="largest")
    with caplog.at_level(logging.INFO, logger="lora_ext"):
        result = splora.apply(adapter, base, aligned, config)
    assert result.direction == "largest" and result.config is config
    assert caplog.messages == [str(result)]
    assert "pruned 3 of 8 layers, those with the largest scores (direction='largest', num=3" in str(
        result
    )


def test_layers_with_equal_weights_are_kept_with_on_zero_alignment_skip():
    adapter, base, aligned = made(blocks())
    same = name_of(1)
    aligned[f"{same}.weight"] = base[f"{same}.weight"].clone()
    config = SploraConfig(direction="smallest", num=7, on_zero_alignment="skip")
    result = splora.apply(adapter, base, aligned, config)
    assert result.kept == result.unscored == [same] and len(result.stats) == 7
    assert "1 not scored" in str(result)
    assert splora.project(adapter, base, aligned, [same], config) == adapter


def test_progress_iterates_over_every_layer():
    adapter, base, aligned = made(blocks())
    seen: list[str] = []

    def progress(layers):
        for layer in layers:
            seen.append(layer.name)
            yield layer

    splora.apply(
        adapter, base, aligned, SploraConfig(direction="smallest", num=1), progress=progress
    )
    assert seen == [*blocks()]


# -------------------------------------------------------------------------------------------------
# Safe LoRA


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_projected_layers_have_p_b_in_the_dtype_of_b(dtype: torch.dtype):
    adapter, base, aligned = made(blocks(), dtype=dtype)
    chosen = [name_of(0), name_of(2, "v_proj")]
    found = splora.project(adapter, base, aligned, chosen)
    for name, factors in adapter.modules.items():
        new = found.modules[name]
        assert new.a is factors.a
        if name in chosen:
            key = f"{name}.weight"
            expected = project_factor(factors.b, base[key], aligned[key])
            assert new.b.dtype == dtype and torch.equal(new.b, expected)
        else:
            assert new.b is factors.b
    assert found.config == adapter.config


def test_bias_of_an_update_is_projected_like_b():
    adapter, base, aligned = made(blocks(), lora_bias=True)
    name = name_of(0)
    found = splora.project(adapter, base, aligned, [name]).modules[name]
    pair = base[f"{name}.weight"], aligned[f"{name}.weight"]
    bias = project_factor(adapter.modules[name].bias[:, None], *pair)
    torch.testing.assert_close(found.bias, bias[:, 0])
    torch.testing.assert_close(found.b, project_factor(adapter.modules[name].b, *pair))


# -------------------------------------------------------------------------------------------------
# Folders, PEFT, models


@pytest.mark.parametrize("safe_lora", [False, True])
def test_pruned_adapter_is_saved_and_loaded_by_peft_and_a_pool(tmp_path: Path, safe_lora: bool):
    base, aligned = models()
    for name, model in (("base", base), ("aligned", aligned)):
        model.save_pretrained(tmp_path / name)
    adapted("peft").save_pretrained(tmp_path / "adapter")
    folders = [tmp_path / each for each in ("adapter", "base", "aligned")]
    config = SploraConfig(direction="smallest", num=2)
    result = splora.apply(*folders, config)
    live = splora.apply(LoraAdapter.from_model(adapted("ours")), base, aligned, config)
    assert (live.stats, live.pruned) == (result.stats, result.pruned)
    value = splora.project(*folders, result.pruned) if safe_lora else result.adapter
    value.save(tmp_path / "pruned")

    _, other = models()
    served = peft.PeftModel.from_pretrained(other, tmp_path / "pruned")
    report = served.load_adapter(tmp_path / "pruned", "again")
    assert not report.missing_keys and not report.unexpected_keys
    layers = [m for m in served.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(layers) == (6 if safe_lora else 4)

    expected = logits(served)
    _, other = models()
    pool = lora_ext.AdapterPool(other, max_slots=1, max_rank=8)
    pool.load("pruned", tmp_path / "pruned")
    lora_ext.attach(other, pool)
    with lora_ext.adapters(["pruned", "pruned"]):
        torch.testing.assert_close(logits(other), expected)
    assert not torch.equal(expected, logits(models()[1]))


def test_zeroed_layers_equal_removed_ones(tmp_path: Path):
    base, aligned = models()
    adapter = LoraAdapter.from_model(adapted("peft"))
    found = []
    for mode in ("remove", "zero"):
        splora.apply(
            adapter, base, aligned, SploraConfig(direction="smallest", num=2, mode=mode)
        ).adapter.save(tmp_path / mode)
        found.append(logits(peft.PeftModel.from_pretrained(models()[1], tmp_path / mode)))
    torch.testing.assert_close(*found)
