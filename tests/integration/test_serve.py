"""``lora-ext serve`` with a real HTTP client: answers, adapters, and many concurrent requests."""

import concurrent.futures
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from served import (
    MANY,
    NAMES,
    ask,
    by_generate,
    chat,
    needs_packages,
    post,
    said,
    serving,
    settle,
    streamed,
    text_of,
)

from lora_ext.serving._metrics import Load, prometheus

pytestmark = needs_packages


@pytest.mark.slow
def test_32_clients_over_16_adapters_during_200_loads_and_unloads(server: Any) -> None:
    jobs = [(MANY[i % 16], f"w{5 + i} w{90 - i} w7") for i in range(32)]
    alone = {job: text_of(ask(server, *job)) for job in jobs}
    assert len(set(alone.values())) > 16  # Adapters and prompts change the answers.
    assert alone[jobs[3]] == by_generate(server, *jobs[3], 8)

    def churn() -> int:
        dice, changes = random.Random(0), 0
        while changes < 400:
            what = ("load", "unload")[changes % 2]
            status = post(server, what, dice.choice(MANY))
            assert status == 200 or (what, status) == ("unload", 404)
            changes += status == 200
        return changes

    with concurrent.futures.ThreadPoolExecutor(33) as threads:
        churning, rounds = threads.submit(churn), 0
        while rounds < 2 or not churning.done():
            whole, parts = jobs[rounds % 2 :: 2], jobs[1 - rounds % 2 :: 2]
            answers = threads.map(lambda job: text_of(ask(server, *job)), whole)
            streams = threads.map(lambda job: said(streamed(server, *job)), parts)
            assert list(answers) == [alone[job] for job in whole]
            assert list(streams) == [alone[job] for job in parts]
            rounds += 1
        assert churning.result() == 400
    settle(server)


def test_adapters_loaded_or_unloaded_concurrently_work(server: Any) -> None:
    expected = text_of(ask(server, "a3"))
    with concurrent.futures.ThreadPoolExecutor(24) as threads:
        loads = [threads.submit(post, server, "load", "a3") for _ in range(12)]
        asks = [threads.submit(lambda: text_of(ask(server, "a3"))) for _ in range(12)]
        assert {each.result() for each in loads} == {200}
        assert {each.result() for each in asks} == {expected}
    settle(server)
    expected = {name: text_of(ask(server, name)) for name in NAMES}
    with concurrent.futures.ThreadPoolExecutor(56) as threads:
        asks = [(name, threads.submit(ask, server, name)) for name in NAMES * 7]
        while server.engine.requests < 8:
            time.sleep(0.001)
        for name in NAMES:
            assert post(server, "unload", name) in (200, 404)
        for name, asked in asks:
            assert text_of(asked.result()) == expected[name]
    settle(server)


@pytest.mark.slow
def test_two_servers_in_one_process_are_independent(server: Any, tmp_path: Path) -> None:
    with serving(tmp_path) as other, concurrent.futures.ThreadPoolExecutor(32) as threads:
        assert post(other, "load", "a1", lora_path="a2") == 200
        asks = [
            (place, name, threads.submit(ask, (server, other)[place], name))
            for name in NAMES * 2
            for place in (0, 1)
        ]
        found = {(place, name): text_of(asked.result()) for place, name, asked in asks}
        assert all(found[0, name] == text_of(ask(server, name)) for name in NAMES)
        assert found[1, "a1"] == found[1, "a2"] == found[0, "a2"] != found[0, "a1"]
        assert found[1, "a5"] == found[0, "a5"]


def test_answers_have_the_format_of_openai(server: Any) -> None:
    answer = ask(server, "a1").json()
    assert answer["object"] == "chat.completion" and answer["model"] == "a1"
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length"
    prompt = len(server.engine.encode(chat("a1")["messages"]))
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 8,
        "total_tokens": prompt + 8,
    }
    events = streamed(server, "a1")
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    deltas = [event["choices"][0] for event in events]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    end = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert deltas[-1] == end
    assert len(deltas) > 4  # The answer was streamed in pieces.
    assert {delta["finish_reason"] for delta in deltas[:-1]} == {None}
    body = {**chat("a1"), "max_completion_tokens": 2}
    del body["max_tokens"]
    shorter = server.client.post("/v1/chat/completions", json=body)
    assert text_of(shorter).split() == choice["message"]["content"].split()[:2]


