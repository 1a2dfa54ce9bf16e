"""Tiny random models of many families, with adapters served from a pool or merged.

A merged model is an independent reference. Its weights contain one adapter, so it needs no
``adapters`` block. It is correct even if a model reads the weights of a layer without calling the
layer, or transposes its rows.
"""

import copy
from typing import Any

import torch
from tiny import GPT, MARKS, T5, TEXT, VOCAB, Maker, maker
from torch import Tensor, nn

import lora_ext

NAMES = ["red", "green", None, "blue"]
TEXT = {**TEXT, "max_position_embeddings": 128}
WIDE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 128}
GEMMA = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
SCANS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
BART: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}  # fmt: skip


# fmt: off
OF_GEMMA3 = {**TEXT, **GEMMA, "layer_types": ["sliding_attention", "full_attention"]}
DECODERS: dict[str, Maker] = {
    "gpt2": maker("GPT2", "LMHeadModel", **GPT, **MARKS),
    "gemma2": maker("Gemma2", **TEXT, **GEMMA),
    "gemma3": maker("Gemma3", config="Gemma3TextConfig", **OF_GEMMA3),
    "qwen3": maker("Qwen3", **TEXT, head_dim=8),
    "qwen3-moe": maker("Qwen3Moe", **TEXT, **EXPERTS, num_experts=5, head_dim=8),
    "mixtral": maker("Mixtral", **TEXT, num_local_experts=4, num_experts_per_tok=2),
    "mistral": maker("Mistral", **TEXT, sliding_window=4, head_dim=8),
    "phi3": maker("Phi3", **TEXT, sliding_window=4),
    "opt": maker("OPT", **WIDE, **MARKS, **HEADS, ffn_dim=48, word_embed_proj_dim=16),
    "bloom": maker("Bloom", vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, **MARKS),
    "falcon": maker("Falcon", **TEXT, new_decoder_architecture=True, num_kv_heads=2),
    "mamba": maker("Mamba", **WIDE, **MARKS, state_size=4, time_step_rank=4),
    "jamba": maker(
        "Jamba", **TEXT, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_dt_rank=4,
    ),
    "bamba": maker("Bamba", **TEXT, attn_layer_indices=[1], mamba_chunk_size=4, **SCANS),
}
# fmt: on


SEQ2SEQ: dict[str, Maker] = {
    "t5": maker("T5", "ForConditionalGeneration", **T5, **MARKS, decoder_start_token_id=0),
    "bart": maker("Bart", "ForConditionalGeneration", **BART, **MARKS),
}


def make(build: Maker) -> Any:
    """Return a model with the same weights at every call.

    The model is in float64, in which logits differ by 1e-12. Models with eager attention stay in
    float32, because their masks overflow in float64 and left padding would give NaN.
    """
    torch.manual_seed(0)
    model = build().eval()
    if model.config._attn_implementation != "eager" or model.config.model_type == "mamba":
        model.double()
    model.generation_config.eos_token_id = None  # Some configurations set one.
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "A_log" not in name:
                parameter.mul_(5)
    return model


def merged(model: nn.Module, deltas: dict[str, Tensor]) -> Any:
    """Return a copy of the model with the adapter merged.

    A head that is tied to the embedding becomes untied.
    """
    copied = copy.deepcopy(model)
    for name, delta in deltas.items():
        module: Any = copied.get_submodule(name)
        turned = delta.T if type(module).__name__ == "Conv1D" else delta
        module.weight = nn.Parameter(module.weight.detach() + turned.to(module.weight.dtype))
    return copied


def served(build: Maker, only: str = "") -> tuple[Any, dict[str | None, Any]]:
    """Return an attached model with random adapters, and the merged model of each adapter by name.

    The adapters are on the linear layers whose name contains ``only``.
    """
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


PADDED: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0}
NARROW = {**PADDED, "hidden_size": 32, "num_hidden_layers": 2}
PLACES = {"num_attention_heads": 4, "max_position_embeddings": 64}
ENCODER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
FSMT = {"langs": ["en", "de"], "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB, "max_length": 20}
LED = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
OF_JETMOE = {"kv_channels": 8, "num_local_experts": 3, "num_experts_per_tok": 2}

# fmt: off
TOKENS_FIRST = {
    "xlnet": maker("XLNet", "LMHeadModel", **PADDED, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "longformer": maker(
        "Longformer", "ForMaskedLM", **NARROW, **PLACES, intermediate_size=48, attention_window=4,
    ),
    "led": maker(
        "LED", "ForConditionalGeneration", **PADDED, **ENCODER, **LED, attention_window=4,
    ),
    "fsmt": maker("FSMT", "ForConditionalGeneration", **FSMT, **ENCODER),
}
FLATTENING = {
    "opt": maker(
        "OPT", **NARROW, **PLACES, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=True,
    ),
    "jetmoe": maker("JetMoe", **NARROW, num_key_value_heads=2, intermediate_size=48, **OF_JETMOE),
}
# fmt: on
