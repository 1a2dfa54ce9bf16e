"""Tiny vision language models, batches of text and images, and random teacher states."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from lora_ext.methods import vora

PATCH, WIDTH, VOCAB, PLACEHOLDER = 2, 16, 37, -200
LANGUAGE_FIELDS = (
    "layers",
    "attn_implementation",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
)


def language(family: str = "llama", layers: int = 3, **fields: Any) -> Any:
    """Return a model with the same weights at every call, large enough that greedy tokens vary."""
    torch.manual_seed(0)
    ids: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=WIDTH,
            n_layer=layers,
            n_head=4,
            n_positions=64,
            **ids,
            **fields,
        )
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        kinds: dict[str, Any] = {
            "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
            "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
            "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        }
        kind, model_kind = kinds[family]
        config = kind(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **ids,
            **fields,
        )
        model = model_kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_({"embed_tokens": 50, "wpe": 100}.get(name.split(".")[-2], 15))
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.generation_config.pad_token_id = 0
    return model.eval()


def settings(route: Any = "all", n_blocks: int = 2, family: str = "llama", **fields: Any) -> Any:
    if family == "gpt2":
        fields.setdefault("target_modules", ("c_attn", "c_proj", "c_fc"))
    sizes: dict[str, Any] = {"image_size": 6, "patch": PATCH, "embed_dim": 12}
    return vora.VoraConfig(n_blocks, **{"rank": 4, "scale": 0.5, "route": route, **sizes, **fields})


def shake(model: Any) -> Any:
    """Replace zero adapters and positions by random values, and return the model."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "pos_embed" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.4 * noise)
    return model


def seeing(route: Any = "all", family: str = "llama", teacher: int | None = None, **fields: Any):
    """Return a :class:`VoraForCausalLM` with random adapters and positions, as after training."""
    lm = {key: fields.pop(key) for key in list(fields) if key in LANGUAGE_FIELDS}
    torch.manual_seed(1)
    config = settings(route, family=family, **fields)
    model = vora.VoraForCausalLM(language(family, **lm), config, teacher)
    return shake(model).eval()


def image(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, rows * PATCH, columns * PATCH, generator=generator)


def batch() -> dict[str, Any]:
    """Return three right-padded samples with two images of different sizes, none, and one image."""
    p = PLACEHOLDER
    ids = torch.tensor([[3, p, 4, p, 5, 6], [7, 8, 9, 1, 0, 0], [p, 2, 3, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    images = [[image(2, 2, 1), image(1, 3, 2)], None, [image(2, 1, 3)]]
    labels = ids.masked_fill((ids == p) | (mask == 0), -100)
    return {"input_ids": ids, "images": images, "attention_mask": mask, "labels": labels}


def text() -> dict[str, Any]:
    ids = torch.tensor([[3, 1, 4, 1, 5, 6], [7, 8, 9, 1, 2, 2]])
    return {"input_ids": ids, "labels": ids.clone()}


def of_sample(given: dict[str, Any], sample: int) -> dict[str, Any]:
    """Return one sample of a batch, without its padding."""
    keep = given["attention_mask"][sample].bool()
    found = {name: given[name][sample : sample + 1, keep] for name in ("input_ids", "labels")}
    return {**found, "images": given["images"][sample : sample + 1]}


def tokens(given: dict[str, Any]) -> int:
    """Return the number of vision tokens in a batch."""
    every = [one for sample in given["images"] for one in sample or ()]
    return sum(one.shape[1] * one.shape[2] // PATCH**2 for one in every)


def teacher_states(count: int, blocks: int = 2, width: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(count, width, generator=generator) for _ in range(blocks)]
