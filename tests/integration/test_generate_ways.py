"""The rarer ways in which transformers generates: each row is the row alone, or the call raises."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import make_model, make_pair, numbered_words, tokens

import lora_ext

NAMES = ["red", None, "green"]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def step_by_hand(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    for _ in range(3):
        token = model(input_ids).logits[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, token], 1)
    return input_ids


# Others are in test_generate.py and test_families.py.
BATCHED: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 1.5, **GREEDY},
    "custom_generate": {"custom_generate": step_by_hand},
}


@pytest.mark.parametrize("way", BATCHED)
def test_rows_of_a_batch_equal_the_rows_alone(way: str, tmp_path: Path) -> None:
    model, _, _ = make_pair("llama", tmp_path)
    ids, how = tokens(3, 6), BATCHED[way]
    mask = torch.ones_like(ids)
    mixed = model.generate(ids, attention_mask=mask, adapter_names=NAMES, **how)
    answers = []
    for row, name in enumerate(NAMES):
        one = ids[row : row + 1]
        alone = model.generate(one, attention_mask=mask[:1], adapter_names=[name], **how)
        assert torch.equal(mixed[row : row + 1], alone)
        answers.append(torch.equal(alone, model.generate(one, attention_mask=mask[:1], **how)))
    assert answers == [False, True, False]


@pytest.mark.parametrize("way", ["attached assistant", "early exit"])
def test_speculation_of_transformers_verifies_with_the_adapter(way: str, tmp_path: Path) -> None:
    model, _, pool = make_pair("llama", tmp_path)
    how: dict[str, Any] = {"assistant_early_exit": 1}
    if way == "attached assistant":
        how = {"assistant_model": lora_ext.attach(make_model("llama"), pool)}
    ids = tokens(1, 6)
    mask = torch.ones_like(ids)
    for name in NAMES:
        with lora_ext.adapters([name], pool=pool):
            expected = model.generate(ids, attention_mask=mask, **GREEDY)
            assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY, **how), expected)


def test_pipelines_take_names_for_their_batches(tmp_path: Path) -> None:
    model, _, _ = make_pair("llama", tmp_path)
    tokenizer = numbered_words(padding_side="left")
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
