"""The lean passes of the decoding benchmarks are the model's own, for both sides of the race."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the lean model is a transformers Llama")
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from lean import LeanLlama, token_by_token

from lora_ext.methods import mtpc

SIZES = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return (
        LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, eos_token_id=None, pad_token_id=0))
        .double()
        .eval()
    )


def test_lean_decoding_gives_the_tokens_of_generate(model) -> None:
    ids = torch.randint(1, 23, (3, 5))
    options = {"do_sample": False, "max_new_tokens": 12}
    expected = model.generate(ids, **options)
    assert torch.equal(token_by_token(LeanLlama(model), ids, 12), expected)
    assert torch.equal(model.generate(ids, **options), expected)  # the model is what it was


@pytest.mark.parametrize("mode", ["greedy", "sample"])
def test_speculation_over_lean_passes_gives_the_tokens_over_the_model(model, mode) -> None:
    draft = mtpc.retrofit(model, mtpc.MtpcConfig(3, 2, "hmm", "adapter", 4)).eval()
    ids = torch.randint(1, 23, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])  # rows of two lengths
    settings = {"max_new_tokens": 10, "eos_token_id": [], "seed": 3, "attention_mask": mask}
    expected = draft.decoder(mode=mode).generate(ids, **settings)
    lean = mtpc.SpeculativeDecoder(LeanLlama(model), draft.head, mode=mode)
    got = lean.generate(ids, **settings)
    assert torch.equal(got.sequences, expected.sequences) and got.calls == expected.calls


def test_another_architecture_is_refused() -> None:
    config = LlamaConfig(**SIZES, **HEADS, attention_bias=True)
    with pytest.raises(ValueError, match="expected a Llama without biases"):
        LeanLlama(LlamaForCausalLM(config))
