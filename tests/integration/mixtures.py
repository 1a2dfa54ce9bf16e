"""Tiny random mixtures of experts, and PEFT's adapters for them that change the logits."""

from collections.abc import Mapping
from typing import Any

import peft
import torch
from tiny import MARKS, adapted, maker
from torch import nn

VOCAB = 61
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **MARKS,
}  # fmt: skip


_TWO_OF_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
_THREE_OF_FIVE = {"num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": True}
_FULL = {"layer_types": ["full_attention"] * 2}
FAMILIES = {
    "mixtral": maker("Mixtral", **_SIZES, **_TWO_OF_FOUR, intermediate_size=20),
    "qwen3": maker(
        "Qwen3Moe", **_SIZES, **_THREE_OF_FIVE, intermediate_size=40, moe_intermediate_size=12
    ),
    "gpt_oss": maker("GptOss", **_SIZES, **_TWO_OF_FOUR, **_FULL, intermediate_size=16),
}
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"

# All adapters are on both parameters of the experts, and one is also on attention. Their ranks, of
# which some are multiples of the page size (8), differ between parameters and layers. Their scales
# are alpha / r or alpha / sqrt(r).
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
    """Return a model with the same weights at every call.

    The weights are large enough that adapters change tokens and routing.
    """
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
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
    """Return a PeftModel over a copy of ``model``; B is random too, instead of PEFT's zeros."""
    given = {"target_modules": [], "target_parameters": [UP, DOWN], "lora_alpha": 6}
    full = {n: peft.LoraConfig(**{**given, **f, **extra}) for n, f in configs.items()}
    return adapted(model, full, size)


def tokens(rows: int, length: int) -> torch.Tensor:
    """Return the same tokens at every call, without the padding token."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.manual_seed(3))
