"""SPLoRA on models in memory: layers of three kinds are switched off and on again."""

from __future__ import annotations

import copy

import pytest
import torch
from adapted_models import KINDS, adapted, llama
from methods.test_splora_pruning import logits, models
from torch import nn
from torch.profiler import ProfilerActivity, profile

import lora_ext
from lora_ext.adapter._peft_tensors import base_name
from lora_ext.methods import splora
from lora_ext.methods.splora import SploraConfig
from lora_ext.nn import adapted_layers, is_active, set_active


def off(model: nn.Module, adapter: str = "default") -> list[str]:
    """Return the base names of the layers that are switched off."""
    layers = adapted_layers(model, adapter)
    return [base_name(name) for name, m in layers.items() if not is_active(m, adapter)]


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_layers_equal_base_layers_bitwise_and_remove_restores_them(kind: str):
    model, (base, aligned) = adapted(kind), models()
    before, flags = logits(model), {n: p.requires_grad for n, p in model.named_parameters()}
    result = splora.apply_to(model, base, aligned, SploraConfig(direction="smallest", num=2))
    assert sorted(off(model)) == sorted(result.pruned) and len(result.pruned) == 2
    x = torch.randn(3, 16)
    for name, layer in adapted_layers(model).items():
        if base_name(name) in result.pruned and "q_proj" in name:
            assert torch.equal(layer(x), layer.base_layer(x))
    assert not torch.equal(logits(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    splora.remove(model)
    assert not off(model) and torch.equal(logits(model), before)
    assert "_lora_ext_splora" not in model.__dict__
    splora.apply_to(model, base, aligned, SploraConfig(direction="smallest", num=1))


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_none_changes_no_bit_and_pruning_all_gives_the_base_model(kind: str):
    model, (base, aligned) = adapted(kind), models()
    before = logits(model)
    splora.apply_to(model, base, aligned, SploraConfig(direction="smallest", num=0))
    assert torch.equal(logits(model), before)
    splora.remove(model)
    splora.apply_to(model, base, aligned, SploraConfig(direction="smallest", num=6))
    assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("kind", KINDS)
def test_off_layer_runs_only_the_operators_of_its_base_layer(kind: str):
    model, (base, aligned) = adapted(kind), models()
    splora.apply_to(model, base, aligned, SploraConfig(direction="smallest", num=6))
    layer = next(m for n, m in adapted_layers(model).items() if n.endswith("0.mlp.down_proj"))
    x = torch.randn(5, 24, requires_grad=True)

    def operators(run) -> list[str]:
        with profile(activities=[ProfilerActivity.CPU]) as found:
            run()
        return [e.name for e in found.events() if "profiler" not in e.name.lower()]

    assert operators(lambda: layer(x)) == operators(lambda: layer.base_layer(x))


def test_same_layers_are_selected_for_every_kind():
    base, aligned = models()
    results = [
        splora.apply_to(adapted(k), base, aligned, SploraConfig(direction="smallest", num=3))
        for k in KINDS
    ]
    assert results[0].pruned == results[1].pruned == results[2].pruned
    assert results[0].stats == results[1].stats == results[2].stats


def test_model_may_be_its_own_aligned_model():
    # SPLoRA compares the base weights below the adapters.
    base, _ = models()
    model = adapted("peft")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" not in name:
                p += 0.01
    result = splora.apply_to(model, base, model, SploraConfig(direction="smallest", num=1))
    assert result.pruned == off(model)


def test_second_apply_names_remove_and_remove_needs_an_apply():
    model, (base, aligned) = adapted("ours"), models()
    with pytest.raises(RuntimeError, match=r"remove: model: expected a model pruned by apply_to"):
        splora.remove(model)
    splora.apply_to(model, base, aligned, SploraConfig(direction="smallest", num=1))
    with pytest.raises(RuntimeError, match=r"apply_to: model: .*call splora.remove\(model\) first"):
        splora.apply_to(model, base, aligned, SploraConfig(direction="smallest", num=1))
    assert len(off(model)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_were_off_before_stay_off(kind: str):
    model, (base, aligned) = adapted(kind), models()
    name, layer = next(iter(adapted_layers(model).items()))
    set_active(layer, "default", False)
    splora.apply_to(model, base, aligned, SploraConfig(direction="smallest", num=6))
    assert len(off(model)) == 6
    splora.remove(model)
    assert off(model) == [base_name(name)]


@pytest.mark.parametrize("kind", KINDS)
def test_other_adapters_of_the_model_are_unchanged(kind: str):
    model, (base, aligned) = adapted(kind, "red", "blue"), models()
    splora.apply_to(model, base, aligned, SploraConfig(direction="smallest", num=6), adapter="blue")
    assert len(off(model, "blue")) == 6 and not off(model, "red")


@pytest.mark.parametrize("kind", KINDS)
def test_copy_is_restored_independently(kind: str):
    model, (base, aligned) = adapted(kind), models()
    splora.apply_to(model, base, aligned, SploraConfig(direction="smallest", num=2))
    twin = copy.deepcopy(model)
    splora.remove(twin)
    assert not off(twin) and len(off(model)) == 2


def test_from_peft_keeps_pruned_layers_off():
    model, (base, aligned) = adapted("peft"), models()
    splora.apply_to(model, base, aligned, SploraConfig(direction="smallest", num=2))
    pruned, expected = off(model), logits(model)
    model = lora_ext.from_peft(model)
    assert off(model) == pruned
    torch.testing.assert_close(logits(model), expected)
    splora.remove(model)
    assert not off(model)


@pytest.mark.parametrize("kind", KINDS)
def test_model_with_a_merged_adapter_is_refused_unchanged(kind: str):
    model, (base, aligned) = adapted(kind), models()
    for layer in adapted_layers(model).values():
        layer.merge()
    before = logits(model)
    with pytest.raises(ValueError, match="merged into the base weight; unmerge it first"):
        splora.apply_to(model, base, aligned, SploraConfig(direction="smallest", num=2))
    assert not off(model) and torch.equal(logits(model), before)
    assert "_lora_ext_splora" not in model.__dict__


def test_error_names_absent_adapter():
    with pytest.raises(ValueError, match=r"adapter: expected one of \['default'\], found 'gone'"):
        splora.apply_to(
            adapted("ours"), *models(), SploraConfig(direction="smallest", num=1), adapter="gone"
        )


def test_remove_accepts_a_deleted_adapter():
    model, (base, aligned) = adapted("ours", "red", "blue"), models()
    splora.apply_to(model, base, aligned, SploraConfig(direction="smallest", num=3), adapter="blue")
    for layer in adapted_layers(model).values():
        layer.delete_adapter("blue")
    splora.remove(model)
    assert not off(model, "red")
