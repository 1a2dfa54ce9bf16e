"""Tiny random models of many families, served and merged.

The merged model is a judge of its own: its weights hold one adapter, so it needs no block, and what
a model does with a weight that it reads, or with rows that it turns, shows in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tiny import VOCAB
from torch import Tensor, nn

import lora_ext

NAMES = ["red", "green", None, "blue"]
LAYERS = 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
MARKS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
TEXT = {**SIZES, **MARKS, "num_key_value_heads": 2}
GEMMA = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
SCANS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
GPT = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}  # fmt: skip


def _of(name: str, **fields: Any) -> Callable[[], Any]:
    config, model = (getattr(transformers, f"{name}{kind}") for kind in ("Config", "ForCausalLM"))
    return lambda: model(config(**{**TEXT, **fields}))


def _gemma3() -> Any:
    layers = ["sliding_attention", "full_attention"]
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**TEXT, **GEMMA, layer_types=layers)
    )


def _gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT, **MARKS))


def _bloom() -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4}
    return transformers.BloomForCausalLM(transformers.BloomConfig(**sizes, **MARKS))


def _falcon() -> Any:
    config = transformers.FalconConfig(**TEXT, new_decoder_architecture=True, num_kv_heads=2)
    return transformers.FalconForCausalLM(config)


def _opt() -> Any:
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    config = transformers.OPTConfig(**sizes, **MARKS, ffn_dim=48, word_embed_proj_dim=16)
    return transformers.OPTForCausalLM(config)


def _mamba() -> Any:
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    config = transformers.MambaConfig(**sizes, **MARKS, state_size=4, time_step_rank=4)
    return transformers.MambaForCausalLM(config)


DECODERS: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2,
    "gemma2": _of("Gemma2", **GEMMA),
    "gemma3": _gemma3,
    "qwen3": _of("Qwen3", head_dim=8),
    "qwen3-moe": _of("Qwen3Moe", **EXPERTS, num_experts=5, head_dim=8),
    "mixtral": _of("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "mistral": _of("Mistral", sliding_window=4, head_dim=8),
    "phi3": _of("Phi3", sliding_window=4),
    "opt": _opt,
    "bloom": _bloom,
    "falcon": _falcon,
    "mamba": _mamba,
    "jamba": _of(
        "Jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_dt_rank=4,
    ),
    "bamba": _of("Bamba", attn_layer_indices=[1], mamba_chunk_size=4, **SCANS),
}  # fmt: skip


def _t5() -> Any:
    config = transformers.T5Config(**T5, **MARKS, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def _bart() -> Any:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**BART, **MARKS))


SEQ2SEQ: dict[str, Callable[[], Any]] = {"t5": _t5, "bart": _bart}


def make(build: Callable[[], Any]) -> Any:
    """The same weights at every call. In float64 two ways to one logit differ by 1e-12; but the
    masks of eager attention overflow in it, so that left padding would give NaN."""
    torch.manual_seed(0)
    model = build().eval()
    if model.config._attn_implementation != "eager" or model.config.model_type == "mamba":
        model.double()
    model.generation_config.eos_token_id = None  # some configurations have one of their own
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "A_log" not in name:
                parameter.mul_(5)
    return model


def merged(model: nn.Module, deltas: dict[str, Tensor]) -> Any:
    """A copy whose weights hold an adapter; those of a head that is tied to an embedding, apart."""
    copied = copy.deepcopy(model)
    for name, delta in deltas.items():
        module: Any = copied.get_submodule(name)
        turned = delta.T if type(module).__name__ == "Conv1D" else delta
        module.weight = nn.Parameter(module.weight.detach() + turned.to(module.weight.dtype))
    return copied


def served(build: Callable[[], Any], only: str = "") -> tuple[Any, dict[str | None, Any]]:
    """An attached model with random adapters on all linear layers whose names have ``only`` in
    them; and by name the model that each is merged into."""
    model = make(build)
    pool = lora_ext.AdapterPool(model, max_slots=3, max_rank=4)
    judges: dict[str | None, Any] = {None: copy.deepcopy(model)}
    draw = torch.Generator().manual_seed(1)
    adapters = {}
    for name in ("red", "green", "blue"):
        state, deltas = {}, {}
        for module, spec in pool.index.linear.items():
            if only not in module or module in pool.index.bypassed:
                continue
            a = torch.randn(2, spec.in_features, generator=draw).double() / spec.in_features**0.5
            b = torch.randn(spec.out_features, 2, generator=draw).double() * 0.5
            state[f"base_model.model.{module}.lora_A.weight"] = a
            state[f"base_model.model.{module}.lora_B.weight"] = b
            deltas[module] = b @ a
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": list(deltas)}
        adapters[name] = config, state
        judges[name] = merged(model, deltas)
    for name, source in adapters.items():
        pool.load(name, source)
    return lora_ext.attach(model, pool), judges
