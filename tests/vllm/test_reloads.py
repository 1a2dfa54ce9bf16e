"""Adapters that are reloaded under the same name or path while other requests run.

Prompts are longer than a block of the prefix cache, which has 32 tokens.
"""

import itertools
import shutil

import pytest
from served_llama import VOCABULARY, Answer, Reference

ATOL = 3e-4  # as in test_against_peft.py
LONG = [2 + i % 90 for i in range(100)]
_numbers = itertools.count(100)


@pytest.fixture
def number(engine):
    engine.forget()
    return next(_numbers)


@pytest.fixture
def put(folder):
    """Return a function ``put(name)`` that copies an adapter to the path `moving` and returns this
    path."""

    def put(name):
        return str(shutil.copytree(folder / name, folder / "moving", dirs_exist_ok=True))

    return put


def request(name, number, path, **how):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(path), **how)


def start(engine, name, lora):
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=VOCABULARY)
    engine.llm.llm_engine.add_request(name, {"prompt_token_ids": LONG}, how, lora_request=lora)


def finish(engine, steps=None):
    """Return the answers, by request name, of the requests that end within ``steps`` steps."""
    found = {}
    for _ in range(steps) if steps else itertools.count():
        if not engine.llm.llm_engine.has_unfinished_requests():
            break
        for output in engine.llm.llm_engine.step():
            if output.finished:
                found[output.request_id] = Answer(output)
    return found


def answer(engine, lora):
    start(engine, "one", lora)
    return finish(engine)["one"]


def test_mixtures_are_refused_and_can_be_saved_as_one_adapter(engine, number, folder, peft_model):
    from lora_ext.adapter import merge_adapters

    a, b = request("a", number, folder / "a"), request("b", next(_numbers), folder / "b")
    for mixture in ({"a": 0.7, "b": -0.3}, ("a", 0.5), [a, b]):
        with pytest.raises(ValueError, match=r"lora_request: expected a LoRARequest.*'delta'"):
            start(engine, "mixed", mixture)
        with pytest.raises(ValueError, match=r"lora_request: expected a LoRARequest.*'delta'"):
            engine.llm.llm_engine.add_lora(mixture)
    peft_model.check([answer(engine, a)], ["a"], ATOL)  # the engine still runs
    merged = merge_adapters([folder / "a", folder / "b"], [0.7, -0.3], mode="delta")
    merged.save(folder / "merged")
    lora = request("merged", next(_numbers), folder / "merged")
    Reference(folder, names=["merged"]).check([answer(engine, lora)], ["merged"], ATOL)


def test_one_name_with_two_ids_is_two_adapters_in_one_step(engine, number, folder, peft_model):
    """Check the requests that vLLM's server sends after an unload and load. If both had the same
    name in the engine, vLLM would omit one of the adapters, and the engine would stop."""
    start(engine, "old", request("same", number, folder / "a"))
    start(engine, "new", request("same", next(_numbers), folder / "b"))
    found = finish(engine)
    peft_model.check([found["old"], found["new"]], ["a", "b"], ATOL)


def test_changed_files_at_one_path_use_no_block_of_the_old_files(engine, number, put, peft_model):
    first = answer(engine, request("moving", number, put("a")))
    again = answer(engine, request("moving", number, put("a")))
    assert (first.cached, again.cached) == (0, 96)
    lora = request("moving", next(_numbers), put("a2"))  # as after an unload and a load
    found = answer(engine, lora)
    peft_model.check([first, found], ["a", "a2"], ATOL)
    assert found.cached == 0 and answer(engine, lora).cached == 96


def test_changed_files_are_loaded_in_place_without_a_cache_reset(engine, number, put, peft_model):
    lora = request("place", number, put("a"))
    peft_model.check([answer(engine, lora)], ["a"], ATOL)
    in_place = request("place", number, put("a2"), load_inplace=True)
    assert engine.llm.llm_engine.add_lora(in_place)
    found = answer(engine, lora)
    peft_model.check([found], ["a2"], ATOL)
    assert found.cached == 0 and answer(engine, in_place).cached == 96
    put("a")
    peft_model.check([answer(engine, in_place)], ["a"], ATOL)  # load_inplace triggers a load.
    assert engine.llm.llm_engine.list_loras() == {number}
    assert engine.llm.llm_engine.remove_lora(number)
    assert engine.llm.llm_engine.list_loras() == set()


def test_request_keeps_the_adapter_that_was_loaded_when_it_arrived(engine, number, put, peft_model):
    lora = request("kept", number, put("a"))
    start(engine, "old", lora)
    assert finish(engine, steps=5) == {}
    assert engine.llm.llm_engine.add_lora(request("kept", number, put("a2"), load_inplace=True))
    start(engine, "new", lora)
    found = finish(engine)
    peft_model.check([found["old"], found["new"]], ["a", "a2"], ATOL)
