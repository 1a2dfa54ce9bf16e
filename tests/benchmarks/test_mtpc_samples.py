"""Decoding benchmarks: ``LeanLlama`` gives the model's tokens, and a draft learns its answers."""

import pytest

pytest.importorskip("transformers", reason="the lean model is a transformers Llama")

import mtpc_heldout
import mtpc_samples
import torch
from lean import LeanLlama, token_by_token
from transformers import LlamaConfig, LlamaForCausalLM

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
                parameter.mul_(20)  # Otherwise all tokens are equally likely.
    return model.eval()


def test_lean_decoding_gives_the_tokens_of_generate_only_for_llamas(model) -> None:
    model.double()
    ids = torch.randint(1, 23, (3, 5))
    options = {"do_sample": False, "max_new_tokens": 12}
    expected = model.generate(ids, **options)
    assert torch.equal(token_by_token(LeanLlama(model), ids, 12), expected)
    assert torch.equal(model.generate(ids, **options), expected)  # The model has not changed.
    config = LlamaConfig(**SIZES, **HEADS, attention_bias=True)
    with pytest.raises(ValueError, match="expected a Llama without biases"):
        LeanLlama(LlamaForCausalLM(config))


@pytest.mark.parametrize("mode", ["greedy", "sample"])
def test_speculation_with_lean_passes_gives_the_tokens_of_the_model(model, mode) -> None:
    draft = mtpc.retrofit(model.double(), mtpc.MtpcConfig(3, 2, "hmm", "adapter", 4)).eval()
    ids = torch.randint(1, 23, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])  # The first row has two padding tokens.
    settings = {"max_new_tokens": 10, "eos_token_id": [], "seed": 3, "attention_mask": mask}
    expected = draft.decoder(mode=mode).generate(ids, **settings)
    lean = mtpc.SpeculativeDecoder(LeanLlama(model), draft.head, mode=mode)
    got = lean.generate(ids, **settings)
    assert torch.equal(got.sequences, expected.sequences) and got.calls == expected.calls


def answered(model: LlamaForCausalLM, sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
    prompts = torch.randint(1, 23, (4, 5))
    ids, hidden = mtpc_samples._answer(LeanLlama(model), prompts, 12, sample)
    with torch.no_grad():
        every = torch.cat([prompts, ids], 1)
        expected = model.model(every).last_hidden_state[:, 4:-1]
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    return ids, model.lm_head(hidden)


@pytest.mark.parametrize("sample", [False, True])
def test_only_greedy_answers_are_the_most_likely_tokens_of_their_states(model, sample):
    ids, logits = answered(model, sample)
    assert torch.equal(logits.argmax(-1), ids) != sample


def test_answers_end_at_their_end_token_and_windows_stay_within_answers():
    ids = torch.tensor([[5, 9, 7, 9], [1, 2, 3, 4]])
    hidden = torch.arange(8.0).view(2, 4, 1)
    first, second = mtpc_samples._cut(ids, hidden, eos=9)
    assert first.tokens.tolist() == [5, 9] and first.hidden.flatten().tolist() == [0, 1]
    assert second.tokens.tolist() == [1, 2, 3, 4] and second.lengths.tolist() == [4]
    data = mtpc_samples.Answers(
        torch.arange(9.0)[:, None], torch.arange(9), torch.arange(9.0), torch.tensor([2, 4, 3])
    )
    batch = next(mtpc_samples.batches(data, 2, 64))
    assert {*map(tuple, batch.tokens.tolist())} == {(2, 3, 4), (3, 4, 5), (6, 7, 8)}
    assert torch.equal(batch.hidden[:, 0], batch.tokens[:, 0].float())
    assert torch.equal(batch.normaliser, batch.tokens[:, 1:].float())
    assert torch.equal(batch.teacher[..., 0].float(), batch.normaliser)


def test_acceptance_probability_is_min_of_one_and_p_over_q_and_cumulative():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    q = torch.tensor([[0.25, 0.5, 0.25]] * 3)
    assert mtpc_samples._kept(p, q, torch.tensor([0, 1, -1])).tolist() == [0.5, 1, 0]
    kept = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    assert mtpc_heldout.tokens_a_call(kept) == 1 + (1.5 + 0) / 2


def texts(model: LlamaForCausalLM, sample: bool) -> mtpc_samples.Answers:
    """Return 64 answers of 40 tokens, generated greedily or by sampling."""
    prompts = torch.randint(1, 23, (64, 5))
    ids, hidden = mtpc_samples._answer(LeanLlama(model), prompts, 40, sample)
    parts = list(mtpc_samples._cut(ids, hidden.bfloat16(), eos=-1))
    states, tokens, _, lengths = (torch.cat(part) for part in zip(*parts, strict=True))
    sums = model.lm_head(states.float()).logsumexp(-1).detach()
    return mtpc_samples.Answers(states, tokens, sums, lengths)


def estimated(draft: mtpc.Draft, data: mtpc_samples.Answers, mode: str) -> float:
    k = draft.config.n_token * draft.config.chain
    every = mtpc_samples.windows(data, mtpc_samples.places(data, k), k)
    return mtpc_heldout.tokens_a_call(mtpc_heldout.kept(draft, every, mode))


CHAIN = mtpc.MtpcConfig(1, 1, "ff", "adapter", adapter_rank=4, bridge=32, chain=2)
WINDOW = mtpc.MtpcConfig(2, 3, "hmm", "adapter", adapter_rank=4, bridge=32)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "distil"), [(CHAIN, True), (CHAIN, False), (WINDOW, False)])
def test_draft_learns_what_the_model_accepts(model, config, distil):
    """Check also that the number of tokens per call, estimated on texts that the model generated,
    agrees with the number that the decoder reports."""
    draft = mtpc.retrofit(model, config, torch.arange(21))
    data = texts(model, sample=True)
    before = estimated(draft, data, "sample")
    batches = mtpc_samples.batches(data, config.n_token * config.chain, 64)
    mtpc_samples.learn(draft, batches, steps=120, rate=1e-2, distil=distil)
    assert estimated(draft, data, "sample") > before + 0.1
    prompts = torch.randint(1, 23, (64, 5))
    for mode, text in (("sample", data), ("greedy", texts(model, sample=False))):
        decoder = draft.eval().decoder(mode=mode)
        found = decoder.generate(prompts, max_new_tokens=40, eos_token_id=[], seed=0)
        # The texts were generated from other prompts. Differences of 0.02 to 0.07 were measured.
        assert abs(estimated(draft, text, mode) - found.emitted_per_call) < 0.12


