"""What the draft of the SmolLM2 benchmark learns from, on a tiny model."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the lean model is a transformers Llama")
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import mtpc_samples
from lean import LeanLlama

from lora_ext.methods import mtpc

SIZES = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, eos_token_id=None, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)  # else all tokens are as likely
    return model.eval()


def answered(model: LlamaForCausalLM, sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
    prompts = torch.randint(1, 23, (4, 5))
    ids, hidden = mtpc_samples._answer(LeanLlama(model), prompts, 12, sample)
    with torch.no_grad():
        every = torch.cat([prompts, ids], 1)
        expected = model.model(every).last_hidden_state[:, 4:-1]
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    return ids, model.lm_head(hidden)


def test_greedy_answers_are_the_likeliest_tokens_of_their_states(model):
    ids, logits = answered(model, sample=False)
    assert torch.equal(logits.argmax(-1), ids)


def test_sampled_answers_are_not(model):
    ids, logits = answered(model, sample=True)
    assert not torch.equal(logits.argmax(-1), ids)


def test_answers_are_cut_behind_their_end():
    ids = torch.tensor([[5, 9, 7, 9], [1, 2, 3, 4]])
    hidden = torch.arange(8.0).view(2, 4, 1)
    first, second = mtpc_samples._cut(ids, hidden, eos=9)
    assert first.tokens.tolist() == [5, 9] and first.hidden.flatten().tolist() == [0, 1]
    assert second.tokens.tolist() == [1, 2, 3, 4] and second.lengths.tolist() == [4]


def test_windows_stay_within_their_answer():
    data = mtpc_samples.Answers(
        torch.arange(9.0)[:, None], torch.arange(9), torch.arange(9.0), torch.tensor([2, 4, 3])
    )
    batch = next(mtpc_samples.batches(data, 2, 64))
    assert {*map(tuple, batch.tokens.tolist())} == {(2, 3, 4), (3, 4, 5), (6, 7, 8)}
    assert torch.equal(batch.hidden[:, 0], batch.tokens[:, 0].float())
    assert torch.equal(batch.normaliser, batch.tokens[:, 1:].float())
    assert torch.equal(batch.teacher[..., 0].float(), batch.normaliser)


def test_a_draft_is_kept_by_the_smaller_of_one_and_the_ratio():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    q = torch.tensor([[0.25, 0.5, 0.25]] * 3)
    assert mtpc_samples._kept(p, q, torch.tensor([0, 1, -1])).tolist() == [0.5, 1, 0]


def test_a_draft_learns_what_the_model_accepts(model, monkeypatch):
    steps = itertools.count()  # the clock: a fixed number of steps on every machine
    monkeypatch.setattr(mtpc_samples.time, "process_time", lambda: next(steps) * 0.005)
    config = mtpc.MtpcConfig(1, 1, "ff", "adapter", adapter_rank=4, bridge=32, chain=2)
    draft = mtpc.retrofit(model, config, torch.arange(23))
    prompts = torch.randint(1, 23, (32, 5))
    ids, hidden = mtpc_samples._answer(LeanLlama(model), prompts, 20, sample=True)
    parts = list(mtpc_samples._cut(ids, hidden.bfloat16(), eos=0))
    states, tokens, _, lengths = (torch.cat(part) for part in zip(*parts, strict=True))
    sums = model.lm_head(states.float()).logsumexp(-1).detach()
    data = mtpc_samples.Answers(states, tokens, sums, lengths)

    def accepted() -> float:
        decoder = draft.eval().decoder()
        return decoder.generate(prompts, max_new_tokens=20, seed=0).accepted_per_call

    before = accepted()
    mtpc_samples.learn(draft, mtpc_samples.batches(data, 2, 64), minutes=0.05, rate=1e-2)
    assert accepted() > before + 0.1
