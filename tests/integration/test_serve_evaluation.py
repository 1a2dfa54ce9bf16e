"""Clients of OpenAI's API against ``lora-ext serve``: lm-eval and the openai package."""

from typing import Any

import pytest
import torch
from scripts import needs
from served import needs_packages

pytestmark = needs_packages


def word(i: int) -> str:
    return f"w{5 + i % 92}"


def questions(**_: Any) -> Any:
    """Return 24 questions with three choices each, for ``custom_dataset`` of a task of lm-eval."""
    import datasets

    rows = []
    for i in range(24):
        question = " ".join(word(7 * i + 3 * j * j) for j in range(3 + i % 5))
        choices = [" ".join(word(11 * i + 5 * k + j) for j in range(1 + k)) for k in range(3)]
        rows.append({"question": question, "choices": choices, "answer": i % 3})
    return {"test": datasets.Dataset.from_list(rows)}


TASKS: list[dict[str, Any]] = [
    {
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    {
        "task": "answers",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[2]}}",
        "generation_kwargs": {"until": ["w7", "w8 w9"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "bleu"}],
    },
]


@pytest.mark.slow
@needs("lm_eval", "aiohttp", "tenacity")
def test_lm_eval_finds_the_scores_of_its_own_backend(server: Any) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    shared = {"custom_dataset": questions, "doc_to_text": "question", "test_split": "test"}
    how: dict[str, Any] = {"bootstrap_iters": 0, "log_samples": True}
    how["task_manager"] = TaskManager(include_defaults=False)

    def evaluate(kind: str, **args: Any) -> Any:
        tasks = [{**task, **shared} for task in TASKS]
        return lm_eval.simple_evaluate(kind, {"batch_size": 5, **args}, tasks, **how)

    folder = str(server.folder / "tiny")
    adapter = str(server.folder / "adapters" / "a1")
    own = evaluate("hf", pretrained=folder, peft=adapter, device="cpu", dtype="float32")
    url = f"{server.client.base_url}/v1/completions"
    client = {"model": "a1", "tokenizer": folder, "base_url": url, "num_concurrent": 4}
    ours = evaluate("local-completions", tokenizer_backend="huggingface", **client)
    assert ours["results"] == own["results"]
    for name in ("choices", "answers"):
        for mine, theirs in zip(ours["samples"][name], own["samples"][name], strict=True):
            found, expected = mine["filtered_resps"], theirs["filtered_resps"]
            if name == "answers":
                assert found == expected
            else:
                values = torch.tensor([value for value, _ in expected])
                torch.testing.assert_close(torch.tensor([value for value, _ in found]), values)
                assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    base = evaluate(
        "local-completions", tokenizer_backend="huggingface", **{**client, "model": "tiny"}
    )
    assert base["results"] != own["results"]  # the adapter changes the scores


@needs("openai")
def test_openai_client_reads_logprobs(server: Any) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{server.client.base_url}/v1", api_key="none", max_retries=0)
    how: dict[str, Any] = {"model": "a1", "temperature": 0, "max_tokens": 6}
    found = client.completions.create(prompt=["w5 w6", "w9"], logprobs=2, echo=True, **how)
    for choice, prompt in zip(found.choices, ["w5 w6", "w9"], strict=True):
        names, record = prompt.split(), choice.logprobs
        assert choice.text.startswith(prompt) and record is not None
        assert record.tokens is not None and record.tokens[: len(names)] == names
        assert record.token_logprobs is not None and record.top_logprobs is not None
        assert record.token_logprobs[0] is None and len(record.token_logprobs) == len(names) + 6
        for token, value, top in list(
            zip(record.tokens, record.token_logprobs, record.top_logprobs, strict=True)
        )[1:]:
            assert top[token] == value <= max(top.values()) and 2 <= len(top) <= 3
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "w5 w6"}], **how}
    chat |= {"logprobs": True, "top_logprobs": 3}
    (said,) = client.chat.completions.create(**chat).choices
    assert said.logprobs is not None and said.logprobs.content is not None
    entries = said.logprobs.content
    assert [entry.token for entry in entries] == said.message.content.split()
    for entry in entries:
        assert entry.top_logprobs[0].token == entry.token and len(entry.top_logprobs) == 3
        assert entry.bytes == list(entry.token.encode())
    streamed = []
    for chunk in client.chat.completions.create(stream=True, **chat):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    for found, expected in zip(streamed, entries, strict=True):
        assert found.token == expected.token
        assert abs(found.logprob - expected.logprob) < 1e-5
    with pytest.raises(openai.UnprocessableEntityError, match=r"top_logprobs: .* found 21"):
        client.chat.completions.create(**{**chat, "top_logprobs": 21})
