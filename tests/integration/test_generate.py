"""``model.generate`` with one adapter per row: caches, padding, sampling, beams, threads."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_pair, only, tokens
from torch import Tensor

import lora_ext
from lora_ext.pool import PoolFullError

NAMES = ["red", "green", None, "blue"]
PEFT_NAMES = [name or "__base__" for name in NAMES]
NEW = 6
DECODERS = ["llama", "qwen2", "gpt2"]


def left_padded(lengths: tuple[int, ...] = (5, 3, 5, 2)) -> dict[str, Tensor]:
    ids = tokens(len(lengths), max(lengths))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths).unsqueeze(1)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def alone(reference: Any, inputs: dict[str, Tensor], row: int, **how: Any) -> Tensor:
    """Return PEFT's answer to one row alone, without padding, with its adapter active."""
    keep = inputs["attention_mask"][row].bool()
    prompt = inputs["input_ids"][row, keep].unsqueeze(0)
    with only(reference, NAMES[row]):
        out = reference.generate(input_ids=prompt, max_new_tokens=NEW, **how)
    return out[:, prompt.shape[1] :]


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "greedy without cache": {"do_sample": False, "use_cache": False},
    "greedy with a static cache": {"do_sample": False, "cache_implementation": "static"},
    "beams": {"do_sample": False, "num_beams": 3},
    "all beams returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 4},
}


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_mixed_batch_equal_the_rows_alone(family: str, mode: str, tmp_path: Path) -> None:
    model, reference, pool = make_pair(family, tmp_path)
    inputs, how = left_padded(), MODES[mode]
    with lora_ext.adapters(NAMES):
        ours = model.generate(**inputs, max_new_tokens=NEW, **how)
        again = model.generate(**inputs, max_new_tokens=NEW, adapter_names=PEFT_NAMES, **how)
        with torch.no_grad():  # After beam search, the block applies to four rows again.
            model(**inputs)
    assert torch.equal(ours, again)
    assert pool.stats()["pins"] == 0
    returned = how.get("num_return_sequences", 1)
    expected = [alone(reference, inputs, row, **how) for row in range(len(NAMES))]
    answers = ours[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(answers, torch.cat(expected))
    assert answers.shape == (len(NAMES) * returned, NEW)
    base = model.generate(**inputs, max_new_tokens=NEW, **how)
    rows = torch.arange(len(ours)) // returned
    assert torch.equal(base[rows == 2], ours[rows == 2])
    assert not torch.equal(base[rows == 1], ours[rows == 1])  # The adapters change the tokens.


def test_sampled_sequences_use_their_rows_adapter_and_wrong_names_raise(tmp_path: Path) -> None:
    model, reference, _ = make_pair("llama", tmp_path)
    prompt = tokens(len(NAMES), 4)
    torch.manual_seed(3)
    with lora_ext.adapters(NAMES):
        how = {"do_sample": True, "top_k": 0, "num_return_sequences": 3, "output_logits": True}
        out = model.generate(prompt, max_new_tokens=NEW, return_dict_in_generate=True, **how)
    names = [name for name in PEFT_NAMES for _ in range(3)]
    with torch.no_grad():
        logits = reference(input_ids=out.sequences, adapter_names=names).logits
    # Both are float32 with sums of at most 48 terms; logits are at most about 10: 1e-4 is 100 ulp.
    torch.testing.assert_close(torch.stack(out.logits, 1), logits[:, 3:-1], rtol=0, atol=1e-4)
    assert len(out.sequences.unique(dim=0)) == 12  # Sampling gave different sequences.
    prompt = tokens(4, 5)
    with lora_ext.adapters(["red", "blue"]):
        with pytest.raises(ValueError, match=r"expected a batch of 2 seq.*found .*\(4, 5, feat"):
            model.generate(input_ids=prompt, max_new_tokens=2)
        message = r"expected a batch of 6 = 2 names x 3 beams or returned rows.*\(12, "
        with pytest.raises(ValueError, match=message):
            model.generate(input_ids=prompt, max_new_tokens=2, num_beams=3)
        with torch.no_grad():
            model(prompt[:2])  # The failed calls left the block unchanged.
            with pytest.raises(ValueError, match="expected a batch of 2 sequences"):
                model(prompt)
    with pytest.raises(KeyError, match="adapter 'rot' is not loaded"):
        model.generate(input_ids=prompt, max_new_tokens=2, adapter_names=["rot"] * 4)


@pytest.mark.slow
def test_threads_generate_while_another_loads_and_unloads(tmp_path: Path) -> None:
    model, _, pool = make_pair("llama", tmp_path)
    mixes = [[a, b] for a in ("red", "green", "blue", None) for b in ("green", None)]
    prompt, how = tokens(2, 5), {"max_new_tokens": NEW, "do_sample": False}
    expected = [model.generate(input_ids=prompt, adapter_names=m, **how) for m in mixes]
    failures: list[BaseException] = []
    done = threading.Event()

    def churn() -> None:
        sources = [tmp_path / name for name in ("red", "green", "blue")]
        while not done.is_set():
            try:
                pool.load("new", sources[0])
                pool.update("new", sources[1])
                pool.unload("new")
            except PoolFullError:
                pass

    def serve(mix: list[str | None], answer: Tensor) -> None:
        for _ in range(5):
            with lora_ext.adapters(mix):
                assert torch.equal(model.generate(input_ids=prompt, **how), answer)

    def guarded(work: Any, *args: Any) -> None:
        try:
            work(*args)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=guarded, args=(serve, *pair))
        for pair in zip(mixes, expected, strict=True)
    ]
    churner = threading.Thread(target=guarded, args=(churn,))
    for thread in (churner, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    churner.join()
    assert not failures, failures
    assert pool.stats()["pins"] == 0 and pool.stats()["loads"] > 5
