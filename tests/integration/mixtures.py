"""Tiny random mixtures of experts, and PEFT's adapters for them with weights that matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import torch
import transformers
from tiny import adapted
from torch import nn

VOCAB = 61
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def _mixtral(**how: Any) -> nn.Module:
    config = transformers.MixtralConfig(
        **_SIZES, intermediate_size=20, num_local_experts=4, num_experts_per_tok=2, **how
    )
    return transformers.MixtralForCausalLM(config)


def _qwen3(**how: Any) -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **_SIZES,
        intermediate_size=40,
        moe_intermediate_size=12,
        num_experts=5,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        **how,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def _gpt_oss(**how: Any) -> nn.Module:
    config = transformers.GptOssConfig(
        **_SIZES,
        intermediate_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
        **how,
    )
    return transformers.GptOssForCausalLM(config)


FAMILIES = {"mixtral": _mixtral, "qwen3": _qwen3, "gpt_oss": _gpt_oss}
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"

# Both parameters; ranks that fill a page and that do not, per parameter and per layer; a scale per
# rank and per root of rank; attention beside the experts.
CONFIGS: dict[str, dict[str, Any]] = {
    "red": {"r": 4},
    "green": {
        "r": 9,
        "rank_pattern": {"experts.down_proj": 3, r"model\.layers\.1\.mlp.*gate_up_proj": 2},
        "alpha_pattern": {"experts.down_proj": 5},
        "target_modules": ["q_proj"],
    },
    "blue": {"r": 8, "use_rslora": True},
}


def make_mixture(family: str, implementation: str = "eager") -> Any:
    """The same weights at every call, large enough that adapters change tokens and routes."""
    torch.manual_seed(0)
    model: Any = FAMILIES[family]().eval()
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed" in name else 0.3)
            elif "norm" not in name:
                parameter.normal_(std=0.3)
    return model


def make_peft(
    model: nn.Module, configs: Mapping[str, Mapping[str, Any]], size: float = 0.25, **extra: Any
) -> Any:
    """A PeftModel over a copy of ``model``, with random B as well: PEFT starts at zero."""
    given = {"target_modules": [], "target_parameters": [UP, DOWN], "lora_alpha": 6}
    full = {n: peft.LoraConfig(**{**given, **f, **extra}) for n, f in configs.items()}
    return adapted(model, full, size)


def tokens(rows: int, length: int) -> torch.Tensor:
    """The same at every call, without the padding token."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.manual_seed(3))
