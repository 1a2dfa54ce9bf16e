"""Tiny random transformers models, and PEFT adapters for them with weights that matter."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import lora_ext

VOCAB, WIDTH, LAYERS, HEADS = 97, 32, 2, 4


def _decoder(config: type, model: type, **extra: Any) -> nn.Module:
    return model(
        config(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            **extra,
        )
    )


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return transformers.GPT2LMHeadModel(config)


def classifier(config: Any, model: Any) -> nn.Module:
    """An encoder that sorts sequences into five classes; configuration and model are classes."""
    return model(
        config(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=64,
            num_labels=5,
        )
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": functools.partial(_decoder, transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": functools.partial(_decoder, transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "gpt2": _gpt2,
    "bert": functools.partial(
        classifier, transformers.BertConfig, transformers.BertForSequenceClassification
    ),
}

# Ranks that fill a page and that do not, all modules and some, a scale per rank and per root of
# rank.
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "red": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "green": {"r": 12, "target_modules": "all-linear", "use_rslora": True},
        "blue": {"r": 8, "target_modules": ["o_proj", "down_proj"], "rank_pattern": {"o_proj": 3}},
    },
    "gpt2": {
        "red": {"r": 4, "target_modules": ["c_attn"]},
        "green": {"r": 12, "target_modules": ["c_attn", "c_proj", "c_fc"]},
        "blue": {"r": 8, "target_modules": ["c_fc"], "lora_bias": True},
    },
    "bert": {
        "red": {"r": 4, "target_modules": ["query", "value"]},
        "green": {"r": 12, "target_modules": "all-linear"},
        "blue": {"r": 8, "target_modules": ["pooler.dense", "classifier"]},
    },
}
CONFIGS["qwen2"] = CONFIGS["llama"]


def make_model(family: str) -> nn.Module:
    """The same weights at every call. Logits are about 1 in size, so that adapters change
    tokens."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(10 if "embed" in name or "wte" in name else 5)
    return model


def make_peft(
    model: nn.Module, configs: Mapping[str, Mapping[str, Any]], size: float = 0.15
) -> nn.Module:
    """A PeftModel over a copy of ``model``, with random B as well: PEFT starts at zero."""
    conv1d = any(type(m).__name__ == "Conv1D" for m in model.modules())
    given = {"lora_alpha": 16, "fan_in_fan_out": conv1d}
    return adapted(model, {n: peft.LoraConfig(**given, **f) for n, f in configs.items()}, size)


def adapted(model: nn.Module, configs: Mapping[str, peft.LoraConfig], size: float) -> Any:
    """PEFT's adapters on a copy of ``model``, all of their factors random and of this size."""
    torch.manual_seed(1)
    wrapped: Any = None
    for name, config in configs.items():
        if wrapped is None:
            wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter) * size)
    return wrapped.eval()


def make_pair(family: str, directory: Path) -> tuple[Any, Any, lora_ext.AdapterPool]:
    """The attached model, PEFT's own with the same adapters, and the pool, loaded from PEFT's
    files."""
    model = make_model(family)
    reference = make_peft(model, CONFIGS[family])
    reference.save_pretrained(directory)
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=16)
    for name in CONFIGS[family]:
        pool.load(name, directory / name)
    return lora_ext.attach(model, pool), reference, pool


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, length), generator=generator)


def assert_alone_and_mixed_equal_peft(
    model: Any, reference: Any, names: list[str | None], bound: float
) -> Tensor:
    """The adapters of ``names``, each on all rows and each on its own, as PEFT computes them alone.

    Returns ``(adapters, rows * tokens)``: the largest change of a logit that each makes.
    """
    ids, moved = tokens(len(names), 6), []
    with torch.no_grad():
        base = model(ids).logits
        with lora_ext.adapters(names):
            mixed = model(ids).logits
        for name in dict.fromkeys(names):
            rows = [i for i, n in enumerate(names) if n == name]
            if name in (None, "__base__"):
                assert (mixed[rows] - base[rows]).abs().max() < bound
                continue
            reference.set_adapter(name)
            theirs = reference(input_ids=ids).logits
            with lora_ext.adapters(name):
                assert (model(ids).logits - theirs).abs().max() < bound
            assert (mixed[rows] - theirs[rows]).abs().max() < bound
            moved.append((theirs - base).abs().amax(-1).flatten())
    return torch.stack(moved)
