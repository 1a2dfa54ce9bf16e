"""`collate` and `evaluate`: labels, scores and errors."""

import pytest
import torch
from adapted_models import adapted
from methods.byte_text import byte_gpt2, byte_tokenizer
from torch import nn
from torch.nn import functional as F

from lora_ext.methods.reasoning import HashChain, HashHop, collate, evaluate, solve
from lora_ext.nn import IGNORE

TOKENIZER = byte_tokenizer()
HOPS = HashHop(40, chain_length=6, max_hops=3, seed=1)
CHAINS = HashChain(40, chains=(2, 3, 4), num_chains=2, seed=1)


class Oracle:
    """Model that generates ``answer(target)`` for the correct target of each prompt."""

    def __init__(self, tokenizer=TOKENIZER, answer=lambda target: f" {target}", end=True):
        self.tokenizer, self.answer, self.end = tokenizer, answer, end
        self.calls = []

    def generate(self, input_ids, attention_mask, max_new_tokens, **settings):
        self.calls.append((input_ids.shape, max_new_tokens, settings))
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(ids[mask.bool()])
            new = self.tokenizer(self.answer(solve(prompt))).input_ids
            new = (new + [self.tokenizer.eos_token_id] * self.end)[:max_new_tokens]
            rows.append(torch.tensor(ids.tolist() + new))
        return nn.utils.rnn.pad_sequence(rows, True, settings["pad_token_id"])


# -------------------------------------------------------------------------------------------------
# Labels


