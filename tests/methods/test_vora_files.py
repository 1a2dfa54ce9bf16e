"""VoRA's state dicts, the authors' checkpoints and PEFT's files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from methods.vora_support import VOCAB, language, seeing, settings, shake
from torch import Tensor

from lora_ext.adapter import LoraAdapter
from lora_ext.methods import vora

IDS = torch.arange(14).view(2, 7) * 5 % VOCAB
FIRST = "model.layers.0.self_attn.q_proj"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def released(model: Any, biased: tuple[str, ...] = ("o_proj", "up_proj")) -> dict[str, Tensor]:
    """Return the tensors of a :class:`VoraForCausalLM` under the names of the authors' code."""
    lm, found = model.model, {}
    for name, value in vora.state_dict(model).items():
        key = name.replace("vision.", "vision_embedding.", 1)
        if name.startswith("heads."):
            key = "aux_vision.aux_layer_" + name.removeprefix("heads.")
        found[key if key != name else f"llm.{name}"] = value.clone()
    for name, layer in lm.named_modules():
        if isinstance(layer, vora.VoraLinear):
            found[f"llm.{name}.weight"] = layer.base_layer.weight.detach() + 1
            if name.endswith(biased) or layer.base_layer.bias is not None:
                found[f"llm.{name}.bias"] = torch.full((layer.out_features,), 0.25)
    found["llm.lm_head.weight"] = lm.lm_head.weight.detach() + 1
    found["llm.model.norm.weight"] = lm.model.norm.weight.detach() + 1
    found["aux_vision.aux_model.cls_token"] = torch.zeros(3)
    return found


# -------------------------------------------------------------------------------------------------
# State dicts of this package


