"""``adapted_layers`` finds layers with adapters of lora_ext and of PEFT."""

from __future__ import annotations

import pytest
from adapted_models import KINDS, TARGETS, adapted, llama
from torch import nn

import lora_ext
from lora_ext.nn import (
    LoraConv,
    LoraEmbedding,
    LoraLinear,
    adapted_layers,
    adapter_factors,
    adapter_parameters,
    adapters_of,
)


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_layers_are_found_by_full_name_in_model_order(kind: str):
    model = adapted(kind)
    found = adapted_layers(model)
    assert found == {n: m for n, m in model.named_modules() if n.endswith(TARGETS)}
    assert list(found) == [n for n, _ in model.named_modules() if n in found]
    assert len(found) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_only_layers_with_the_given_adapter_are_found(kind: str):
    model = adapted(kind, "first", "second")
    one = next(m for n, m in model.named_modules() if n.endswith("layers.1.self_attn.q_proj"))
    one.delete_adapter("second")
    assert adapters_of(one) == ("first",)
    assert len(adapted_layers(model, "first")) == 6
    found = adapted_layers(model, "second")
    assert len(found) == 5 and one not in found.values()
    with pytest.raises(
        ValueError,
        match=r"adapted_layers: adapter_name: expected an adapter of .*, which has "
        r"\['first', 'second'\], found 'third'",
    ):
        adapted_layers(model, "third")


def test_model_without_adapters_has_no_adapted_layers():
    assert adapted_layers(llama()) == {}
    with pytest.raises(ValueError, match=r"which has \[\], found 'default'"):
        adapted_layers(llama(), "default")


def test_layers_of_every_kind_and_a_single_layer_are_found():
    model = nn.ModuleDict(
        {
            "linear": LoraLinear(nn.Linear(4, 4)),
            "embedding": LoraEmbedding(nn.Embedding(5, 4)),
            "patches": LoraConv(nn.Conv2d(3, 4, 2, 2)),
            "plain": nn.Linear(4, 4),
        }
    )
    assert list(adapted_layers(model)) == ["linear", "embedding", "patches"]
    assert adapted_layers(model["linear"]) == {"": model["linear"]}


def test_other_layers_of_peft_are_found_before_and_after_from_peft():
    model = adapted("peft", targets=("q_proj", "embed_tokens"))
    before = adapted_layers(model)
    assert [n for n in before if n.endswith("embed_tokens")]
    assert adapted_layers(lora_ext.from_peft(model)) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_parameters_of_an_adapter_contain_its_name(kind: str, settings: dict):
    model = adapted(kind, "first", "second", **settings)
    for layer in adapted_layers(model).values():
        named = {id(p) for n, p in layer.named_parameters() if ".second." in f".{n}."}
        assert {id(p) for p in adapter_parameters(layer, "second")} == named
        assert len(named) == 2 + len(settings)


def test_embedding_adapter_has_its_factors_as_parameters():
    layer = LoraEmbedding(nn.Embedding(5, 4), r=2)
    shapes = [tuple(p.shape) for p in adapter_parameters(layer, "default")]
    assert shapes == [(2, 5), (4, 2)]
    model = adapted("peft", targets=("embed_tokens",))
    (theirs,) = adapted_layers(model).values()
    assert [tuple(p.shape) for p in adapter_parameters(theirs, "default")] == [(4, 11), (16, 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_matrices_in_the_memory_of_the_parameters(kind: str):
    for layer in adapted_layers(adapted(kind)).values():
        a, b = adapter_factors(layer, "default")
        assert a.data_ptr() == layer.lora_A["default"].weight.data_ptr()
        assert a.shape == (4, layer.in_features) and b.shape == (layer.out_features, 4)
    embedding = LoraEmbedding(nn.Embedding(5, 4), r=2)
    assert [tuple(t.shape) for t in adapter_factors(embedding, "default")] == [(2, 5), (4, 2)]
    conv = LoraConv(nn.Conv2d(3, 4, 2, stride=2), r=2)
    assert [tuple(t.shape) for t in adapter_factors(conv, "default")] == [(2, 12), (4, 2)]
