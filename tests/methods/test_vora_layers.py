"""`apply`, `remove` and `merge` of VoRA layers in models of several families."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from methods.vora_support import VOCAB, language, settings, shake
from torch import nn

from lora_ext.methods import vora
from lora_ext.nn import LoraConfig, LoraLinear, VoraLinear, modality, wrap

FAMILIES = ("llama", "qwen2", "gpt2")
IDS = torch.arange(14).view(2, 7) * 5 % VOCAB


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **options).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("route", ["all", "vision"])
def test_initial_model_equals_the_base_model_bitwise(route: str, family: str) -> None:
    model = language(family)
    expected, modules = logits(model), dict(model.named_modules())
    assert vora.apply(model, settings(route, family=family)) is model
    with modality(torch.ones_like(IDS)):
        assert torch.equal(logits(model), expected)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, VoraLinear)}
    per_block = {"llama": 7, "qwen2": 7, "gpt2": 4}[family]
    assert len(layers) == 2 * per_block
    for name, layer in layers.items():
        assert layer.base_layer is modules[name]
        assert (layer.base_layer.bias is None) == (modules[name].bias is None)
    for name, module in modules.items():  # other modules are unchanged
        if name and name not in layers:
            assert model.get_submodule(name) is module
    assert not any(".2." in name for name in layers)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.lora_{f}.default.weight" for n in layers for f in "AB"}


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_restores_every_object_and_flag(family: str) -> None:
    model = language(family)
    next(model.parameters()).requires_grad_(False)
    modules, flags = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    state, keys, expected = copy.deepcopy(model.state_dict()), set(model.__dict__), logits(model)
    vora.apply(model, settings("vision", family=family))
    shake(model)
    assert vora.remove(model) is model
    assert dict(model.named_modules()) == modules and set(model.__dict__) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)
    vora.apply(model, settings(family=family))
    with pytest.raises(RuntimeError, match=r"vora\.apply: model: .*call vora\.remove first"):
        vora.apply(model, settings(family=family))
    vora.remove(model)
    with pytest.raises(RuntimeError, match=r"vora\.remove: model: expected .*found no VoRA layers"):
        vora.remove(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_folds_the_layers_into_the_base_model(family: str) -> None:
    model = language(family)
    modules = dict(model.named_modules())
    shake(vora.apply(model, settings(family=family)))
    expected = logits(model)
    assert vora.merge(model) is model
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    assert dict(model.named_modules()) == modules
    assert (logits(model) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert all(p.requires_grad for p in model.parameters())
    for again in (vora.merge, vora.remove, vora.state_dict):
        with pytest.raises(RuntimeError, match=r"whose VoRA layers vora\.merge has merged"):
            again(model)
    vora.apply(model, settings(family=family))
    vora.remove(model)


def test_route_vision_merges_only_with_force() -> None:
    model = shake(vora.apply(language(), settings("vision")))
    before = copy.deepcopy(model.state_dict())
    message = r"vora\.merge: model\.layers\.0\..*: route: expected 'all', found 'vision'"
    with pytest.raises(vora.UnmergeableRouteError, match=message):
        vora.merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with modality(torch.ones_like(IDS)):
        everywhere = logits(model)
    vora.merge(model, force=True)
    torch.testing.assert_close(logits(model), everywhere, rtol=0, atol=1e-3)


def test_merge_in_bfloat16_rounds_once() -> None:
    model = language().bfloat16()
    shake(vora.apply(model, settings()))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.A.dtype == torch.float32
    expected = layer.base_layer.weight.float() + layer.scale * (layer.B @ layer.A)
    vora.merge(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected.bfloat16())
    narrow = vora.apply(language().bfloat16(), settings(), autocast_adapter_dtype=False)
    assert narrow.model.layers[0].mlp.up_proj.A.dtype == torch.bfloat16


def test_failed_merge_leaves_the_model_unchanged() -> None:
    model = shake(vora.apply(language(), settings()))
    last = model.model.layers[1].mlp.down_proj
    last.merge()
    before = model.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    for act, name in ((vora.merge, "merge"), (vora.remove, "remove")):
        with pytest.raises(RuntimeError, match=rf"vora\.{name}: model\.layers\.1\.mlp\.down_proj:"):
            act(model)
    last.unmerge()
    last.base_layer.weight = nn.Parameter(
        torch.zeros(last.base_layer.weight.shape, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(NotImplementedError, match=r"vora\.merge: .*down_proj: .*quantised"):
        vora.merge(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.base_layer.weight, before)


def test_tied_weight_is_not_merged() -> None:
    model = language()
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight = attention.v_proj.weight
    shake(vora.apply(model, settings()))
    before = copy.deepcopy(model.state_dict())
    message = r"vora\.merge: .*k_proj: expected a weight that is not shared, found a weight of \["
    with pytest.raises(ValueError, match=message):
        vora.merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_copies_and_pickles_are_independent_models() -> None:
    model = shake(vora.apply(language(), settings()))
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        vora.remove(twin)
        assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)


# -------------------------------------------------------------------------------------------------
# Errors


def test_more_blocks_than_the_model_has_are_refused() -> None:
    model = language()
    with pytest.raises(ValueError, match=r"n_blocks: .* at most the number of blocks, 3, found 4"):
        vora.apply(model, settings(n_blocks=4))
    assert all(p.requires_grad for p in model.parameters())
    vora.apply(model, settings(n_blocks=3))


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vora\.apply: target_modules: .*found \('qkv',\)"):
        vora.apply(language(), settings(target_modules=["qkv"]))


def test_targets_other_than_linear_layers_are_refused() -> None:
    model = language()
    with pytest.raises(TypeError, match=r"layers\.0\.mlp: .*nn\.Linear.*found LlamaMLP"):
        vora.apply(model, settings(target_modules=["q_proj", "mlp"]))
    assert not any(isinstance(m, VoraLinear) for m in model.modules())


def test_models_with_other_adapters_are_refused() -> None:
    model = wrap(language(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match=r"vora\.apply: model: .*LoraLinear.*q_proj"):
        vora.apply(model, settings())
    with pytest.raises(TypeError, match=r"vora\.apply: config: expected a VoraConfig, found dict"):
        vora.apply(language(), {})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("n_blocks", 0, "an integer from 1"),
        ("n_blocks", True, "an integer from 1"),
        ("rank", 0, "an integer from 1"),
        ("rank", 2.0, "an integer from 1"),
        ("scale", float("nan"), "a finite number"),
        ("target_modules", (), "at least one name"),
        ("target_modules", "q_proj", "at least one name"),
        ("target_modules", None, "at least one name"),
        ("target_modules", 3, "at least one name"),
        ("route", "text", r"one of \('all', 'vision'\)"),
        ("image_size", 449, "a multiple of the patch size 14"),
        ("patch", 0, "an integer from 1"),
        ("embed_dim", -1, "an integer from 1"),
        ("pos_mode", "none", "one of"),
        ("bidirectional", 1, "True or False"),
        ("pairing", "input", "one of"),
        ("distill_weight", -0.5, "a number from 0"),
        ("placeholder", "<image>", "an int"),
    ],
)
def test_errors_name_invalid_fields(field: str, value: Any, expected: str) -> None:
    fields = {"n_blocks": 2, field: value}
    with pytest.raises(ValueError, match=f"VoraConfig: {field}: expected {expected}.*found"):
        vora.VoraConfig(**fields)


def test_targets_may_be_any_iterable() -> None:
    given: Any = (name for name in ("q_proj", "up_proj"))
    assert vora.VoraConfig(2, target_modules=given).target_modules == ("q_proj", "up_proj")


def test_defaults_are_those_of_the_paper() -> None:
    config = vora.VoraConfig(24)
    assert (config.rank, config.scale, config.route) == (1024, 1.0, "all")
    assert (config.image_size, config.patch, config.embed_dim) == (448, 14, 1536)
    assert config.target_modules == (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    assert config.placeholder == -200 and config.distill_weight == 1.0
