"""The rarer ways in which transformers generates: each row is the row alone, or the call raises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import make_model, make_pair, tokens
from tokenizers import Tokenizer, models, pre_tokenizers

import lora_ext

NAMES = ["red", None, "green"]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def step_by_hand(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    for _ in range(3):
        token = model(input_ids).logits[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, token], 1)
    return input_ids


BATCHED: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 1.5, **GREEDY},
    "no cache": {"use_cache": False, **GREEDY},
    "chunked prefill": {"prefill_chunk_size": 2, **GREEDY},
    "custom_generate": {"custom_generate": step_by_hand},
    "several sequences of beams": {"num_beams": 4, "num_return_sequences": 2, **GREEDY},
}


@pytest.mark.parametrize("way", BATCHED)
def test_rows_of_a_batch_equal_the_rows_alone(way: str, tmp_path: Path) -> None:
    model, _, _ = make_pair("llama", tmp_path)
    ids, how = tokens(3, 6), BATCHED[way]
    mask = torch.ones_like(ids)
    mixed = model.generate(ids, attention_mask=mask, adapter_names=NAMES, **how)
    copies = how.get("num_return_sequences", 1)
    answers = []
    for row, name in enumerate(NAMES):
        one = ids[row : row + 1]
        alone = model.generate(one, attention_mask=mask[:1], adapter_names=[name], **how)
        assert torch.equal(mixed[row * copies : (row + 1) * copies], alone)
        base = model.generate(one, attention_mask=mask[:1], **how)
        answers.append(torch.equal(alone, base))
    assert answers == [False, True, False]


@pytest.mark.parametrize("way", ["lookup", "assistant", "attached assistant", "early exit"])
def test_speculation_of_transformers_verifies_with_the_adapter(way: str, tmp_path: Path) -> None:
    model, _, pool = make_pair("llama", tmp_path)
    assistant: Any = make_model("llama")
    if way == "attached assistant":
        lora_ext.attach(assistant, pool)
    settings: dict[str, dict[str, Any]] = {
        "lookup": {"prompt_lookup_num_tokens": 2},
        "early exit": {"assistant_early_exit": 1},
    }
    how = settings.get(way, {"assistant_model": assistant})
    ids = tokens(1, 6)
    mask = torch.ones_like(ids)
    for name in NAMES:
        with lora_ext.adapters([name], pool=pool):
            expected = model.generate(ids, attention_mask=mask, **GREEDY)
            assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY, **how), expected)


def test_pipelines_take_names_for_their_batches(tmp_path: Path) -> None:
    model, _, _ = make_pair("llama", tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", padding_side="left"
    )
    texts = ["w5 w6 w7", "w9 w3", "w10 w11 w12 w13"]
    pipe: Any = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)

    def run(texts: list[str], **how: Any) -> list[str]:
        return [out[0]["generated_text"] for out in pipe(texts, **GREEDY, **how)]

    alone = [run([text], adapter_names=[name])[0] for text, name in zip(texts, NAMES, strict=True)]
    assert alone != run(texts)
    assert run(texts, batch_size=3, adapter_names=NAMES) == alone
    with lora_ext.adapters(NAMES):
        assert run(texts, batch_size=3) == alone
    for size in (1, 2):
        with lora_ext.adapters(NAMES), pytest.raises(ValueError, match="adapters: names: "):
            run(texts, batch_size=size)
