"""Activated adapters: each row equals PEFT's, and blocks before a start are the base model's."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from served_llama import Reference

ATOL = 3e-4
INVOCATION = [40, 41]
SHARED = [2 + i % 30 for i in range(70)]  # a block of the cache has 32 tokens


@pytest.fixture(scope="module")
def activated(folder, make_engine):
    """An engine, and PEFT with two activated adapters beside an ordinary one."""
    for source, name in (("a", "alora"), ("d", "alora2")):
        shutil.copytree(folder / source, folder / name)
        path = folder / name / "adapter_config.json"
        own = {"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"}
        path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with make_engine() as made:
        yield made, Reference(folder, names=["alora", "alora2", "b"])


def ask(engine, folder, names, prompts):
    from vllm.lora.request import LoRARequest

    numbers = {"b": 2, "alora": 21, "alora2": 22}
    made = {n: LoRARequest(n, number, str(folder / n)) for n, number in numbers.items()}
    engine.request = lambda name: made.get(name)
    return engine.run(names, prompts)


def check(reference, answers, names):
    """PEFT looks for the invocation in what it is given, answers included: there are none."""
    for answer in answers:
        written = [answer.prompt[-1], *answer.tokens]
        assert tuple(INVOCATION) not in itertools.pairwise(written)
    reference.check(answers, names, ATOL)


def test_rows_equal_peft_beside_ordinary_ones(activated, folder):
    engine, reference = activated
    prompts = [[5, 6, 40, 41, 7], [9, 40, 41, 10, 40, 41, 11], [12, 13], [40, 41], [9, 8, 7]]
    names = ["alora", "alora2", None, "alora", "b"]
    check(reference, ask(engine, folder, names, prompts), names)


def test_blocks_before_the_start_are_shared_and_later_ones_are_not(activated, folder):
    engine, reference = activated
    assert engine.llm.reset_prefix_cache()
    late = [*SHARED, 40, 41, 5]
    early = [*SHARED[:40], 40, 41, *SHARED[40:]]
    order = [
        (None, [*SHARED, 5], 0),
        ("alora", late, 64),  # two blocks of the base model's
        ("alora2", late, 64),
        ("alora", early, 32),
        ("alora", [*early, 6, 40, 41, 8], 32),  # the same tokens in its first block, another start
        ("alora", early, 64),  # and its own again
        (None, late, 64),
        ("b", late, 0),
    ]
    for name, prompt, cached in order:
        answers = ask(engine, folder, [name], [prompt])
        check(reference, answers, [name])
        assert answers[0].cached == cached, (name, prompt)


def test_a_prompt_in_chunks(activated, folder):
    engine, reference = activated
    assert engine.llm.reset_prefix_cache()
    prompts = [[*SHARED, *SHARED[:20], 40, 41, 3], [*SHARED[:63], 40, 41, *SHARED[:9]]]
    check(reference, ask(engine, folder, ["alora", "alora2"], prompts), ["alora", "alora2"])


def test_what_cannot_be_answered_is_refused_and_the_rest_goes_on(activated, folder):
    engine, reference = activated
    with pytest.raises(ValueError, match=r"'alora'.*its invocation \[40, 41\], found none"):
        ask(engine, folder, ["alora"], [[5, 6, 7]])
    with pytest.raises(ValueError, match="prompt_logprobs None"):
        engine.run(["alora"], [[5, 40, 41]], prompt_logprobs=1)
    prompts = [[5, 6, 40, 41, 7]]
    check(reference, ask(engine, folder, ["alora"], prompts), ["alora"])


def test_a_folder_whose_invocation_changes_is_another_load(activated, folder):
    from vllm.lora.request import LoRARequest

    engine, reference = activated
    moved = folder / "moved"
    shutil.copytree(folder / "alora", moved)
    engine.request = lambda _: LoRARequest("moved", 31, str(moved), load_inplace=True)
    first = engine.run(["moved"], [[5, 40, 41, 7]])
    reference.check(first, ["alora"], ATOL)
    path = moved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alora_invocation_tokens": [7]}))
    found = engine.run(["moved"], [[5, 40, 41, 7]])
    assert not torch.allclose(found[0].logprobs, first[0].logprobs, atol=1e-2)
