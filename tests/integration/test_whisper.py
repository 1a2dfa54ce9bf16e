"""Whisper under ``adapters``: every recording in a batch gets the answer that it gets alone."""

from typing import Any

import pytest
import torch
from tiny import VOCAB, assert_answers_as_alone, enlarged, load_random, maker

import lora_ext

NAMES = ["red", None, "blue"]
FRAMES = 40
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def attached() -> Any:
    make = maker(
        "Whisper", "ForConditionalGeneration", **MARKS,
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
        max_source_positions=FRAMES // 2, max_target_positions=64, decoder_start_token_id=3,
        suppress_tokens=None, begin_suppress_tokens=None, forced_decoder_ids=None,
    )  # fmt: skip
    model = enlarged(make, 5)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8, targets=targets)
    load_random(pool, "red", "blue")
    return lora_ext.attach(model, pool)


HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 3, "num_return_sequences": 3},
    "one step of several": {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 1},
}


@pytest.mark.parametrize("mode", HOW)
def test_every_recording_gets_the_answer_of_the_recording_alone(mode: str) -> None:
    model = attached()
    sounds = torch.randn(3, 8, FRAMES, generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": 6, "do_sample": False, **HOW[mode]}
    with lora_ext.adapters(NAMES):
        mixed = model.generate(sounds, **how)
        again = model.generate(sounds, **how)  # The block applies to its three rows again.
    assert torch.equal(mixed, again)
    copies = how.get("num_return_sequences", 1)
    answers = []
    for row, name in enumerate(NAMES):
        with lora_ext.adapters(name):
            answers.append(model.generate(sounds[row : row + 1], **how))
    for row, answer in enumerate(answers):
        found = mixed[row * copies : (row + 1) * copies]
        length = min(answer.shape[1], found.shape[1])
        assert torch.equal(answer[:, :length], found[:, :length])
    assert not torch.equal(answers[0][:, :3], answers[1][:, :3]) or mode.startswith("one")
    base = model.generate(sounds, **how)
    assert not torch.equal(base[:copies], mixed[:copies])


def test_logits_of_sampled_sequences_are_those_of_their_adapter() -> None:
    model = attached()
    sounds = torch.randn(3, 8, FRAMES, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(4)
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": 5, "num_return_sequences": 2}
    with lora_ext.adapters(NAMES):
        out = model.generate(
            sounds, **how, output_logits=True, return_dict_in_generate=True, return_timestamps=False
        )
    assert len(out.sequences) == 6
    for row, sequence in enumerate(out.sequences):
        with torch.no_grad(), lora_ext.adapters(NAMES[row // 2]):
            logits = model(sounds[row // 2, None], decoder_input_ids=sequence[None]).logits[0]
        steps = torch.stack([step[row] for step in out.logits])
        start = len(sequence) - len(steps) - 1
        torch.testing.assert_close(steps, logits[start:-1], rtol=0, atol=1e-4)


def test_rows_keep_their_adapters_when_finished_recordings_leave_the_batch() -> None:
    model = attached()
    lengths = torch.tensor([2 * FRAMES, FRAMES, 3 * FRAMES])
    sounds = torch.randn(3, 8, 3 * FRAMES, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(3 * FRAMES) < lengths[:, None]).long()
    model.generation_config.no_timestamps_token_id = VOCAB - 11
    how = {"max_new_tokens": 4, "do_sample": False, "return_timestamps": True}
    assert_answers_as_alone(model, sounds, NAMES, attention_mask=mask, **how)
