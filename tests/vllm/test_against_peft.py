"""Rows of many adapters in one engine, compared with PEFT, row by row, and with vLLM's kernels."""

import shutil

import pytest
import torch
from served_llama import PROMPTS, VOCABULARY, Answer, table

# For two layers in float32, the largest measured difference from PEFT is 5e-5, at |logprob| = 30.
ATOL = 3e-4
FULL = ["a", "b", "c", "d", "a", "b"]
HALF = ["a", None, "c", None, "b", None]


@pytest.fixture(autouse=True)
def emptied(engine):
    engine.forget()


def test_plugin_is_in_use(engine):
    assert type(engine.wrapper).__name__ == "LoraExtWrapperCPU"


@pytest.mark.parametrize("names", [FULL, HALF, [None] * 4, ["d"] * 5], ids=repr)
def test_rows_equal_peft_and_the_kernels_of_vllm(names, engine, peft_model):
    ours = engine.run(names)
    peft_model.check(ours, names, ATOL)
    with engine.theirs():
        theirs = engine.run(names)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.logprobs, other.logprobs, rtol=0, atol=ATOL)
        assert mine.tokens == other.tokens


def test_ranks_of_the_adapters_are_used_instead_of_the_maximum(engine):
    engine.run(["a", "b", "c", "d"])
    slots = {name: engine.manager.lora_index_to_id.index(i) for i, name in enumerate("abcd", 1)}
    met = list(engine.wrapper._stacks._met.values())
    assert len(met) >= 2 * 7
    for stack in met:
        found = [int(stack.ranks[slots[name]]) for name in "abcd"]
        assert found in ([4, 8, 3, 16], [0] * 4)  # rank 0 in the head, which has no adapter


def test_rows_of_the_base_model_are_correct_if_all_slots_are_full(engine, peft_model):
    names = [None, "a", "b", None, "c", "d"]
    peft_model.check(engine.run(names), names, ATOL)


def test_rows_of_the_base_model_are_correct_after_the_last_slot_was_cleared(engine, peft_model):
    engine.run(["a", "b", "c", "d"])
    engine.llm.llm_engine.remove_lora(4)
    peft_model.check(engine.run([None, "a"]), [None, "a"], ATOL)


def test_heads_and_embeddings_of_some_rows_equal_peft(engine, peft_model):
    names = ["head", "a", None, "head2", "d", "head"]
    peft_model.check(engine.run(names), names, ATOL)
    peft_model.check(engine.run(names[::-1]), names[::-1], ATOL)


def test_more_adapters_than_slots_equal_peft(engine, peft_model):
    for names in (["a", "b", "c", "d"], ["e", "f", "b", None], ["a", "e", None, "c"], ["d", "f"]):
        peft_model.check(engine.run(names), names, ATOL)
    # There are more adapters than slots, so requests wait until slots are free.
    everyone = ["a", "b", "c", "d", "e", "f", "head", None] * 2
    peft_model.check(engine.run(everyone), everyone, ATOL)


def test_adapter_is_replaced_in_place(engine, peft_model, folder):
    names = ["changing", None, "b"]
    peft_model.check(engine.run(names), ["a", None, "b"], ATOL)
    shutil.copytree(folder / "a2", folder / "changing", dirs_exist_ok=True)
    assert engine.llm.llm_engine.add_lora(engine.request("changing", load_inplace=True))
    assert engine.llm.reset_prefix_cache()  # Keys of cache blocks contain only the adapter's name.
    peft_model.check(engine.run(names), ["a2", None, "b"], ATOL)  # The rank of a2 differs.


def test_long_prompts_processed_in_chunks_equal_peft(engine, peft_model):
    names = ["a", None, "d", "head"]  # A step processes at most 64 tokens.
    prompts = [[2 + (7 * i + k) % 90 for i in range(90)] for k in range(4)]
    peft_model.check(engine.run(names, prompts), names, ATOL)


def test_cached_prefixes_are_those_of_the_adapter(engine, peft_model):
    prompts = [[2 + i % 90 for i in range(100)]] * 3  # A block of the cache has 32 tokens.
    for names, cached in ((["a", "b", None], 0), (["b", None, "a"], 96)):
        answers = engine.run(names, prompts)
        peft_model.check(answers, names, ATOL)
        assert [answer.cached for answer in answers] == [cached] * 3


@pytest.mark.parametrize("names", [["a", "b", None], ["head", "head2", None, "a"], ["head"] * 2])
def test_log_probabilities_of_prompts_equal_peft(names, engine, peft_model):
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=VOCABULARY)
    for output, name in zip(engine.ask("generate", names, how), names, strict=True):
        found = table(output.prompt_logprobs[1:])
        wanted = peft_model.logprobs(name, output.prompt_token_ids)[:-1]
        torch.testing.assert_close(found, wanted, rtol=0, atol=ATOL)


def test_beam_search_uses_one_adapter_per_prompt(engine, peft_model):
    from vllm.sampling_params import BeamSearchParams

    names = ["a", None, "d"]
    outputs = engine.llm.beam_search(
        [{"prompt_token_ids": p} for p in PROMPTS[:3]],
        BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True),
        lora_request=[engine.request(name) for name in names],
    )
    for output, name, prompt in zip(outputs, names, PROMPTS[:3], strict=True):
        for beam in output.sequences:
            values = peft_model.logprobs(name, beam.tokens)[len(prompt) - 1 : -1]
            chosen = values.gather(1, torch.tensor(beam.tokens[len(prompt) :])[:, None])
            assert abs(float(chosen.sum()) - beam.cum_logprob) < 10 * ATOL


def test_several_samples_of_a_prompt_use_its_adapter(engine, peft_model):
    from vllm import SamplingParams

    names = ["c", None, "a"]
    how = {"temperature": 1.0, "seed": 4, "max_tokens": 4, "ignore_eos": True, "logprobs": 1}
    outputs = engine.ask("generate", names, SamplingParams(n=3, **how))
    for output, name, prompt in zip(outputs, names, PROMPTS[:3], strict=True):
        for sample in output.outputs:
            tokens = list(sample.token_ids)
            values = peft_model.logprobs(name, [*prompt, *tokens])[len(prompt) - 1 : -1]
            chosen = values.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            found = [at[token].logprob for at, token in zip(sample.logprobs, tokens, strict=True)]
            torch.testing.assert_close(torch.tensor(found), chosen, rtol=0, atol=ATOL)


def test_chat_uses_one_adapter_per_conversation(engine, peft_model):
    from vllm import SamplingParams

    names = ["b", None, "c"]
    talks = [[{"role": "user", "content": f"w{10 + i} w{20 + i}"}] for i in range(3)]
    how = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=VOCABULARY)
    outputs = engine.llm.chat(
        talks, how, lora_request=[engine.request(name) for name in names], use_tqdm=False
    )
    answers = [Answer(output) for output in outputs]
    assert answers[0].prompt == [2, 10, 20, 3]
    peft_model.check(answers, names, ATOL)
