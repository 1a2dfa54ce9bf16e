"""PEFT merges into a base whose weights are packed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ext.nn import pack_linears, packed_bytes

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def merge_adapter(model: Any) -> Any:
    model.merge_adapter()
    return model


def merge_and_unmerge(model: Any) -> Any:
    model.merge_adapter()
    logits(model), logits(model)  # the merged weight is packed
    model.unmerge_adapter()
    return model


def merge_and_unload(model: Any) -> Any:
    return model.merge_and_unload()


def safe_merge_and_unload(model: Any) -> Any:
    return model.merge_and_unload(safe_merge=True)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change", [merge_adapter, merge_and_unmerge, merge_and_unload, safe_merge_and_unload]
)
def test_merging_reaches_the_products(change: Callable[[Any], Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    base.eval().to(dtype)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    plain: Any = get_peft_model(base, config).eval()
    packed = copy.deepcopy(plain)
    pack_linears(packed.get_base_model())
    adapted, expected = logits(packed), logits(change(plain))
    packed = change(packed)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for _ in range(3):
        torch.testing.assert_close(logits(packed), expected, atol=tolerance, rtol=tolerance)
    assert packed_bytes(packed) > 0
    assert (adapted - expected).abs().max() < 0.1
