"""Blocks (transformer layers) of a model, and the index of the block that contains a module."""

from __future__ import annotations

import peft
import pytest
import transformers
from torch import nn

from lora_ext.nn import block_index, block_name, decoder_layers

TINY = {
    "vocab_size": 9,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def llama(layers: int = 2) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, num_hidden_layers=layers))


def test_blocks_of_a_causal_model_with_and_without_head_are_found():
    model = llama()
    assert decoder_layers(model) is model.model.layers
    assert decoder_layers(model.model) is model.model.layers


def test_blocks_are_found_if_the_list_has_another_name():
    config = transformers.GPT2Config(vocab_size=9, n_embd=16, n_layer=3, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    assert decoder_layers(model) is model.transformer.h


def test_blocks_of_a_mixture_of_experts_are_its_layers_and_not_its_experts():
    config = transformers.MixtralConfig(**TINY, num_hidden_layers=2, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config)
    assert decoder_layers(model) is model.model.layers


def test_blocks_of_an_encoder_only_model_are_its_layers():
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=16, intermediate_size=24, num_attention_heads=4
    )
    config.num_hidden_layers = 2
    model = transformers.BertForMaskedLM(config)
    assert decoder_layers(model) is model.bert.encoder.layer


def test_blocks_of_an_encoder_decoder_model_of_equal_depths_are_those_of_the_decoder():
    config = transformers.WhisperConfig(
        vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, num_mel_bins=8,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    whisper = transformers.WhisperForConditionalGeneration(config)
    assert decoder_layers(whisper) is whisper.model.decoder.layers
    config = transformers.T5Config(
        vocab_size=9, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_layers=3, num_decoder_layers=2
    )
    t5 = transformers.T5ForConditionalGeneration(config)
    assert decoder_layers(t5) is t5.decoder.block


def test_model_wrapped_by_peft_gives_its_layers():
    model = llama()
    layers = model.model.layers
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert decoder_layers(wrapped) is layers


def test_model_of_another_package_raises():
    with pytest.raises(
        ValueError, match=r"decoder_layers: model: expected a transformers model, found Linear"
    ):
        decoder_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"decoder_layers: model: .* found NoneType"):
        decoder_layers(None)


def test_model_without_a_layer_list_raises():
    model = llama()
    model.model.layers = nn.Sequential(*model.model.layers)  # pyright: ignore
    with pytest.raises(ValueError, match=r"expected an nn.ModuleList of 2 layers, .* in Llama"):
        decoder_layers(model)


@pytest.mark.parametrize(
    ("name", "block", "index"),
    [
        ("model.layers.7.mlp.up_proj", "model.layers.7", 7),
        ("layers.0.q", "layers.0", 0),
        ("base_model.model.transformer.h.11.attn.c_attn", "base_model.model.transformer.h.11", 11),
        ("model.layers.3.mlp.experts.5.up_proj", "model.layers.3", 3),
        ("decoder.block.1.layer.0.SelfAttention.q", "decoder.block.1", 1),
        ("model.layers.7", "model.layers.7", 7),
        ("model.layers.7.lora_A.default.weight", "model.layers.7", 7),
        ("model.layer2.conv1", None, None),
        ("lm_head", None, None),
        ("", None, None),
        ("0.weight", None, None),
    ],
)
def test_block_index_is_the_first_number_in_a_name(name: str, block: str | None, index: int | None):
    assert block_name(name) == block
    assert block_index(name) == index


def test_given_pattern_selects_the_block():
    name = "visual.stages.2.layers.4.attn"
    assert block_index(name) == 2
    assert block_index(name, r"layers\.(\d+)\.") == 4
    assert block_name(name, r"layers\.(\d+)\.") == "visual.stages.2.layers.4"
    assert block_index("lm_head", r"layers\.(\d+)\.") is None


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"layers\.\d+", r"block_index: pattern: expected a group around the index"),
        (r"layers\.(\d+", r"block_index: pattern: expected a regular expression"),
        (r"(layers)\.\d+", r"block_index: pattern: expected a first group that matches a number"),
    ],
)
def test_pattern_without_an_index_raises(pattern: str, message: str):
    with pytest.raises(ValueError, match=message):
        block_index("model.layers.7.mlp", pattern)


def test_block_of_each_adapted_module_is_its_transformer_layer():
    model = llama(layers=3)
    for position, layer in enumerate(decoder_layers(model)):
        inside = {id(m) for m in layer.modules()}
        names = [name for name, m in model.named_modules() if id(m) in inside]
        assert names and {block_index(name) for name in names} == {position}
