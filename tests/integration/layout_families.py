"""Tiny models whose layers do not see (sequences, tokens): tokens first, or one row for all."""

from __future__ import annotations

from typing import Any

import transformers
from tiny import VOCAB

COMMON: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0}


def _xlnet() -> Any:
    config = transformers.XLNetConfig(**COMMON, d_model=32, n_layer=2, n_head=4, d_inner=48)
    return transformers.XLNetLMHeadModel(config)


def _longformer() -> Any:
    config = transformers.LongformerConfig(
        **COMMON, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        attention_window=4, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LongformerForMaskedLM(config)


def _led() -> Any:
    config = transformers.LEDConfig(
        **COMMON, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, attention_window=4,
        max_encoder_position_embeddings=64, max_decoder_position_embeddings=64,
    )  # fmt: skip
    return transformers.LEDForConditionalGeneration(config)


def _fsmt() -> Any:
    config = transformers.FSMTConfig(
        langs=["en", "de"], src_vocab_size=VOCAB, tgt_vocab_size=VOCAB, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_length=20,
    )  # fmt: skip
    return transformers.FSMTForConditionalGeneration(config)


def _opt() -> Any:
    config = transformers.OPTConfig(
        **COMMON, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=64, word_embed_proj_dim=32, do_layer_norm_before=True,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def _jetmoe() -> Any:
    config = transformers.JetMoeConfig(
        **COMMON, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8,
        intermediate_size=48, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.JetMoeForCausalLM(config)


TOKENS_FIRST = {"xlnet": _xlnet, "longformer": _longformer, "led": _led, "fsmt": _fsmt}
FLATTENING = {"opt": _opt, "jetmoe": _jetmoe}