@pytest.mark.parametrize("pad", [True, False])
def test_labels_are_the_answer_and_the_end_token(pad):
    tokenizer = byte_tokenizer(pad)
    instances = [HOPS[0], CHAINS[0], CHAINS[1]]
    batch = collate(tokenizer, instances)
    assert {name: t.dtype for name, t in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    for instance, ids, mask, labels in zip(instances, *batch.values(), strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert tokenizer.decode(ids[:length]) == instance.text + tokenizer.eos_token
        learned = labels[labels != IGNORE]
        assert tokenizer.decode(learned) == f" {instance.target}{tokenizer.eos_token}"
        assert torch.equal(labels != IGNORE, mask.bool() & (mask.cumsum(0) > length - len(learned)))
        assert torch.equal(ids[labels != IGNORE], learned)


def test_prompt_is_labelled_without_mask_prompt():
    batch = collate(TOKENIZER, [HOPS[0], CHAINS[0]], mask_prompt=False)
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["labels"][real], batch["input_ids"][real])
    assert (batch["labels"][~real] == IGNORE).all()


def test_more_padding_does_not_change_the_loss():
    model = byte_gpt2().double()
    batch = collate(TOKENIZER, [CHAINS[i] for i in range(4)])
    fill = {"input_ids": TOKENIZER.pad_token_id, "attention_mask": 0, "labels": IGNORE}
    wider = {name: F.pad(t, (0, 9), value=fill[name]) for name, t in batch.items()}
    with torch.no_grad():
        # transformers computes the loss of float64 logits in float32.
        assert model(**batch).loss.item() == pytest.approx(model(**wider).loss.item(), rel=1e-6)


@pytest.mark.slow
def test_model_trained_on_its_instances_answers_them():
    task = HashHop(4, chain_length=3, max_hops=2, hash_length=2, seed=3)
    model = byte_gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    assert evaluate(model, TOKENIZER, task)["accuracy"] == 0
    for _ in range(60):
        optimizer.zero_grad()
        model(**collate(TOKENIZER, task)).loss.backward()
        optimizer.step()
    result = evaluate(model, TOKENIZER, task, batch_size=3, breakdown="hops")
    assert result["accuracy"] == 1
    assert sum(count for _, count in result["by_hops"].values()) == 4


def test_model_with_adapters_can_be_evaluated():
    task = HashHop(2, chain_length=3, max_hops=1, hash_length=1)
    tokenizer = byte_tokenizer()
    model = adapted("ours")
    model.resize_token_embeddings(258)
    assert evaluate(model, tokenizer, task)["accuracy"] in (0, 0.5, 1)


# -------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize(("task", "breakdown"), [(HOPS, "hops"), (CHAINS, "length")])
def test_oracle_has_accuracy_one(task, breakdown, end):
    model = Oracle(end=end)
    result = evaluate(model, TOKENIZER, task, batch_size=16, breakdown=breakdown)
    assert result["accuracy"] == 1.0 and [shape[0] for shape, _, _ in model.calls] == [16, 16, 8]
    parts = result[f"by_{breakdown}"]
    assert list(parts) == sorted(parts) and sum(count for _, count in parts.values()) == 40
    assert all(accuracy == 1 for accuracy, _ in parts.values())
    for _, _, settings in model.calls:
        assert settings["do_sample"] is False and settings["no_repeat_ngram_size"] == 0


def test_result_without_a_breakdown_is_only_the_accuracy():
    assert evaluate(Oracle(), TOKENIZER, HOPS) == {"accuracy": 1.0}


def test_constant_answer_has_accuracy_zero():
    result = evaluate(Oracle(answer=lambda _: " abcd"), TOKENIZER, CHAINS, breakdown="length")
    assert result["accuracy"] == 0
    assert all(accuracy == 0 for accuracy, _ in result["by_length"].values())


def test_parts_of_a_breakdown_add_up_to_the_accuracy():
    right = {instance.target for instance in list(HOPS)[::3]}
    model = Oracle(answer=lambda target: target if target in right else "none")
    result = evaluate(model, TOKENIZER, HOPS, breakdown="hops")
    hits = sum(accuracy * count for accuracy, count in result["by_hops"].values())
    assert hits == pytest.approx(40 * result["accuracy"]) and 0 < result["accuracy"] < 1


@pytest.mark.parametrize(
    ("answer", "exact", "prefix"),
    [
        (lambda t: f" {t}", 1, 1),
        (lambda t: t, 1, 1),
        (lambda t: f" {t}\nMa", 1, 1),
        (lambda t: f" {t[:3]}_", 0, 1),
        (lambda t: f" {t.upper()}", 0, 1),
        (lambda t: f" {t}{t}", 0, 1),
        (lambda t: f" _{t[1:]}", 0, 0),
        (lambda t: "", 0, 0),
    ],
)
def test_scores_count_exact_answers_and_prefixes(answer, exact, prefix):
    found = [
        evaluate(Oracle(answer=answer), TOKENIZER, CHAINS, score=score)["accuracy"]
        for score in ("exact", "prefix3")
    ]
    expected = [exact, prefix]
    if prefix and not exact:  # A hash of digits has no upper case.
        assert found[0] < 0.1 and found[1] == 1
    else:
        assert found == expected


def test_evaluate_restores_the_training_mode():
    model = byte_gpt2().train()
    model.transformer.h[0].eval()
    before = {name: m.training for name, m in model.named_modules()}
    modes = []
    model.transformer.h[1].register_forward_hook(lambda m, *_: modes.append(m.training))
    evaluate(model, TOKENIZER, [HOPS[0]])
    assert modes and not any(modes)
    assert {name: m.training for name, m in model.named_modules()} == before
    model.generate = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate(model, TOKENIZER, [HOPS[0]])
    assert {name: m.training for name, m in model.named_modules()} == before


def test_end_token_added_by_the_tokenizer_is_not_in_the_prompt():
    class Ending:
        """Tokenizer that appends the end token, as ``add_eos_token`` does."""

        eos_token_id, pad_token_id = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
        decode = staticmethod(TOKENIZER.decode)

        def __call__(self, text, add_special_tokens=True):
            found = TOKENIZER(text)
            found["input_ids"] += [self.eos_token_id] * add_special_tokens
            return found

    expected, found = collate(TOKENIZER, [HOPS[0]]), collate(Ending(), [HOPS[0]])
    assert all(torch.equal(found[name], t) for name, t in expected.items())


# -------------------------------------------------------------------------------------------------
# Errors


def test_context_must_fit_prompt_and_answer():
    instance = HOPS[0]
    prompt, answer = len(instance.prompt), len(instance.target) + 1
    for context in (prompt + answer, prompt + answer + 1):
        assert evaluate(byte_gpt2(context), TOKENIZER, [instance])["accuracy"] == 0
    for context in (prompt - 3, prompt + answer - 1):
        with pytest.raises(ValueError, match=f"^evaluate: instances: .*, found {prompt} tokens$"):
            evaluate(byte_gpt2(context), TOKENIZER, [instance])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "close"}, "score: expected one of .*, found 'close'"),
        ({"breakdown": "chains"}, "breakdown: expected one of .*, found 'chains'"),
        ({"breakdown": "hops"}, "breakdown: expected instances of the hop task"),
        ({"instances": []}, "instances: expected at least one, found 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, found 0"),
    ],
)
def test_errors_name_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^evaluate: {message}"):
        evaluate(**{"model": Oracle(), "tokenizer": TOKENIZER, "instances": CHAINS, **arguments})


def test_tokenizer_without_an_end_token_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"^collate: tokenizer: expected one with an eos_token"):
        collate(tokenizer, [HOPS[0]])
    with pytest.raises(ValueError, match=r"^collate: instances: expected at least one, found 0"):
        collate(TOKENIZER, [])
