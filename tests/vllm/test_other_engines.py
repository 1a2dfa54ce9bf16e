"""Engines with other settings, one per test: another dtype, compilation, and no generation."""

import pytest
import torch
import transformers
from served_llama import PROMPTS, Reference

ATOL = 3e-4  # as in test_against_peft.py
NAMES = ["a", None, "b", "d", "c", None]  # All four slots are full.


def test_bfloat16_is_as_close_to_peft_as_the_vllm_kernels(make_engine, peft_model):
    """Check only the first logits, because the bfloat16 rounding of a whole model can change later
    tokens."""
    with make_engine(dtype="bfloat16") as engine:
        names = ["a", "b", "c", "d"]
        ours = torch.stack([answer.logprobs[0] for answer in engine.run(names, new=1)])
        base = engine.run(NAMES, new=1)[1].logprobs
        with engine.theirs():
            theirs = torch.stack([answer.logprobs[0] for answer in engine.run(names, new=1)])
    wanted = torch.stack(
        [peft_model.logprobs(n, p)[-1] for n, p in zip(names, PROMPTS, strict=False)]
    )
    error, other = (ours - wanted).abs().mean(), (theirs - wanted).abs().mean()
    effect = (wanted - peft_model.logprobs(None, PROMPTS[0])[-1]).abs().mean()
    print(f"mean error {error:.4f}, of vLLM's kernels {other:.4f}, without adapter {effect:.4f}")
    assert error < 1.5 * other and error < 0.05 * effect
    assert (base[0] - peft_model.logprobs(None, PROMPTS[1])[-1]).abs().mean() < 1.5 * other


def test_engine_that_may_compile_gives_the_same_results(make_engine, peft_model):
    """Check an engine with compilation enabled. On the CPU, vLLM compiles nothing with LoRA."""
    with make_engine(enforce_eager=False) as engine:
        assert int(engine.runner.compilation_config.mode) == 0
        peft_model.check(engine.run(NAMES), NAMES, ATOL)


def test_embeddings_of_prompts_use_their_adapters(make_engine, peft_model):
    with make_engine(runner="pooling", convert="embed") as engine:
        found = engine.ask("embed", NAMES)
    for output, name, prompt in zip(found, NAMES, PROMPTS, strict=True):
        wanted = peft_model.embedding(name, prompt)
        torch.testing.assert_close(
            torch.tensor(output.outputs.embedding), wanted, rtol=0, atol=1e-5
        )


@pytest.fixture
def peft_classifier(folder):
    model = transformers.LlamaForSequenceClassification.from_pretrained(folder / "classifier")
    return Reference(folder, model, "abcd")


def test_classes_of_prompts_use_their_adapters(make_engine, peft_classifier):
    with make_engine(model="classifier", runner="pooling") as engine:
        found = engine.ask("classify", NAMES)
    for output, name, prompt in zip(found, NAMES, PROMPTS, strict=True):
        wanted = peft_classifier.logits(name, prompt).softmax(-1)
        torch.testing.assert_close(torch.tensor(output.outputs.probs), wanted, rtol=0, atol=1e-5)