def test_state_dict_has_the_factors_under_module_names() -> None:
    model = shake(vora.apply(language(), settings()))
    found = vora.state_dict(model)
    assert list(found)[:2] == [f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"]
    assert len(found) == 2 * 2 * 7
    other = vora.apply(language(), settings())
    assert not torch.equal(logits(other), logits(model))
    assert vora.load_state_dict(other, found) == ([], [])
    assert torch.equal(logits(other), logits(model))


def test_state_dict_of_a_wrapped_model_contains_vision_and_heads() -> None:
    model, other = seeing(teacher=7), seeing(teacher=7)
    found = vora.state_dict(model)
    assert {name.split(".")[0] for name in found} == {"model", "vision", "heads"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"model.{n}".replace(".weight", ".default.weight") if n.startswith("model.") else n
        for n in found
    }
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    vora.load_state_dict(other, found)
    assert all(torch.equal(value, found[name]) for name, value in vora.state_dict(other).items())
    # The language model has no vision modules.
    with pytest.raises(ValueError, match=r"load_state_dict: vision\."):
        vora.load_state_dict(other.model, found)
    assert len(vora.load_state_dict(other.model, found, strict=False).unexpected_keys) == 9


@pytest.mark.parametrize("wrapped", [True, False])
def test_errors_name_missing_unexpected_and_invalid_keys(wrapped: bool) -> None:
    model: Any = seeing() if wrapped else vora.apply(language(), settings())
    good = {name: value + 1 for name, value in vora.state_dict(model).items()}
    before = {name: value.clone() for name, value in vora.state_dict(model).items()}
    key = f"{FIRST}.lora_B.weight"
    missing = {name: value for name, value in good.items() if name != key}
    cases = [
        (missing, f"{key}: expected a tensor, found none"),
        ({**good, "model.layers.2.mlp.up_proj.lora_A.weight": good[key]}, "layers.2.*up_proj"),
        ({**good, "nonsense": good[key]}, "nonsense: expected only tensors"),
        ({**good, key: good[key][:, :1]}, rf"{key}: .*shape \(16, 4\), found \(16, 1\)"),
        ({**good, key: 3.0}, f"{key}: .*found float"),
        ({**good, key: good[key].cfloat()}, f"{key}: .*floating.* found torch.complex64"),
        ({**good, key: good[key].long()}, f"{key}: .*floating.* found torch.int64"),
        ({**good, key: good[key].to("meta")}, f"{key}: expected a dense .*found a meta tensor"),
        ({**good, key: good[key].to_sparse()}, f"{key}: expected a dense .*found torch.sparse"),
        ({**good, f"llm.{key}": good[key]}, f"{key}: expected one tensor .*found a second"),
    ]
    for sd, message in cases:
        with pytest.raises(ValueError, match=f"vora.load_state_dict: .*{message}"):
            vora.load_state_dict(model, sd)
        found = vora.state_dict(model)
        assert all(torch.equal(value, before[name]) for name, value in found.items())
    report = vora.load_state_dict(model, {**missing, "nonsense": good[key]}, strict=False)
    assert report.missing_keys == [key] and report.unexpected_keys == ["nonsense"]
    found = vora.state_dict(model)
    assert all(torch.equal(found[n], good[n] if n != key else before[n]) for n in found)


def test_loading_into_a_merged_layer_is_refused() -> None:
    model = vora.apply(language(), settings())
    model.get_submodule(FIRST).merge()
    with pytest.raises(RuntimeError, match=rf"load_state_dict: {FIRST}: .*merged"):
        vora.load_state_dict(model, vora.state_dict(model))


# -------------------------------------------------------------------------------------------------
# Checkpoints of the authors


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_released_checkpoints_are_loaded(family: str) -> None:
    source, model = seeing(family=family, teacher=7), seeing(family=family, teacher=7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    sd = released(source, biased=())
    base = model.model.lm_head.weight.clone()
    assert vora.load_state_dict(model, sd) == ([], [])
    wanted = vora.state_dict(source)
    assert all(torch.equal(value, wanted[name]) for name, value in vora.state_dict(model).items())
    assert torch.equal(model.model.lm_head.weight, base)
    layer: Any = model.model.get_submodule(FIRST)
    before = layer.base_layer.weight.clone()
    vora.load_state_dict(model, sd, load_base=True)
    assert torch.equal(model.model.lm_head.weight, base + 1)
    assert torch.equal(layer.base_layer.weight, before + 1)
    if family == "qwen2":
        assert (layer.base_layer.bias == 0.25).all()


def test_extra_biases_are_loaded_only_if_allowed() -> None:
    model = seeing()
    sd = released(model)
    key = "llm.model.layers.0.self_attn.o_proj.bias"
    plain = logits(model)
    with pytest.raises(ValueError, match=rf"load_state_dict: {key}: .*allow_extra_bias=True"):
        vora.load_state_dict(model, sd)
    assert vora.load_state_dict(model, sd, strict=False).unexpected_keys[0] == key
    assert torch.equal(logits(model), plain)
    vora.load_state_dict(model, sd, allow_extra_bias=True)
    biased = logits(model)
    layer: Any = model.model.get_submodule("model.layers.0.self_attn.o_proj")
    x = torch.randn(3, 16)
    update = layer.scale * (x @ layer.A.T @ layer.B.T)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + update + 0.25)
    assert layer.base_layer.bias is None and not torch.equal(biased, plain)
    # A model with extra biases loads a state dict with them, and rejects one without them.
    vora.load_state_dict(model, vora.state_dict(model))
    without = {name: t for name, t in vora.state_dict(model).items() if "_proj.bias" not in name}
    with pytest.raises(ValueError, match=r"load_state_dict: .*o_proj\.bias: .*found none"):
        vora.load_state_dict(model, without)
    assert torch.equal(logits(model), biased)
    saved = vora.state_dict(model)
    other = seeing()
    vora.load_state_dict(other, saved, allow_extra_bias=True)
    assert torch.equal(logits(other), biased)
    vora.merge(other)
    torch.testing.assert_close(logits(other), biased, rtol=1e-4, atol=1e-3)
    assert other.model.get_submodule("model.layers.0.self_attn.o_proj").bias.requires_grad
    nothing = vora.apply(language(), settings(scale=0.0))
    with pytest.raises(ValueError, match=r"o_proj\.bias: expected no bias if the scale is 0"):
        vora.load_state_dict(nothing, sd, strict=False, allow_extra_bias=True)
    vora.remove(model)  # the base model has no bias here
    assert model.model.get_submodule("model.layers.0.self_attn.o_proj").bias is None


# -------------------------------------------------------------------------------------------------
# Files of PEFT


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_peft_computes_equal_logits(family: str, biased: bool, tmp_path: Path) -> None:
    model = shake(vora.apply(language(family), settings(family=family, scale=0.3)))
    if biased:
        layer = next(m for m in model.modules() if isinstance(m, vora.VoraLinear))
        layer.set_extra_bias(torch.linspace(-1, 1, layer.out_features))
    expected = logits(model)
    vora.to_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == pytest.approx(4 * 0.3)
    assert config["layers_to_transform"] == [0, 1]
    assert config["target_modules"] == list(settings(family=family).target_modules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # transformers warns about PEFT.
        if biased:  # PEFT warns that it cannot merge biases.
            warnings.filterwarnings("ignore", message=".*lora_bias=True.*")
        theirs = peft.PeftModel.from_pretrained(language(family), str(tmp_path))
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    # The files are loaded into existing layers, and into a model without layers.
    for other in (
        vora.apply(language(family), settings(family=family, scale=0.3)),
        language(family),
    ):
        assert vora.from_peft(other, tmp_path) is other
        assert torch.equal(logits(other), expected)
        with pytest.raises(RuntimeError, match=r"call vora\.remove"):
            vora.apply(other, settings(family=family))


@pytest.mark.parametrize(("scale", "rank"), [(1, 4), (0.1, 3), (0.7, 3), (0.0, 2), (-1 / 3, 7)])
def test_any_scale_is_saved_and_loaded(scale: float, rank: int, tmp_path: Path) -> None:
    # At rank 3, no float alpha gives a scale of exactly 0.1.
    fields = {"scale": scale, "rank": rank}
    model = shake(vora.apply(language(), settings(**fields)))
    vora.to_peft(model, tmp_path)
    assert LoraAdapter.load(tmp_path) == LoraAdapter.from_model(model)
    other = vora.from_peft(vora.apply(language(), settings(**fields)), tmp_path)
    assert torch.equal(logits(other), logits(model))
    torch.testing.assert_close(logits(vora.from_peft(language(), tmp_path)), logits(model))


def test_wrapped_model_saves_the_language_models_names(tmp_path: Path) -> None:
    model = seeing()
    vora.to_peft(model, tmp_path)
    assert f"{FIRST}" in LoraAdapter.load(tmp_path).modules
    other = seeing(n_blocks=2)
    with torch.no_grad():
        other.model.get_submodule(FIRST).B.zero_()
    vora.from_peft(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_names_that_are_suffixes_are_saved_in_full(tmp_path: Path) -> None:
    # Without an outer model, names begin with the list of blocks, which PEFT's rule for layers does
    # not match.
    model = language("gpt2").transformer
    vora.apply(model, settings(family="gpt2", target_modules=["mlp.c_fc"]))
    vora.to_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(language("gpt2").transformer, str(tmp_path))
    found = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert found == {"h.0.mlp.c_fc", "h.1.mlp.c_fc"}


def test_route_vision_cannot_be_saved_for_peft(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    model = vora.apply(language(), settings("vision"))
    with pytest.raises(vora.UnmergeableRouteError, match=r"vora\.to_peft: route: expected 'all'"):
        vora.to_peft(model, folder)
    assert not folder.exists()
    vora.to_peft(vora.apply(language(), settings()), folder)
    with pytest.raises(vora.UnmergeableRouteError, match=r"vora\.from_peft: route: expected 'all'"):
        vora.from_peft(model, folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 3}, rf"{FIRST}: lora_A: expected shape \(3, 16\), found \(4, 16\)"),
        ({"scale": 2.0}, rf"{FIRST}: scale: expected 2\.0, found 0\.5"),
        ({"n_blocks": 1}, r"model\.layers\.1\.[a-z_.]+: expected modules in the first 1 blocks"),
        (
            {"n_blocks": 3},
            r"model\.layers\.2\.self_attn\.q_proj: expected factors in the folder, found none",
        ),
    ],
)
def test_adapter_that_does_not_fit_is_refused(fields: Any, message: str, tmp_path: Path) -> None:
    vora.to_peft(shake(vora.apply(language(), settings())), tmp_path)
    model = vora.apply(language(), settings(**fields))
    before = logits(model)
    with pytest.raises(ValueError, match=rf"vora\.from_peft: {message}"):
        vora.from_peft(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_failed_from_peft_adds_no_layers(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=[FIRST, "model.layers.1.mlp.up_proj"])
    peft.get_peft_model(language(), config).save_pretrained(tmp_path)
    model = language()
    with pytest.raises(
        ValueError, match=r"vora\.from_peft: model\.layers\.0\.mlp\.up_proj: .*none"
    ):
        vora.from_peft(model, tmp_path)
    assert not any(isinstance(m, vora.VoraLinear) for m in model.modules())