def test_draft_is_equal_after_the_same_steps(model):
    data = texts(model, sample=True)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        draft = mtpc.retrofit(model, CHAIN, torch.arange(21))
        mtpc_samples.learn(draft, mtpc_samples.batches(data, 2, 16), steps=10)
        found.append(draft.state_dict())
        draft.remove()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert any(value.any() for key, value in found[0].items() if "lora_B" in key)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--head nowhere", "--head: expected a folder with mtpc_config.json, found nowhere"),
        ("--head nowhere --compare 5", "--head: expected a folder with answers.pt, found nowhere"),
        ("--longest 0", "--longest: expected at least 1, found 0"),
        ("--compare -1", "--compare: expected at least 0, found -1"),
        ("--cost -1", "--cost: expected at least 0, found -1"),
        ("--cost nan", "--cost: expected at least 0, found nan"),
    ],
)
def test_invalid_arguments_raise_before_minutes_of_answers(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(
        mtpc_heldout, "unseen_answers", lambda _: pytest.fail("unseen_answers was called")
    )
    monkeypatch.setattr("sys.argv", ["mtpc_heldout.py", *arguments.split()])
    with pytest.raises(SystemExit):
        mtpc_heldout.main()
    assert message in capsys.readouterr().err


def test_emitted_tokens_are_computed_for_shorter_chains_and_the_confidence_rule():
    sure = torch.tensor([[0.9, 0.9, 0.9], [0.2, 0.2, 0.2]])
    accepted = torch.tensor([3, 0])
    found = {name: rest for name, *rest in mtpc_heldout.lengths(sure, accepted, 0.1)}
    assert found["chain 1"] == pytest.approx([1.5, 1.5 / 1.1])
    assert found["chain 3"] == pytest.approx([2.5, 2.5 / 1.3])
    # The confidence rule drafts three tokens in the first window and one in the second.
    assert found["rule"] == pytest.approx([2.5, 2.5 / 1.2])


def test_calls_of_the_decoder_are_recorded_with_its_confidence(model):
    draft = mtpc.retrofit(model, CHAIN).eval()
    lean = LeanLlama(model)
    prompts = [torch.randint(1, 23, (1, 5)) for _ in range(3)]
    for mode in ("greedy", "sample"):
        sure, accepted = mtpc_heldout.recorded(draft, lean, prompts, mode, 4, 12)
        assert sure.shape == (len(accepted), 4) and len(accepted) > 3
        assert bool(((sure > 1 / 23) & (sure <= 1)).all())
        assert 0 <= int(accepted.min()) and int(accepted.max()) <= 4
