"""Models whose layers do not see (sequences, tokens): tokens first, or one row for all."""

import copy
from typing import Any

import pytest
import torch
import transformers
from tiny import VOCAB, tokens
from torch import Tensor

import lora_ext
from lora_ext.interop import transformers as interop

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
NAMES = ["red", "blue", None, "green"]


def attached(make: Any) -> Any:
    """A model with three adapters on every linear layer that the pool knows."""
    torch.manual_seed(0)
    model = make().eval()
    positions = [n for n, m in model.named_modules() if "position" in n and hasattr(m, "weight")]
    linear = lora_ext.AdapterPool(model, max_slots=1, max_rank=8).index.linear
    targets = [name for name in linear if name not in positions]
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=8, targets=targets)
    for name in ("red", "blue", "green"):
        state = {}
        for module, spec in pool.index.linear.items():
            stem = f"base_model.model.{module}"
            state[f"{stem}.lora_A.weight"] = torch.randn(2, spec.in_features) / 3
            state[f"{stem}.lora_B.weight"] = torch.randn(spec.out_features, 2) / 3
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": targets}
        pool.load(name, (config, state))
    return lora_ext.attach(model, pool)


def assert_rows_are_their_own(model: Any, ids: Tensor, names: list[str | None]) -> None:
    """A mixed batch equals, row by row, the batches in which all rows have one adapter."""
    with torch.no_grad():
        with lora_ext.adapters(names):
            mixed = model(ids).logits
        for row, name in enumerate(names):
            with lora_ext.adapters(name):
                alone = model(ids).logits
            # float32, two layers, logits of about 1.
            torch.testing.assert_close(mixed[row], alone[row], rtol=0, atol=2e-5)
        with lora_ext.adapters("red"):
            red = model(ids).logits
    assert (red[1] - mixed[1]).abs().max() > 1e-3  # another adapter would have shown


@pytest.mark.parametrize("family", TOKENS_FIRST)
@pytest.mark.parametrize("known", [True, False])
def test_tokens_first(family: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens as sequences, too: from the first batch on where the model is known."""
    if not known:
        monkeypatch.setattr(interop, "_TOKENS_FIRST", {})
    model = attached(TOKENS_FIRST[family])
    shapes = [(4, 4), (4, 8), (4, 4)][0 if known else 1 :]
    for shape in shapes:
        assert_rows_are_their_own(model, tokens(*shape), NAMES)
    with pytest.raises(ValueError, match=r"expected a batch of 4 sequences.* at '"):
        with torch.no_grad(), lora_ext.adapters(NAMES):
            model(tokens(3, 4 if known else 8))


@pytest.mark.parametrize("family", FLATTENING)
def test_flattened_batches(family: str) -> None:
    model = attached(FLATTENING[family])
    for shape in [(4, 5), (4, 4), (4, 1)]:
        assert_rows_are_their_own(model, tokens(*shape), NAMES)
    ids, how = tokens(4, 3), {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with lora_ext.adapters(NAMES):
        mixed = model.generate(ids, **how)
    for row, name in enumerate(NAMES):
        with lora_ext.adapters(name):
            assert torch.equal(model.generate(ids, **how)[row], mixed[row])


def test_fsmt_generates_with_each_row_its_own() -> None:
    model = attached(_fsmt)
    ids, how = tokens(4, 4), {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    with lora_ext.adapters(NAMES):
        mixed = model.generate(ids, **how)
    for row, name in enumerate(NAMES):
        with lora_ext.adapters(name):
            alone = model.generate(ids, **how)[row]
        length = min(len(alone), mixed.shape[1])  # each batch is padded to its own longest
        assert torch.equal(alone[:length], mixed[row, :length])


@pytest.mark.parametrize("family", TOKENS_FIRST)
@pytest.mark.parametrize("length", [4, 8])
def test_tokens_first_with_an_adapter_for_each_token(family: str, length: int) -> None:
    """Entries are (B, L) in every layer: those that see (L, B) turn them, squares included."""
    model = attached(TOKENS_FIRST[family])
    ids = tokens(len(NAMES), length)
    known = ["red", "blue", "green"]
    rows = torch.tensor([known.index(name) if name else -1 for name in NAMES])
    with torch.no_grad():
        with lora_ext.adapters(NAMES):
            by_sequence = model(ids).logits
        with lora_ext.adapters(known, token_ids=rows[:, None].expand(-1, length)):
            assert torch.equal(model(ids).logits, by_sequence)
        with lora_ext.adapters([[name] * length for name in NAMES]):
            assert torch.equal(model(ids).logits, by_sequence)


@pytest.mark.parametrize("family", TOKENS_FIRST)
def test_a_copy_of_an_attached_model_knows_its_layout(family: str) -> None:
    model = attached(TOKENS_FIRST[family])
    ids = tokens(len(NAMES), 4)
    copied = copy.deepcopy(model)
    with torch.no_grad(), lora_ext.adapters(NAMES):
        assert torch.equal(copied(ids).logits, model(ids).logits)
