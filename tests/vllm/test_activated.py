"""Activated adapters: rows equal PEFT's, and cache blocks before an adapter starts are shared with
the base model."""

import shutil

import pytest
import torch
from served_llama import ActivatedReference, activate

ATOL = 3e-4  # as in test_against_peft.py
SHARED = [2 + i % 30 for i in range(70)]  # A cache block has 32 tokens.


@pytest.fixture(scope="module")
def reference(folder):
    return ActivatedReference(folder)


def test_rows_of_activated_and_ordinary_adapters_equal_peft(engine, reference):
    prompts = [[5, 6, 40, 41, 7], [9, 40, 41, 10, 40, 41, 11], [12, 13], [40, 41], [9, 8, 7]]
    names = ["alora", "alora2", None, "alora", "b"]
    reference.check(engine.run(names, prompts), names, ATOL)


def test_blocks_before_the_start_are_shared_and_later_ones_are_not(engine, reference):
    engine.forget()
    late = [*SHARED, 40, 41, 5]
    early = [*SHARED[:40], 40, 41, *SHARED[40:]]
    order = [
        (None, [*SHARED, 5], 0),
        ("alora", late, 64),  # The adapter reuses two cache blocks (64 tokens) of the base model.
        ("alora2", late, 64),
        ("alora", early, 32),
        # The first cache block is equal, but the adapter starts elsewhere.
        ("alora", [*early, 6, 40, 41, 8], 32),
        ("alora", early, 64),  # again the prompt `early`
        (None, late, 64),
        ("b", late, 0),
    ]
    for name, prompt, cached in order:
        answers = engine.run([name], [prompt])
        reference.check(answers, [name], ATOL)
        assert answers[0].cached == cached, (name, prompt)


def test_prompt_processed_in_chunks_equals_peft(engine, reference):
    engine.forget()
    prompts = [[*SHARED, *SHARED[:20], 40, 41, 3], [*SHARED[:63], 40, 41, *SHARED[:9]]]
    names = ["alora", "alora2"]
    reference.check(engine.run(names, prompts), names, ATOL)


def test_invalid_prompts_raise_and_other_prompts_are_answered(engine, reference):
    with pytest.raises(ValueError, match=r"'alora'.*its invocation \[40, 41\], found none"):
        engine.run(["alora"], [[5, 6, 7]])
    with pytest.raises(ValueError, match="prompt_logprobs None"):
        engine.run(["alora"], [[5, 40, 41]], prompt_logprobs=1)
    reference.check(engine.run(["alora"], [[5, 6, 40, 41, 7]]), ["alora"], ATOL)


def test_folder_with_a_changed_invocation_is_loaded_again(engine, folder, reference):
    from vllm.lora.request import LoRARequest

    moved = folder / "moved"
    shutil.copytree(folder / "alora", moved)
    with pytest.MonkeyPatch.context() as patch:
        request = LoRARequest("moved", 31, str(moved), load_inplace=True)
        patch.setattr(engine, "request", lambda _: request)
        first = engine.run(["moved"], [[5, 40, 41, 7]])
        activate(moved, [7])
        found = engine.run(["moved"], [[5, 40, 41, 7]])
    reference.check(first, ["alora"], ATOL)
    assert not torch.allclose(found[0].logprobs, first[0].logprobs, atol=1e-2)
