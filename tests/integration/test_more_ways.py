"""Ways to run a model that pass names by, or give it other rows than the caller's: each answers as
the row alone, or is refused by name."""

from __future__ import annotations

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
from tiny import make_model, make_pair, tokens
from tokenizers import Tokenizer, models, pre_tokenizers

import lora_ext

NAMES = ["red", None, "green"]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
TEXTS = ["w5 w6 w7", "w9 w3", "w10 w11 w12 w13"]


@pytest.fixture
def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1"
    )


def adapted(model: Any, targets: Any, folder: Path) -> Any:
    """``model``, attached, with two random adapters on ``targets``."""
    torch.manual_seed(1)
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=8)
    for name in ("red", "green"):
        config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets)
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        wrapped.save_pretrained(folder / name)
        pool.load(name, folder / name)
    return lora_ext.attach(model, pool)


# -------------------------------------------------------------------------------------------------
# Text as it comes


@pytest.mark.parametrize("kind", ["TextIteratorStreamer", "AsyncTextIteratorStreamer"])
def test_streamers_of_a_thread_take_the_names_of_the_call(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    model, _, _ = make_pair("llama", tmp_path)
    ids = tokens(1, 6)
    how = {"inputs": ids, "attention_mask": torch.ones_like(ids), "adapter_names": ["red"]}
    expected = tokenizer.decode(model.generate(**how, **GREEDY)[0])

    async def collect() -> str:
        streamer: Any = getattr(transformers, kind)(tokenizer)
        thread = threading.Thread(
            target=model.generate, kwargs={**how, **GREEDY, "streamer": streamer}
        )
        thread.start()
        if kind == "TextIteratorStreamer":
            return "".join(streamer)
        return "".join([text async for text in streamer])

    assert asyncio.run(collect()).split() == expected.split()
    assert expected != tokenizer.decode(
        model.generate(**{**how, "adapter_names": None}, **GREEDY)[0]
    )


def test_a_generate_of_the_instances_own_takes_names_and_comes_back(tmp_path: Path) -> None:
    """As transformers leaves it on a model whose repository has a custom_generate."""

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


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1}], ids=["greedy", "beams", "top"]
)
def test_encoders_and_decoders_have_the_adapters_of_their_rows(
    how: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    marks = {"decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    config = transformers.T5Config(vocab_size=97, **sizes, **marks)
    model: Any = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    adapted(model, ["q", "v", "wi", "wo"], tmp_path)
    ids = tokens(3, 6)
    how, mask = {**GREEDY, **how}, torch.ones_like(ids)
    mixed = model.generate(ids, attention_mask=mask, adapter_names=NAMES, **how)
    alone = [
        model.generate(ids[i : i + 1], attention_mask=mask[:1], adapter_names=[name], **how)
        for i, name in enumerate(NAMES)
    ]
    assert torch.equal(mixed, torch.cat(alone))
    assert not torch.equal(mixed, model.generate(ids, attention_mask=mask, **how))


# -------------------------------------------------------------------------------------------------
# Images


def llava(folder: Path) -> Any:
    """Four image tokens an image; adapters in the language model and in the vision tower."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**sizes, **heads, image_size=8, patch_size=4)
    text = transformers.LlamaConfig(vocab_size=97, **sizes, **heads, num_key_value_heads=2)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=96, vision_feature_layer=-1
    )
    model: Any = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return adapted(model, "all-linear", folder)


@pytest.mark.parametrize("images", [(1, 1), (2, 0), (0, 2), (2, 1)])
def test_images_have_the_adapter_of_the_sequence_that_they_are_in(
    images: tuple[int, int], tmp_path: Path
) -> None:
    """Two images, two sequences: yet both images may be in one of them."""
    model, names = llava(tmp_path), ["red", "green"]
    rows = [[96] * 4 * count + [5 + i, *range(7, 18 - 4 * count)] for i, count in enumerate(images)]
    pixels = torch.randn(sum(images), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ids, first = torch.tensor(rows), 0
    how = {**GREEDY, "min_new_tokens": 6, "num_beams": 2}
    with torch.no_grad():
        mixed = model(input_ids=ids, pixel_values=pixels, adapter_names=names).logits
        said = model.generate(input_ids=ids, pixel_values=pixels, adapter_names=names, **how)
        for i, (name, count) in enumerate(zip(names, images, strict=True)):
            given: dict[str, Any] = {"input_ids": ids[i : i + 1]}
            if count:
                given["pixel_values"] = pixels[first : first + count]
            first += count
            alone = model(**given, adapter_names=[name]).logits
            # float32, logits of about 10, sums of at most 48 terms: 1e-4 is 100 roundings.
            assert (mixed[i] - alone[0]).abs().max() < 1e-4
            assert (model(**given).logits - alone).abs().max() > 0.1
            assert torch.equal(
                said[i : i + 1], model.generate(**given, adapter_names=[name], **how)
            )


# -------------------------------------------------------------------------------------------------
# Pipelines, Trainer


def scores(outputs: Any) -> list[float]:
    return [output["score"] for output in outputs]


def test_classifying_pipelines_serve_blocks_and_refuse_names(
    tokenizer: Any, tmp_path: Path
) -> None:
    """transformers gives names of the call to the tokenizer, which drops them."""
    model, _, pool = make_pair("bert", tmp_path)
    pipe: Any = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
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
        with pytest.raises(ValueError, match="adapter_names: expected a block around the pipeline"):
            pipe(given, batch_size=3, adapter_names=NAMES)


def test_an_iterator_of_a_pipeline_belongs_inside_the_block(tokenizer: Any, tmp_path: Path) -> None:
    """It computes where it is read."""
    model, _, pool = make_pair("bert", tmp_path)
    pipe: Any = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    message = "is read outside every block, and the base model or attach's default serves it"

    def texts() -> Iterator[str]:
        yield from TEXTS

    with lora_ext.adapters("green", pool=pool):
        expected = scores(pipe(TEXTS))
        assert scores(pipe(texts())) == pytest.approx(expected, abs=1e-6)
        lazy = pipe(texts())
    with pytest.warns(UserWarning, match=message):
        base = scores(lazy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once, and never for what is meant
        assert scores(pipe(texts())) == base == pytest.approx(scores(pipe(TEXTS)), abs=1e-6)
    twin, _, other = make_pair("bert", tmp_path / "other")
    pipe = transformers.pipeline("text-classification", model=twin, tokenizer=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores(pipe(texts())) == pytest.approx(base, abs=1e-6)  # called outside, too
        with lora_ext.adapters(None, pool=other):
            assert scores(pipe(texts())) == pytest.approx(base, abs=1e-6)
            lazy = pipe(texts())
        assert scores(lazy) == pytest.approx(base, abs=1e-6)
    with pytest.raises(ValueError, match="adapter_names: expected a block around the pipeline"):
        scores(pipe(texts(), adapter_names=NAMES))


def test_pipelines_that_cut_an_input_into_rows_take_one_name(
    tokenizer: Any, tmp_path: Path
) -> None:
    model, _, pool = make_pair("bert", tmp_path)
    pipe: Any = transformers.pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)
    how = {"candidate_labels": ["w20", "w21"], "hypothesis_template": "w8 {}"}
    with lora_ext.adapters("green", pool=pool):
        green = pipe(TEXTS[0], **how)["scores"]
        assert pipe(TEXTS[0], **how, batch_size=2)["scores"] == pytest.approx(green, abs=1e-6)
    assert green != pytest.approx(pipe(TEXTS[0], **how)["scores"], abs=1e-3)
    with lora_ext.adapters(["red", "green"], pool=pool):
        with pytest.raises(ValueError, match="one name for all rows of a ZeroShotClassification"):
            pipe(TEXTS[:2], **how, batch_size=2)


def test_a_trainer_predicts_with_the_block_around_it(tmp_path: Path) -> None:
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
        trainer.predict(rows)  # the last batch has two
