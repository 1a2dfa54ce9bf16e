"""LoraConfig: it has PEFT's fields, checks them at construction, and matches names by PEFT's
rules."""

from __future__ import annotations

import dataclasses
import json

import peft
import pytest
from adapted_models import llama
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

import lora_ext
from lora_ext import LoraConfig


def names() -> list[str]:
    experts = [f"model.layers.{i}.mlp.experts.{j}.up" for i in range(3) for j in range(2)]
    return [n for n, _ in llama().named_modules() if n] + experts + ["layers.1.q_proj", "q_proj"]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "mlp.up_proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "v_proj"]},
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": r"model\.layers\.[02]\..*proj"},
        {"target_modules": ["proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "up"], "exclude_modules": r".*layers\.0.*"},
        {"target_modules": ["q_proj", "up"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "up"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj", "up"], "layers_to_transform": []},
        {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["h", "experts"]},
        {
            "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
            "layers_to_transform": [2],
        },
    ],
    ids=str,
)
def test_targeted_modules_equal_those_of_peft(fields: dict):
    theirs = peft.LoraConfig(**fields)
    expected = {name for name in names() if check_target_module_exists(theirs, name)}
    assert LoraConfig(**fields).targeted(names(), []) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 2, "self_attn.k_proj": 3},
        {r".*layers\.1.*": 5, "q_proj": 2},
        {"proj": 4},
        {"model.layers.0.self_attn.q_proj": 7, "q_proj": 2},
        {r"^model\.layers\.2\.mlp\.up_proj": 9},
    ],
    ids=str,
)
def test_ranks_and_alphas_equal_those_of_peft(pattern: dict):
    config = LoraConfig(r=8, lora_alpha=16, rank_pattern=pattern, alpha_pattern=pattern)
    found, unused = config.ranks_and_alphas(names())
    for name in names():
        own = pattern.get(get_pattern_key(list(pattern), name))
        assert found[name] == (own or 8, own or 16)
    assert unused == (["rank_pattern['proj']", "alpha_pattern['proj']"] * ("proj" in pattern))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"LoraConfig: r: expected a positive integer, found 0"),
        ({"r": True}, r"LoraConfig: r: expected a positive integer, found True"),
        ({"r": 4.0}, r"LoraConfig: r: expected a positive integer, found 4.0"),
        ({"lora_alpha": float("nan")}, r"LoraConfig: lora_alpha: expected a finite number, found"),
        ({"lora_dropout": 1.0}, r"lora_dropout: expected a probability in \[0, 1\), found 1.0"),
        ({"target_modules": 3}, r"target_modules: expected a string or a list of strings, found 3"),
        ({"target_modules": [3]}, r"target_modules: expected a string or a list of strings"),
        ({"exclude_modules": {"a": 1}}, r"exclude_modules: expected a string or a list"),
        ({"layers_to_transform": [1.5]}, r"layers_to_transform: expected an integer or a list"),
        ({"layers_to_transform": [1]}, r"expected None with a target_modules string"),
        ({"layers_pattern": "h"}, r"layers_pattern: expected None with .* found 'h'"),
        (
            {"target_modules": ["q"], "layers_pattern": "h"},
            r"layers_to_transform: expected indices, as .* is set, found None",
        ),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]: expected a positive integer, found 0"),
        ({"rank_pattern": [4]}, r"rank_pattern: expected an object that maps name patterns to"),
        ({"alpha_pattern": {"q": "x"}}, r"alpha_pattern\['q'\]: expected a finite number"),
        ({"use_dora": 1}, r"use_dora: expected true or false, found 1"),
        ({"use_dora": True, "lora_bias": True}, r"lora_bias: expected false with use_dora"),
        ({"init_lora_weights": "zeros"}, r"init_lora_weights: expected True, False or one of"),
        ({"bias": "all"}, r"bias: expected 'none' .*, found 'all'"),
    ],
    ids=str,
)
def test_invalid_field_raises_at_construction(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


def test_initialisation_that_only_peft_supports_raises():
    with pytest.raises(NotImplementedError, match=r"init_lora_weights: 'eva' is not implemented"):
        LoraConfig(init_lora_weights="eva")


def test_invalid_pattern_raises_where_it_is_matched():
    with pytest.raises(ValueError, match=r"LoraConfig: target_modules: .*\(q"):
        LoraConfig(target_modules="(q").targeted(["q"], [])
    with pytest.raises(ValueError, match=r"LoraConfig: target_modules: expected names, .* None"):
        LoraConfig(target_modules=None).targeted(["q"], [])


def test_config_is_an_immutable_value():
    config = LoraConfig(r=4, target_modules={"v_proj", "q_proj"})
    assert config == LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    assert config != LoraConfig(r=5, target_modules=["q_proj", "v_proj"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 5  # pyright: ignore
    assert dataclasses.replace(config, r=5).r == 5


def test_config_of_peft_accepts_all_fields():
    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        layers_to_transform=1,
        rank_pattern={"q_proj": 2},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    raw = json.loads(json.dumps(config.to_dict()))
    assert raw.pop("peft_type") == "LORA"
    theirs = peft.LoraConfig(**raw)
    assert theirs.target_modules == {"q_proj"} and theirs.rank_pattern == {"q_proj": 2}
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert raw.keys() <= known
    ours = {f.name for f in dataclasses.fields(lora_ext.LoraConfig)}
    assert raw.keys() == ours - {"where", "preserve_base_output"}
