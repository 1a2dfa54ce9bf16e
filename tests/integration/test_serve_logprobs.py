"""Log-probabilities of ``lora-ext serve``: those of the model's own distribution, in every form."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import served
import torch
from activated import NAMES, activated_pair
from activated import prompts as activated_prompts
from peft import PeftModel
from served import ask, needs_packages, settle, streamed
from test_continuous_batching import MANY, attached, batching, prompts
from test_serve_fields import chunks, complete
from torch import Tensor
from transformers import AutoModelForCausalLM

import lora_ext
from lora_ext.serving._sampling import Logprobs

pytestmark = needs_packages
PROMPT = [5 + i * i % 90 for i in range(150)]  # more than two pages


def law(server: Any, ids: list[int], name: str | None = "a1") -> Tensor:
    """Return the log-probabilities ``(T, V)`` of a plain forward with the adapter ``name``."""
    with torch.no_grad():
        logits = server.engine.model(torch.tensor([ids]), adapter_names=[name]).logits[0]
    return logits.log_softmax(-1)


def close(found: Any, expected: Any) -> bool:
    """Return whether two JSON values are equal up to the rounding of different batches."""
    if isinstance(expected, float):
        return abs(found - expected) < 1e-5
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[k], expected[k]) for k in found)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == expected


def check(server: Any, choice: dict[str, Any], top: int) -> None:
    """Check the log-probabilities of a choice, prompt included, against those of the model."""
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    expected, found = law(server, ids), choice["logprobs"]
    count = len(ids)
    names = [server.engine.tokenizer.decode([token]) for token in ids]
    assert found["tokens"] == names
    assert found["token_logprobs"][0] is None and len(found["token_logprobs"]) == count
    values = torch.tensor(found["token_logprobs"][1:])
    own = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(values, own, atol=1e-5, rtol=1e-5)
    if not top:
        assert found["top_logprobs"] is None
        return
    assert found["top_logprobs"][0] is None
    best = expected[:-1].topk(top)
    for i in range(1, count):
        most = found["top_logprobs"][i]
        named = {server.engine.tokenizer.decode([t]) for t in best.indices[i - 1].tolist()}
        assert set(most) == named | {names[i]}
        assert most[names[i]] == found["token_logprobs"][i]
        torch.testing.assert_close(
            max(most.values()), best.values[i - 1, 0].item(), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("top", [0, 3])
def test_echo_has_the_logprobs_of_the_model_even_of_cached_prompts(server: Any, top: int) -> None:
    how: dict[str, Any] = {"logprobs": top, "echo": True, "return_token_ids": True}
    (first,) = complete(server, PROMPT, **how)["choices"]
    (again,) = complete(server, PROMPT, **how)["choices"]  # its pages are cached now
    changing = {"temperature": 1.7, "top_p": 0.3, "seed": 3}
    (other,) = complete(server, PROMPT, **how, **changing)["choices"]
    for choice in (first, again, other):
        check(server, choice, top)
    text = " ".join(f"w{token}" for token in PROMPT)
    assert close(complete(server, text, **how)["choices"], [again])
    assert first["text"].startswith(text)
    offsets = first["logprobs"]["text_offset"]
    assert [first["text"][i:].split()[0] for i in offsets[1:5]] == text.split()[1:5]
    assert offsets[150] == len(text)
    many = complete(server, [PROMPT, PROMPT[:9], PROMPT], **how)["choices"]
    assert many[0]["token_ids"] == many[2]["token_ids"] == first["token_ids"]
    for choice in many:
        check(server, choice, top)


def test_streams_have_the_same_logprobs(server: Any) -> None:
    for fields in (
        {"prompt": PROMPT, "logprobs": 2, "echo": True, "prompt_logprobs": 1},
        {"prompt": [PROMPT[:7], PROMPT[:5]], "logprobs": 1},
    ):
        how: dict[str, Any] = {"return_token_ids": True, **fields}
        whole = complete(server, **how)["choices"]
        parts = [event["choices"][0] for event in chunks(server, "completions", **how)]
        for i, choice in enumerate(whole):
            mine = [part for part in parts if part["index"] == i]
            assert "".join(part["text"] for part in mine) == choice["text"]
            lists = [part["logprobs"] for part in mine if part["logprobs"]]
            assert len(lists) > 4
            for name, expected in choice["logprobs"].items():
                assert close([each for found in lists for each in found[name]], expected)
            assert close(mine[0].get("prompt_logprobs"), choice.get("prompt_logprobs"))
    whole = ask(server, "a1", logprobs=True, top_logprobs=2).json()["choices"][0]
    parts = [
        event["choices"][0]["logprobs"]
        for event in streamed(server, "a1", logprobs=True, top_logprobs=2)
    ]
    found = [each for part in parts if part for each in part["content"]]
    assert close(found, whole["logprobs"]["content"])


@pytest.mark.parametrize("top", [0, 20])
def test_chats_have_the_format_of_openai(server: Any, top: int) -> None:
    how = {"logprobs": True, "top_logprobs": top, "return_token_ids": True}
    (choice,) = ask(server, "a2", **how).json()["choices"]
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    expected = law(server, ids, "a2")[-9:-1]
    found = choice["logprobs"]["content"]
    assert choice["logprobs"]["refusal"] is None and len(found) == 8
    for token, entry, row in zip(choice["token_ids"], found, expected, strict=True):
        assert entry["token"] == server.engine.tokenizer.decode([token])
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert abs(entry["logprob"] - row[token]) < 1e-5
        best = [each["logprob"] for each in entry["top_logprobs"]]
        torch.testing.assert_close(torch.tensor(best), row.topk(top).values, atol=1e-5, rtol=0)
    assert ask(server, "a2").json()["choices"][0]["logprobs"] is None


def test_prompt_logprobs_have_the_format_of_vllm(server: Any) -> None:
    (choice,) = complete(server, PROMPT[:20], prompt_logprobs=2)["choices"]
    assert choice["logprobs"] is None
    first, *rest = choice["prompt_logprobs"]
    assert first is None and len(rest) == 19
    for token, row, found in zip(PROMPT[1:20], law(server, PROMPT[:20]), rest, strict=False):
        best = row.topk(2).indices.tolist()
        assert set(found) == {str(token), *map(str, best)}
        assert found[str(token)]["rank"] == int((row >= row[token]).sum())
        for each, entry in found.items():
            assert entry["decoded_token"] == f"w{each}" or int(each) < 5
            assert abs(entry["logprob"] - row[int(each)]) < 1e-5
    (alone,) = complete(server, PROMPT[:20], prompt_logprobs=0)["choices"]
    assert [len(each) for each in alone["prompt_logprobs"][1:]] == [1] * 19


def test_wrong_and_too_many_logprobs_are_refused(server: Any, monkeypatch: Any) -> None:
    body: dict[str, Any] = {"model": "a1", "prompt": PROMPT, "max_tokens": 1}
    for fields, named in (
        ({"logprobs": 21}, "logprobs: Input should be less than or equal to 20, found 21"),
        ({"logprobs": -1}, "logprobs: "),
        ({"logprobs": True}, "logprobs: "),
        ({"prompt_logprobs": -1}, "prompt_logprobs: "),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs: "),
        ({"echo": 1}, "echo: "),
    ):
        found = server.client.post("/v1/completions", json={**body, **fields})
        assert found.status_code == 422 and named in found.json()["error"]["message"]
    for fields in ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21}, {"logprobs": 3}):
        found = ask(server, "a1", **fields)
        assert found.status_code in (400, 422) and "logprobs: " in found.json()["error"]["message"]
    settle(server)
    many, begun = "w5 " * 200, server.engine.stats()["requests_total"]  # 24 x 200 x 21 values
    for fields in ({"prompt_logprobs": 20}, {"logprobs": 20, "echo": True}):
        for more in ({"prompt": [many] * 24}, {"prompt": [[5] * 200, [6] * 200], "n": 12}):
            found = server.client.post("/v1/completions", json={**body, **more, **fields})
            assert found.status_code == 400
            message = f"{next(iter(fields))}: expected at most 50000 log-probabilities"
            assert message in found.json()["error"]["message"] and "found 100800" in found.text
    wrong = {**body, "prompt": [[5], [97]], **fields}
    found = server.client.post("/v1/completions", json=wrong)
    assert found.status_code == 400 and "prompt: expected token ids in [0, 97)" in found.text
    assert server.engine.requests == 0, "expected no prompt to begin"
    assert server.engine.stats()["requests_total"] == begun


def test_records_of_split_and_preempted_prompts_are_those_of_forwards() -> None:
    model, _ = attached()
    given = [each * 4 for each in prompts(8, shared=5)]
    how = batching(num_blocks=48, cpu_offload_space=0.0)
    how["generation_config"].max_new_tokens = 30
    records = [Logprobs(2, 3) for _ in given]
    with model.continuous_batching_context_manager(**how) as manager:
        resets = []
        offload = manager.batch_processor.offloading_manager.offload_requests
        manager.batch_processor.offloading_manager.offload_requests = lambda: (
            resets.append(1) or offload()
        )
        ids = [
            manager.add_request(prompt, adapter_name=name, logprobs=record, max_new_tokens=30)
            for prompt, name, record in zip(given, MANY, records, strict=False)
        ]
        results = {r.request_id: r for r in (manager.get_result(timeout=60) for _ in ids)}
    assert resets
    for request_id, prompt, name, record in zip(ids, given, MANY, records, strict=False):
        tokens = prompt + results[request_id].generated_tokens
        assert len(tokens) == len(prompt) + 30 == len(prompt) + len(record.tokens)
        with torch.no_grad():
            expected = model(torch.tensor([tokens]), adapter_names=[name]).logits[0].log_softmax(-1)
        entries = [record.prompt[i] for i in range(1, len(prompt))] + record.tokens
        assert [entry.token for entry in entries] == tokens[1:]
        for entry, row in zip(entries, expected, strict=False):
            assert abs(entry.value - row[entry.token]) < 1e-4
            values = torch.tensor([value for _, value in entry.top])
            torch.testing.assert_close(values, row.topk(len(values)).values, atol=1e-4, rtol=0)


@pytest.fixture
def exact_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from lora_ext.server import _running

    def exact_engine(model: Any, *given: Any, **how: Any) -> Any:
        return engine(lora_ext.exact(model), *given, **{**how, "pack_base": False})

    engine = _running.Engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_running, "Engine", exact_engine)
        with served.serving(tmp_path_factory.mktemp("exact")) as found:
            yield found


def test_logprobs_of_an_exact_model_have_the_bits_of_a_trainers_forward(exact_server: Any) -> None:
    server = exact_server
    base = AutoModelForCausalLM.from_pretrained(server.folder / "tiny")
    trainer: Any = PeftModel.from_pretrained(base, server.folder / "adapters" / "a1")
    trainer = lora_ext.exact(lora_ext.from_peft(trainer).eval())
    how: dict[str, Any] = {"logprobs": 2, "echo": True, "return_token_ids": True}
    draws = {"temperature": 1.0, "seed": 5, "max_tokens": 20}
    choices = complete(server, [PROMPT, PROMPT[:33], PROMPT[:2]], **how, **draws)["choices"]
    choices += complete(server, PROMPT, **how, **draws, top_p=0.5)["choices"]
    for choice in choices:
        ids = choice["prompt_token_ids"] + choice["token_ids"]
        with torch.no_grad():
            expected = trainer(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        own = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert torch.tensor(choice["logprobs"]["token_logprobs"][1:]).equal(own)
        best = [max(each.values()) for each in choice["logprobs"]["top_logprobs"][1:]]
        assert torch.tensor(best).equal(expected.amax(-1))


def test_records_of_activated_adapters_use_the_base_model_before_the_invocation(
    tmp_path: Path,
) -> None:
    model, _, _ = activated_pair(tmp_path)
    ids, records = activated_prompts(), [Logprobs(0, 0) for _ in NAMES]
    with torch.no_grad():
        expected = model(ids, adapter_names=NAMES).logits.log_softmax(-1)
        base = model(ids).logits.log_softmax(-1)
    assert (expected - base).abs().max() > 0.1
    with model.continuous_batching_context_manager(**batching(max_batch_tokens=14)) as manager:
        for row, name, record in zip(ids.tolist(), NAMES, records, strict=True):
            manager.add_request(row, adapter_name=name, logprobs=record, allow_base=True)
        for _ in NAMES:
            assert manager.get_result(timeout=60).error is None
    for row, record, each in zip(ids.tolist(), records, expected, strict=True):
        for i in range(1, len(row)):
            assert abs(record.prompt[i].value - each[i - 1, row[i]]) < 1e-4
