"""Rows use their adapters in models that put tokens first or flatten the batch."""

import copy
from typing import Any

import pytest
import torch
from families import FLATTENING, TOKENS_FIRST
from tiny import VOCAB, assert_answers_as_alone, load_random, tokens
from torch import Tensor

import lora_ext
from lora_ext.rows import _layouts

NAMES = ["red", "blue", None, "green"]


def attached(make: Any) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    positions = [n for n, m in model.named_modules() if "position" in n and hasattr(m, "weight")]
    linear = lora_ext.AdapterPool(model, max_slots=1, max_rank=8).index.linear
    targets = [name for name in linear if name not in positions]
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=8, targets=targets)
    load_random(pool, "red", "blue", "green")
    return lora_ext.attach(model, pool)


def assert_rows_are_their_own(model: Any, ids: Tensor, names: list[str | None]) -> None:
    with torch.no_grad():
        with lora_ext.adapters(names):
            mixed = model(ids).logits
        for row, name in enumerate(names):
            with lora_ext.adapters(name):
                alone = model(ids).logits
            # float32, two layers, logits of about 1
            torch.testing.assert_close(mixed[row], alone[row], rtol=0, atol=2e-5)
        with lora_ext.adapters("red"):
            red = model(ids).logits
    assert (red[1] - mixed[1]).abs().max() > 1e-3  # Another adapter would change the logits.


@pytest.mark.parametrize("family", TOKENS_FIRST)
@pytest.mark.parametrize("known", [True, False])
def test_rows_of_models_with_tokens_first_use_their_adapters(
    family: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check also 4 sequences of 4 tokens, which are ambiguous in an unknown model's first batch."""
    if not known:
        monkeypatch.setattr(_layouts, "TOKENS_FIRST", {})
    model = attached(TOKENS_FIRST[family])
    shapes = [(4, 4), (4, 8), (4, 4)][0 if known else 1 :]
    for shape in shapes:
        assert_rows_are_their_own(model, tokens(*shape), NAMES)
    with pytest.raises(ValueError, match=r"expected a batch of 4 sequences.* at '"):
        with torch.no_grad(), lora_ext.adapters(NAMES):
            model(tokens(3, 4 if known else 8))


@pytest.mark.slow
@pytest.mark.parametrize("family", FLATTENING)
def test_rows_of_models_that_flatten_their_batch_use_their_adapters(family: str) -> None:
    model = attached(FLATTENING[family])
    for shape in [(4, 5), (4, 4), (4, 1)]:
        assert_rows_are_their_own(model, tokens(*shape), NAMES)
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    assert_answers_as_alone(model, tokens(4, 3), NAMES, **how)


def test_fsmt_generates_with_one_adapter_per_row() -> None:
    how = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    assert_answers_as_alone(attached(TOKENS_FIRST["fsmt"]), tokens(4, 4), NAMES, **how)


@pytest.mark.parametrize("family", TOKENS_FIRST)
@pytest.mark.parametrize("length", [4, 8])
def test_names_of_tokens_and_copies_of_models_with_tokens_first(family: str, length: int) -> None:
    """Check that names per token are (B, L), also in layers with inputs (L, B)."""
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
    copied = copy.deepcopy(model)
    with torch.no_grad(), lora_ext.adapters(NAMES):
        assert torch.equal(copied(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_compiled_model_that_flattens_its_batch_accepts_names() -> None:
    """Check that a graph reads the block's rows at run time, for any shape of the model's input."""
    model = attached(FLATTENING["opt"])
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for shape in [(4, 5), (4, 7), (4, 4), (2, 6)]:
            ids, names = tokens(*shape), NAMES[: shape[0]]
            with lora_ext.adapters(names):
                expected = model(ids).logits
                torch.testing.assert_close(compiled(ids).logits, expected, rtol=0, atol=2e-5)
            given = compiled(ids, adapter_names=names).logits
            torch.testing.assert_close(given, expected, rtol=0, atol=2e-5)
        with pytest.raises(ValueError, match="expected a batch of 2 sequences"):
            with lora_ext.adapters(NAMES[:2]):
                compiled(tokens(4, 6))


def test_rows_of_an_embedding_with_tokens_first_use_their_adapters() -> None:
    torch.manual_seed(0)
    model = TOKENS_FIRST["xlnet"]().eval()
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=8, targets=["word_embedding"])
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["word_embedding"]}
    for name in ("red", "blue", "green"):
        stem = "base_model.model.transformer.word_embedding.lora_embedding"
        state = {f"{stem}_A": torch.randn(2, VOCAB), f"{stem}_B": torch.randn(32, 2)}
        pool.load(name, (config, state))
    lora_ext.attach(model, pool)
    for length in (1, 4, 5):
        assert_rows_are_their_own(model, tokens(4, length), NAMES)