def test_tokenizer_without_a_template_gets_the_contents(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", None)
    said = [{"role": "system", "content": "w5 w6"}, {"role": "user", "content": "w7"}]
    assert server.engine.encode(said) == [5, 6, 7]


def test_completions_accept_a_text_or_its_tokens(server: Any) -> None:
    def complete(prompt: Any, **fields: Any) -> Any:
        body = {"model": "a1", "prompt": prompt, "temperature": 0, **fields}
        return server.client.post("/v1/completions", json=body)

    found = complete("w5 w6 w7", max_tokens=8).json()
    assert found["object"] == "text_completion" and found["usage"]["prompt_tokens"] == 3
    text = found["choices"][0]["text"]
    assert found["usage"]["completion_tokens"] == 8
    assert text and found["choices"][0]["finish_reason"] == "length"
    for prompt in ([5, 6, 7], ["w5 w6 w7"], [[5, 6, 7]]):
        assert complete(prompt, max_tokens=8).json()["choices"] == found["choices"]
    assert complete("w5").json()["usage"]["completion_tokens"] == 16
    neutral = {"echo": False, "best_of": 1, "logprobs": None, "suffix": "", "user": "me", "n": 1}
    assert complete("w5 w6 w7", max_tokens=8, **neutral).json()["choices"] == found["choices"]
    with server.client.stream(
        "POST", "/v1/completions", json={**body_of("a1"), "max_tokens": 8}
    ) as response:
        *lines, done = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    choices = [json.loads(line)["choices"][0] for line in lines]
    assert done == "[DONE]" and "".join(choice["text"] for choice in choices) == text
    assert [choice["finish_reason"] for choice in choices][-2:] == [None, "length"]
    for prompt, code, named in (
        ([5, 97], 400, "prompt: expected token ids in [0, 97), found [97]"),
        ([-1], 400, "found [-1]"),
        ([], 422, "prompt"),
        ([["w5"]], 422, "prompt"),
        ("", 400, "at least one token"),
        (None, 422, "prompt"),
    ):
        refused = complete(prompt)
        assert refused.status_code == code and named in refused.json()["error"]["message"]


def body_of(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": "w5 w6 w7", "temperature": 0, "stream": True}


def test_neutral_values_of_openai_fields_and_null_change_nothing(server: Any) -> None:
    expected = text_of(ask(server, "a1"))
    for fields in (
        {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"logprobs": False, "top_logprobs": 0, "safety_identifier": "me", "prompt_cache_key": "a"},
        {"functions": [], "function_call": "none", "reasoning_effort": None, "verbosity": None},
    ):
        assert text_of(ask(server, "a1", **fields)) == expected
    parts = [{"type": "text", "text": each} for each in ("w5 w6", "w7")]
    earlier = dict.fromkeys(("refusal", "audio", "annotations", "function_call", "tool_calls"))
    for message in (
        {"role": "user", "content": parts},
        {"role": "user", "content": "w5 w6 w7", "name": "me", **earlier},
    ):
        assert text_of(ask(server, "a1", messages=[message])) == expected
    for field in ("max_tokens", "temperature", "top_p", "seed", "stop", "n", "stream"):
        text_of(ask(server, "a1", **{field: None}))
    said = [text_of(ask(server, "a1", temperature=None, top_p=None, seed=3)) for _ in range(2)]
    assert said == [text_of(ask(server, "a1", temperature=1.0, top_p=1.0, seed=3))] * 2


def test_metrics_for_routers_contain_running_adapters_and_cache_usage(server: Any) -> None:
    body = chat("a3", stream=True, max_tokens=1900)
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        events = (line for line in response.iter_lines() if line)
        assert "assistant" in next(events) and next(events)  # The answer has begun.
        lines = server.client.get("/metrics").text.splitlines()
    (info,) = [line for line in lines if line.startswith("vllm:lora_requests_info{")]
    assert 'running_lora_adapters="a3",waiting_lora_adapters=""' in info
    assert "vllm:num_requests_running 1" in lines and "vllm:num_requests_waiting 0" in lines
    assert 0 < cache_usage(lines) < 1
    settle(server)
    # The prompt fills several pages.
    text_of(ask(server, "a3", " ".join(f"w{5 + i % 90}" for i in range(200))))
    settle(server)
    allocators = server.engine.manager.batch_processor.cache.cache_allocators.values()
    assert any(each.ledger.cached_blocks for each in allocators), "expected cached pages"
    assert cache_usage(server.client.get("/metrics").text.splitlines()) == 0
    found = server.client.options("/v1/chat/completions")
    assert (found.status_code, found.headers["Allow"], found.content) == (204, "POST, OPTIONS", b"")
    assert "access-control-allow-origin" not in found.headers


def cache_usage(lines: list[str]) -> float:
    (used,) = [line for line in lines if line.startswith("vllm:kv_cache_usage_perc ")]
    return float(used.split()[1])


def test_stop_seed_and_temperature_are_used(server: Any) -> None:
    words = text_of(ask(server, "a1", max_tokens=20)).split()
    first = words.index(words[4])
    for stop in (words[4], ["nothing", words[4]]):
        found = ask(server, "a1", max_tokens=20, stop=stop)
        assert text_of(found) == " ".join([*words[:first], ""])
        assert found.json()["choices"][0]["finish_reason"] == "stop"
    events = streamed(server, "a1", max_tokens=20, stop=words[4])
    assert said(events) == " ".join([*words[:first], ""])
    hot = [text_of(ask(server, "a1", temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    settle(server)


def test_models_are_listed_loaded_and_unloaded(server: Any) -> None:
    for name in server.engine.pool.names:
        assert post(server, "unload", name) == 200
    assert post(server, "load", "mine", lora_path="a4") == 200
    text_of(ask(server, "a5"))
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    folder = {*MANY, "broken"}  # These are listed whether they are loaded or not.
    assert [m["id"] for m in listed["data"]][:3] == ["tiny", "mine", "a5"]
    parents = {m["id"]: m.get("parent") for m in listed["data"]}
    assert parents == {"tiny": None, **dict.fromkeys(folder | {"mine"}, "tiny")}
    for name in ("tiny", "mine", "a7"):
        assert server.client.get(f"/v1/models/{name}").json()["id"] == name
    assert server.client.get("/v1/models/nobody").status_code == 404
    assert text_of(ask(server, "mine")) == text_of(ask(server, "a4"))
    base = by_generate(server, None, "w5 w6 w7", 8)
    assert text_of(ask(server, "tiny")) == base != text_of(ask(server, "a4"))
    assert post(server, "unload", "mine") == 200
    assert post(server, "unload", "mine") == 404
    assert ask(server, "mine").status_code == 404
    assert post(server, "load", "tiny", lora_path="a1") == 400  # the base model's name
    assert post(server, "load", "broken") == 400
    assert ask(server, "broken").status_code == 400


@pytest.mark.slow
def test_running_request_keeps_its_adapter(server: Any) -> None:
    assert post(server, "load", "mine", lora_path="a1") == 200
    count = 800
    expected = text_of(ask(server, "a1", max_tokens=count))
    body = chat("mine", stream=True, max_tokens=count)
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert post(server, "load", "mine", lora_path="a2") == 200
        assert text_of(ask(server, "mine")) == text_of(ask(server, "a2"))
        assert post(server, "unload", "mine") == 200
        assert server.engine.pool.stats()["pins"] > 0
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert said(events) == expected
    settle(server)


def test_streams_end_with_their_usage_if_requested(server: Any) -> None:
    *events, last = streamed(server, "a1", stream_options={"include_usage": True})
    assert {event["usage"] for event in events} == {None}
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert last["choices"] == [] and last["id"] == events[0]["id"]
    assert last["usage"] == ask(server, "a1").json()["usage"]
    for options in (None, {}, {"include_usage": False}, {"include_usage": None}):
        events = streamed(server, "a1", stream_options=options)
        assert events[-1]["choices"] and not any("usage" in event for event in events)


def test_metrics_are_prometheus_text(server: Any) -> None:
    text_of(ask(server, "a1"))
    assert ask(server, "nobody").status_code == 404
    assert ask(server, "a1", n=0).status_code == 422
    response = server.client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert response.text.endswith("\n")
    kinds: dict[str, str] = {}
    found: dict[str, float] = {}
    lines = iter(response.text.splitlines())
    for line in lines:
        if line.startswith("# HELP "):
            name, told = line.removeprefix("# HELP ").split(" ", 1)
            assert told and name not in kinds, f"{name}: expected all samples of a name together"
            _, _, same, kinds[name] = next(lines).split(" ")
            assert same == name
        else:
            sample, value = line.rsplit(" ", 1)
            assert sample.partition("{")[0] == name
            found[sample] = float(value)
    assert {sample.partition("{")[0] for sample in found} == set(kinds)
    (info,) = [sample for sample in found if sample.startswith("vllm:lora_requests_info")]
    assert info.endswith('{max_lora="64",running_lora_adapters="",waiting_lora_adapters=""}')
    assert 0 <= time.time() - found[info] < 60
    assert set(kinds.values()) == {"counter", "gauge"}
    assert kinds["lora_ext_tokens_total"] == kinds["lora_ext_pool_loads"] == "counter"
    assert kinds["lora_ext_requests"] == kinds["lora_ext_pool_pages"] == "gauge"
    # Prometheus reserves the suffix `_total` for counters.
    assert all(kind == "counter" for name, kind in kinds.items() if name.endswith("_total"))
    assert all(value >= 0 for value in found.values())
    assert found["lora_ext_tokens_total"] >= 8
    for code in (404, 422):
        assert found[f'lora_ext_refused_total{{code="{code}"}}'] >= 1
    assert {"lora_ext_requests", "lora_ext_pool_pins"} <= set(found)


def test_name_with_a_comma_is_escaped_in_the_metrics() -> None:
    load = Load(running=["a,b", None, "a"], waiting=['"'], most_adapters=4, cache=0)
    page = prometheus({}, {}, load)
    assert r'running_lora_adapters="a,a%2Cb",waiting_lora_adapters="\""' in page


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [("GET", "/v1/nothing", 404), ("DELETE", "/v1/models", 405), ("OPTIONS", "/v1/nothing", 404)],
)
def test_unknown_routes_return_the_error_of_openai(
    server: Any, method: str, path: str, code: int
) -> None:
    found = server.client.request(method, path)
    assert found.status_code == code and found.json()["error"]["code"] == code
    assert found.headers.get("Allow") == ("GET" if code == 405 else None)


def test_server_listens_on_loopback_and_reports_failed_health(server: Any) -> None:
    """Check the health last, because this check ends the manager's thread."""
    packed, answers = server.said
    assert packed.startswith("the base model is") and packed.endswith("--no-pack disables packing")
    assert answers.startswith("tiny with 17 adapters answers at http://127.0.0.1:")
    assert server.client.get("/health").json() == {"healthy": True}
    asked = server.client.head("/health")
    assert asked.status_code == 200 and asked.content == b""
    body = chat("a1", stream=True, max_tokens=1900)
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server.engine.manager.batch_processor.update_batch = None
        *_, error, done = [line for line in lines if line]
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 500
    assert ask(server, "a1").status_code == 500
    assert ask(server, "a1").status_code == 500
    assert server.client.get("/health").status_code == 503
    assert server.client.head("/health").status_code == 503
    assert server.engine.pool.stats()["pins"] == 0
