"""Arguments of transformers' ``generate``: configurations, stop strings, streamers and errors."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
import torch
import transformers
from methods.toy import make_draft, make_model, prompts
from torch import Tensor
from transformers import GenerationConfig

from lora_ext.methods import mtpc
from lora_ext.methods.mtpc._request import row_seeds

NEW = 40
WORDS = ["ab", "c", "bc", "a", "ca"]


def make_tokenizer() -> Any:
    """Return a tokenizer of words in which a stop string can start and end inside a word."""
    # To get the text of a word, transformers decodes it together with the first of these words.
    words = [*WORDS, "abcdef", "[UNK]"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


class Recorder:
    """Streamer that records the tokens that it receives."""

    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def make(batch: int = 1, **settings: Any) -> tuple[Any, mtpc.SpeculativeDecoder, Tensor, Tensor]:
    model = make_model("llama")
    return model, make_draft(model).decoder(**settings), *prompts(batch)


# -------------------------------------------------------------------------------------------------
# Configuration


def test_configuration_sets_budget_ends_and_padding():
    _, decoder, ids, mask = make(3)
    plain = decoder.generate(
        ids, mask, max_new_tokens=9, eos_token_id=[2, 3], pad_token_id=4, seed=1
    )
    config = GenerationConfig(max_new_tokens=9, eos_token_id=[2, 3], pad_token_id=4)
    named = decoder.generate(ids, mask, generation_config=config, seed=1)
    assert torch.equal(named.sequences, plain.sequences)
    over = decoder.generate(ids, mask, generation_config=config, max_new_tokens=4, seed=1)
    assert torch.equal(over.sequences, plain.sequences[:, : over.sequences.shape[1]])
    assert over.sequences.shape[1] <= ids.shape[1] + 4
    length = decoder.generate(ids, mask, max_length=ids.shape[1] + 3, eos_token_id=[], seed=1)
    assert length.sequences.shape[1] == ids.shape[1] + 3


def test_configuration_changes_sampling_for_one_call():
    model, decoder, ids, mask = make(2, temperature=3.0)
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW)
    assert torch.equal(decoder.generate(ids, mask, generation_config=config).sequences, expected)
    assert torch.equal(
        decoder.generate(ids, mask, max_new_tokens=NEW, do_sample=False).sequences, expected
    )
    assert (decoder.mode, decoder.temperature) == ("sample", 3.0)
    cold = make_draft(make_model("llama")).decoder(temperature=0.5, top_p=0.8)
    wanted = cold.generate(ids, mask, max_new_tokens=NEW, seed=2)
    config = GenerationConfig(do_sample=True, temperature=0.5, top_p=0.8, max_new_tokens=NEW)
    found = decoder.generate(ids, mask, generation_config=config, seed=2)
    assert torch.equal(found.sequences, wanted.sequences)
    greedy = make_draft(make_model("llama")).decoder("greedy")
    found = greedy.generate(ids, mask, generation_config=config, seed=2)
    assert torch.equal(found.sequences, wanted.sequences)
    with pytest.raises(ValueError, match="SpeculativeDecoder: top_p: expected a number in"):
        decoder.generate(ids, mask, max_new_tokens=1, top_p=2.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("repetition_penalty", 1.2),
        ("no_repeat_ngram_size", 3),
        ("top_k", 50),
        ("min_p", 0.1),
        ("typical_p", 0.9),
        ("bad_words_ids", [[1]]),
        ("suppress_tokens", [1]),
        ("forced_eos_token_id", 2),
        ("min_new_tokens", 3),
        ("max_time", 1.0),
        ("guidance_scale", 1.5),
        ("use_cache", False),
        ("output_scores", True),
        ("cache_implementation", "static"),
    ],
)
def test_errors_name_unsupported_settings(name: str, value: Any):
    _, decoder, ids, mask = make()
    with pytest.raises(ValueError, match=f"SpeculativeDecoder: {name}: expected .*, found"):
        decoder.generate(ids, mask, max_new_tokens=2, **{name: value})
    config = GenerationConfig(max_new_tokens=2)
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"SpeculativeDecoder: {name}: expected .*, found"):
        decoder.generate(ids, mask, generation_config=config)


def test_non_integer_prompts_are_refused():
    _, decoder, ids, mask = make()
    with pytest.raises(ValueError, match=r"input_ids: expected integers of shape \(B, S\), found"):
        decoder.generate(ids.float(), mask, max_new_tokens=2)


def test_neutral_settings_are_accepted():
    _, decoder, ids, mask = make()
    config = GenerationConfig(num_beams=1, repetition_penalty=1.0, top_k=0, use_cache=True)
    config.bos_token_id, config.output_scores = 1, False
    more = {"num_return_sequences": 1, "early_stopping": False, "guidance_scale": None}
    found = decoder.generate(ids, mask, max_new_tokens=2, generation_config=config, **more)
    assert found.sequences.shape[1] == ids.shape[1] + 2


def test_errors_name_unknown_arguments():
    _, decoder, ids, mask = make()
    with pytest.raises(TypeError, match="SpeculativeDecoder: logits_processor: expected a setting"):
        decoder.generate(ids, mask, max_new_tokens=2, logits_processor=[1])


def test_penalty_in_the_models_configuration_is_refused_without_another():
    model, decoder, ids, mask = make()
    model.generation_config.repetition_penalty = 1.3
    with pytest.raises(
        ValueError, match=r"generation_config without repetition_penalty, found 1.3"
    ):
        decoder.generate(ids, mask, max_new_tokens=2)
    config = GenerationConfig(max_new_tokens=2)
    assert decoder.generate(ids, mask, generation_config=config).sequences.shape[1] == 8
    model.generation_config = GenerationConfig(do_sample=True, top_k=5, temperature=0.3)
    assert decoder.generate(ids, mask, max_new_tokens=2).sequences.shape[1] == 8


def test_token_type_ids_of_a_tokenizer_are_ignored():
    _, decoder, ids, mask = make(2)
    types = torch.zeros_like(ids)
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    found = decoder.generate(**batch, max_new_tokens=9, seed=4)
    assert torch.equal(
        found.sequences, decoder.generate(ids, mask, max_new_tokens=9, seed=4).sequences
    )


# -------------------------------------------------------------------------------------------------
# Stop strings and streamers


@pytest.mark.parametrize("window", ["condition", "restart"])
@pytest.mark.parametrize("strings", ["abc", ["cc", "bcab"], ["cab"], "aca", "cb", "abab"])
def test_rows_end_at_stop_strings_like_those_of_generate(window: str, strings: Any):
    model, decoder, ids, mask = make(3, mode="greedy", window=window)
    # generate pads finished rows only if there is an end token; no row emits this one.
    more: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": 5}
    more |= {"stop_strings": strings, "tokenizer": make_tokenizer()}
    expected = model.generate(ids, attention_mask=mask, do_sample=False, **more)
    found = decoder.generate(ids, mask, **more)
    assert torch.equal(found.sequences, expected)


def test_stop_strings_truncate_samples():
    _, decoder, ids, mask = make(3)
    tokenizer, whole = make_tokenizer(), decoder.generate(ids, mask, max_new_tokens=NEW, seed=6)
    for strings in (["cc"], ["abc", "caca"], ["bcb"]):
        found = decoder.generate(
            ids, mask, max_new_tokens=NEW, seed=6, stop_strings=strings, tokenizer=tokenizer
        )
        lengths = [0, 0, 0]
        for row in range(3):
            text = "".join(WORDS[t] for t in ids[row].tolist())
            for token in whole.sequences[row, 6:].tolist():
                lengths[row] += 1
                before, text = len(text), text + WORDS[token]
                # A string may start in the prompt and ends inside the last token.
                ends = [text.find(s, max(0, before - len(s) + 1)) for s in strings]
                if max(ends) >= 0:
                    break
            length = lengths[row]
            assert torch.equal(
                found.sequences[row, : 6 + length], whole.sequences[row, : 6 + length]
            )
            assert (found.sequences[row, 6 + length :] == 0).all()
        assert found.sequences.shape[1] == 6 + max(lengths)


def test_stop_strings_may_be_in_the_configuration_and_need_a_tokenizer():
    _, decoder, ids, mask = make(1)
    config = GenerationConfig(max_new_tokens=NEW, stop_strings=["cc"])
    tokenizer = make_tokenizer()
    found = decoder.generate(ids, mask, generation_config=config, tokenizer=tokenizer, seed=1)
    named = decoder.generate(
        ids, mask, max_new_tokens=NEW, stop_strings="cc", tokenizer=tokenizer, seed=1
    )
    assert torch.equal(found.sequences, named.sequences)
    with pytest.raises(
        ValueError, match="tokenizer: expected the tokenizer of the stop_strings, found None"
    ):
        decoder.generate(ids, mask, generation_config=config)


def test_streamer_receives_the_values_of_generate():
    model, decoder, ids, mask = make(1, mode="greedy")
    mine, theirs = Recorder(), Recorder()
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": 2}
    model.generate(ids, attention_mask=mask, do_sample=False, streamer=theirs, **options)
    found = decoder.generate(ids, mask, streamer=mine, **options)
    assert mine.got == theirs.got and mine.ended and theirs.ended
    assert [t for part in mine.got for t in part] == found.sequences[0].tolist()


def test_text_streamer_of_transformers_prints_the_text(capsys: pytest.CaptureFixture[str]):
    _, decoder, ids, mask = make(1)
    tokenizer = make_tokenizer()
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
    found = decoder.generate(ids, mask, max_new_tokens=9, streamer=streamer)
    text = capsys.readouterr().out.strip()
    assert text == tokenizer.decode(found.sequences[0, 6:])


def test_streamer_with_several_prompts_is_refused():
    _, decoder, ids, mask = make(2)
    with pytest.raises(ValueError, match="streamer: expected a single prompt, found 2"):
        decoder.generate(ids, mask, max_new_tokens=2, streamer=Recorder())


@pytest.mark.parametrize("seed", [2**64, -1, [0, -7]])
def test_error_names_seed_out_of_range(seed: int | list[int]) -> None:
    with pytest.raises(ValueError, match=r"seed: expected a number from 0 to 2\^64 - 1, found"):
        row_seeds(seed, 2)


@pytest.mark.parametrize("field", ["n_token", "rank", "adapter_rank"])
def test_error_names_non_integer_size(field: str) -> None:
    with pytest.raises(ValueError, match=f"MtpcConfig: {field}: expected an integer.*, found 2.5"):
        mtpc.MtpcConfig(**{field: 2.5})
