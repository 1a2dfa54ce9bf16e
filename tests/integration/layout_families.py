"""Tiny models whose layers do not see (sequences, tokens): tokens first, or one row for all."""

from __future__ import annotations

from typing import Any

from tiny import VOCAB, maker

COMMON: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0}
SIZES = {**COMMON, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 64}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
FSMT = {"langs": ["en", "de"], "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB, "max_length": 20}
LED = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
EXPERTS = {"kv_channels": 8, "num_local_experts": 3, "num_experts_per_tok": 2}

# fmt: off
TOKENS_FIRST = {
    "xlnet": maker("XLNet", "LMHeadModel", **COMMON, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "longformer": maker(
        "Longformer", "ForMaskedLM", **SIZES, **HEADS, intermediate_size=48, attention_window=4,
    ),
    "led": maker(
        "LED", "ForConditionalGeneration", **COMMON, **SEQ2SEQ, **LED, attention_window=4,
    ),
    "fsmt": maker("FSMT", "ForConditionalGeneration", **FSMT, **SEQ2SEQ),
}
FLATTENING = {
    "opt": maker(
        "OPT", **SIZES, **HEADS, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=True,
    ),
    "jetmoe": maker("JetMoe", **SIZES, num_key_value_heads=2, intermediate_size=48, **EXPERTS),
}
# fmt: on
