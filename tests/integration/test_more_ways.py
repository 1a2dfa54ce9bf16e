"""Less common ways to generate, some of which drop the names or change the rows of the batch.

In each way, every row gets the answer that it gets alone, or the call raises.
"""

import asyncio
import copy
import functools
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny import make_model, make_pair, numbered_words, tokens

import lora_ext

NAMES = ["red", None, "green"]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
TOKENIZER = numbered_words()
SINGULAR = "expected adapter_names=.* found adapter_name='red'"
TEXTS = ["w5 w6 w7", "w9 w3", "w10 w11 w12 w13"]


@pytest.mark.parametrize("kind", ["TextIteratorStreamer", "AsyncTextIteratorStreamer"])
def test_streamers_of_a_thread_use_the_names_of_the_call(kind: str, tmp_path: Path) -> None:
    model, _, _ = make_pair("llama", tmp_path)
    ids = tokens(1, 6)
    how = {"inputs": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
    expected = TOKENIZER.decode(model.generate(**how, adapter_names=["red"])[0])

    async def collect() -> str:
        streamer: Any = getattr(transformers, kind)(TOKENIZER)
        given = {**how, "adapter_names": ["red"], "streamer": streamer}
        threading.Thread(target=model.generate, kwargs=given).start()
        if kind == "TextIteratorStreamer":
            return "".join(streamer)
        return "".join([text async for text in streamer])

    assert asyncio.run(collect()).split() == expected.split()
    assert expected != TOKENIZER.decode(model.generate(**how)[0])


def test_generate_of_the_instance_accepts_names_and_is_restored(tmp_path: Path) -> None:
    """Check ``model.generate`` as transformers sets it for a repository with a custom_generate."""

    def by_hand(model: Any, inputs: torch.Tensor, **_: Any) -> torch.Tensor:
        for _step in range(6):
            token = model(inputs).logits[:, -1:].argmax(-1)
            inputs = torch.cat([inputs, token], 1)
        return inputs

    other, _, pool = make_pair("llama", tmp_path)
    model: Any = make_model("llama")
    own = model.generate = functools.partial(by_hand, model=model)
    lora_ext.attach(model, pool)
    ids = tokens(3, 6)
    expected = other.generate(
        ids, attention_mask=torch.ones_like(ids), adapter_names=NAMES, **GREEDY
    )
    for served in (model, copy.deepcopy(model)):
        assert torch.equal(served.generate(inputs=ids, adapter_names=NAMES), expected)
        with lora_ext.adapters(NAMES, pool=pool):
            assert torch.equal(served.generate(inputs=ids), expected)
        assert not torch.equal(served.generate(inputs=ids), expected)
    assert lora_ext.detach(model).__dict__["generate"] is own


def scores(outputs: Any) -> list[float]:
    return [output["score"] for output in outputs]


def test_classification_pipelines_use_blocks_and_reject_names(tmp_path: Path) -> None:
    """Check names in a call: transformers passes them to the tokenizer, which ignores them."""
    model, _, pool = make_pair("bert", tmp_path)
    pipe: Any = transformers.pipeline("text-classification", model=model, tokenizer=TOKENIZER)
    alone = []
    for text, name in zip(TEXTS, NAMES, strict=True):
        with lora_ext.adapters(name, pool=pool):
            alone += scores(pipe([text]))
    with lora_ext.adapters(NAMES, pool=pool):
        assert scores(pipe(TEXTS, batch_size=3)) == pytest.approx(alone, abs=1e-6)
        for size in (1, 2):
            with pytest.raises(ValueError, match="adapters: names: "):
                pipe(TEXTS, batch_size=size)
    assert scores(pipe(TEXTS)) != pytest.approx(alone, abs=1e-3)
    for given in (TEXTS, TEXTS[0]):
        with pytest.raises(ValueError, match="adapter_names: expected `with"):
            pipe(given, batch_size=3, adapter_names=NAMES)


def test_iterator_of_a_pipeline_must_be_read_inside_the_block(tmp_path: Path) -> None:
    model, _, pool = make_pair("bert", tmp_path)
    pipe: Any = transformers.pipeline("text-classification", model=model, tokenizer=TOKENIZER)
    message = "is read outside every block, so it uses the base model or the default of attach"

    def texts() -> Iterator[str]:
        yield from TEXTS

    with lora_ext.adapters("green", pool=pool):
        expected = scores(pipe(TEXTS))
        assert scores(pipe(texts())) == pytest.approx(expected, abs=1e-6)
        lazy = pipe(texts())
    with pytest.warns(UserWarning, match=message):
        base = scores(lazy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # The layers warn once, and never for correct use.
        assert scores(pipe(texts())) == base == pytest.approx(scores(pipe(TEXTS)), abs=1e-6)
    twin, _, other = make_pair("bert", tmp_path / "other")
    pipe = transformers.pipeline("text-classification", model=twin, tokenizer=TOKENIZER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # This call is outside of any block.
        assert scores(pipe(texts())) == pytest.approx(base, abs=1e-6)
        with lora_ext.adapters(None, pool=other):
            assert scores(pipe(texts())) == pytest.approx(base, abs=1e-6)
            lazy = pipe(texts())
        assert scores(lazy) == pytest.approx(base, abs=1e-6)
    with pytest.raises(ValueError, match="adapter_names: expected `with"):
        scores(pipe(texts(), adapter_names=NAMES))


def test_pipelines_that_split_an_input_into_rows_accept_one_name(tmp_path: Path) -> None:
    model, _, pool = make_pair("bert", tmp_path)
    pipe: Any = transformers.pipeline("zero-shot-classification", model=model, tokenizer=TOKENIZER)
    how = {"candidate_labels": ["w20", "w21"], "hypothesis_template": "w8 {}"}
    with lora_ext.adapters("green", pool=pool):
        green = pipe(TEXTS[0], **how)["scores"]
        assert pipe(TEXTS[0], **how, batch_size=2)["scores"] == pytest.approx(green, abs=1e-6)
    assert green != pytest.approx(pipe(TEXTS[0], **how)["scores"], abs=1e-3)
    with lora_ext.adapters(["red", "green"], pool=pool):
        with pytest.raises(ValueError, match="one name for all rows of a ZeroShotClassification"):
            pipe(TEXTS[:2], **how, batch_size=2)


def test_trainer_predicts_with_the_surrounding_block(tmp_path: Path) -> None:
    model, _, pool = make_pair("bert", tmp_path)
    rows = [{"input_ids": row, "labels": torch.tensor(0)} for row in tokens(5, 6)]
    settings = transformers.TrainingArguments(
        str(tmp_path / "out"), per_device_eval_batch_size=3, report_to=[], use_cpu=True
    )
    trainer = transformers.Trainer(model, settings)
    found = {}
    for name in ("red", "green", None):
        with lora_ext.adapters(name, pool=pool), torch.no_grad():
            found[name] = torch.tensor(trainer.predict(rows).predictions)
            assert (found[name] - model(tokens(5, 6)).logits).abs().max() < 1e-5
    assert (found["red"] - found["green"]).abs().max() > 1e-3
    with lora_ext.adapters(NAMES, pool=pool), pytest.raises(ValueError, match="expected a batch"):
        trainer.predict(rows)  # The last batch has two rows.


def test_attached_model_error_names_the_right_argument(tmp_path: Path) -> None:
    """Check ``adapter_name=`` in place of ``adapter_names=``; a model would ignore the former."""
    model, _, _ = make_pair("llama", tmp_path)
    ids = tokens(2, 3)
    for call in (model, model.model, model.forward):
        with pytest.raises(TypeError, match=f"forward: {SINGULAR}"):
            call(ids, adapter_name="red")
    with pytest.raises(TypeError, match=f"generate: {SINGULAR}"):
        model.generate(ids, adapter_name="red", **GREEDY)
    with pytest.raises(TypeError, match=f"generate_batch: {SINGULAR}"):
        model.generate_batch(ids.tolist(), adapter_name="red")
    with lora_ext.adapters("red"), pytest.raises(TypeError, match=SINGULAR):
        model(ids, adapter_name="red")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    fused: Any = lora_ext.from_peft(peft.get_peft_model(make_model("llama"), config, "red"))
    for call in (fused, lambda ids, **how: fused.generate(input_ids=ids, **how, **GREEDY)):
        with pytest.raises(TypeError, match=f"from_peft: {SINGULAR}"):
            call(ids, adapter_name="red")
    with pytest.raises(TypeError, match=f"generate_batch: {SINGULAR}"):
        fused.generate_batch(ids.tolist(), adapter_name="red")


def step_by_hand(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    for _ in range(3):
        token = model(input_ids).logits[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, token], 1)
    return input_ids


# Other ways are in test_generate.py and test_families.py.
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


def test_pipelines_accept_names_for_their_batches(tmp_path: Path) -> None:
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
