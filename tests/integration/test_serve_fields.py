"""Fields of requests to ``lora-ext serve``: neutral values, refusals, sampling and token ids."""

import json
from typing import Any

import pytest
from served import chat, needs_packages, settle

pytestmark = needs_packages

NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("top_k", "presence_penalty", "frequency_penalty", "min_p", "min_tokens"), 0),
    **dict.fromkeys(("n", "best_of", "repetition_penalty", "length_penalty"), 1.0),
    **dict.fromkeys(("use_beam_search", "ignore_eos", "include_stop_str_in_output"), False),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), True),
    **{name: [] for name in ("stop", "stop_token_ids", "bad_words")},
    **{name: {} for name in ("logit_bias", "vllm_xargs", "kv_transfer_params")},
    **{"priority": 0, "truncation_side": "left", "thinking_token_budget": -1, "session_id": "a"},
}
NULL = (
    "truncate_prompt_tokens allowed_token_ids logprob_token_ids cache_salt stream_options seed "
    "return_token_ids return_tokens_as_token_ids prompt_logprobs repetition_detection user "
    "stream_interval structured_outputs response_format logprobs max_completion_tokens"
).split()


@pytest.mark.parametrize("kind", ["chat/completions", "completions"])
def test_neutral_values_of_vllm_fields_change_nothing(server: Any, kind: str) -> None:
    body: dict[str, Any] = {**chat("a1"), "logprobs": False, "chat_template_kwargs": {}}
    if kind == "completions":
        body = {"model": "a1", "prompt": "w5 w6 w7", "temperature": 0, "max_tokens": 8}
        body["add_special_tokens"] = True
    expected = server.client.post(f"/v1/{kind}", json=body).json()["choices"]
    more = [{**dict.fromkeys(NULL), **NEUTRAL}, dict.fromkeys(NEUTRAL), {"top_k": -1}]
    more += [{"max_completion_tokens": 8}, {"stream_options": {"include_obfuscation": False}}]
    for fields in more:
        stream = {"stream": True} if fields.get("stream_options") else {}
        found = server.client.post(f"/v1/{kind}", json={**body, **fields, **stream})
        assert found.status_code == 200, found.text
        assert stream or found.json()["choices"] == expected


@pytest.mark.parametrize("kind", ["chat/completions", "completions"])
def test_refusals_name_the_field_the_value_and_what_is_expected(server: Any, kind: str) -> None:
    asked = {"model": "a1", "prompt": "w5 w6 w7"} if kind == "completions" else chat("a1")
    body = {**asked, "max_tokens": 8}
    for field, value, expected in (
        ("use_beam_search", True, "null or false, found true"),
        ("ignore_eos", 0, "null or false, found 0"),
        ("n", 2, "null or 1, found 2"),
        ("n", True, "null or 1, found true"),
        ("presence_penalty", 0.5, "null or 0, found 0.5"),
        ("skip_special_tokens", False, "null or true, found false"),
        ("allowed_token_ids", [5], "null, found [5]"),
        ("bad_words", ["w5"], 'null or [], found ["w5"]'),
        ("max_completion_tokens", 9, "8, found 9"),
        ("truncation_side", "up", 'null or "left" or "right", found "up"'),
    ):
        found = server.client.post(f"/v1/{kind}", json={**body, field: value})
        assert found.status_code == 422
        assert found.json()["error"]["message"] == f"{field}: expected {expected}"
    for field, value in (("max_completion_tokens", 0), ("seed", 1 << 70), ("stop", [3])):
        found = server.client.post(f"/v1/{kind}", json={**body, field: value, "max_tokens": None})
        assert found.status_code == 422 and str(value) in found.text
        assert found.json()["error"]["message"].startswith(field)
        assert "Extra inputs" not in found.text
    found = server.client.post(f"/v1/{kind}", json={**body, "nonsense": 1})
    assert found.json()["error"]["message"] == "nonsense: Extra inputs are not permitted, found 1"


PROMPTS = ["w5 w6 w7", "w9", "w30 w31 w32 w33", "w9"]
IDS = [[5, 6, 7], [9], [30, 31, 32, 33], [9]]


def complete(server: Any, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": "a1", "prompt": prompt, "temperature": 0, "max_tokens": 8, **fields}
    response = server.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def chunks(server: Any, kind: str, **body: Any) -> list[dict[str, Any]]:
    body = {"model": "a1", "temperature": 0, "max_tokens": 8, "stream": True, **body}
    with server.client.stream("POST", f"/v1/{kind}", json=body) as response:
        *lines, done = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert done == "[DONE]", lines
    return [json.loads(line) for line in lines]


def test_each_prompt_has_its_choice_with_token_ids_in_streams_too(server: Any) -> None:
    alone = [complete(server, prompt, return_token_ids=True) for prompt in PROMPTS]
    expected = [{**found["choices"][0], "index": i} for i, found in enumerate(alone)]
    for choice, ids in zip(expected, IDS, strict=True):
        assert choice["prompt_token_ids"] == ids and len(choice["token_ids"]) == 8
        words = [f"w{token}" for token in choice["token_ids"] if token > 4]
        assert choice["text"].split() == words
    for prompt in (PROMPTS, IDS):
        found = complete(server, prompt, return_token_ids=True)
        assert found["choices"] == expected
        assert found["usage"]["completion_tokens"] == 32
        assert found["usage"]["prompt_tokens"] == sum(map(len, IDS))
    assert complete(server, IDS[0], return_token_ids=True)["choices"] == [expected[0]]
    assert "token_ids" not in complete(server, PROMPTS)["choices"][0]
    options = {"stream_options": {"include_usage": True}}
    how: dict[str, Any] = {"return_token_ids": True, **options}
    *events, last = chunks(server, "completions", prompt=PROMPTS, **how)
    assert last["usage"] == found["usage"] and len({event["id"] for event in events}) == 1
    streamed = [event["choices"][0] for event in events]
    for i, choice in enumerate(expected):
        mine = [part for part in streamed if part["index"] == i]
        assert "".join(part["text"] for part in mine) == choice["text"]
        ids = [token for part in mine for token in part.get("token_ids", [])]
        assert ids == choice["token_ids"]
        assert mine[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        reasons = [part["finish_reason"] for part in mine]
        assert reasons == [None] * (len(mine) - 1) + [choice["finish_reason"]]


def test_token_ids_end_with_the_stop_text(server: Any) -> None:
    free = complete(server, PROMPTS[0], return_token_ids=True, max_tokens=20)
    words = free["choices"][0]["text"].split()
    first = words.index(words[4])
    found = complete(server, PROMPTS[0], return_token_ids=True, max_tokens=20, stop=words[4])
    (choice,) = found["choices"]
    assert choice["text"].split() == words[:first] and choice["finish_reason"] == "stop"
    assert choice["token_ids"] == free["choices"][0]["token_ids"][: first + 1]
    assert found["usage"]["completion_tokens"] == first + 1
    said = chat("a1", max_tokens=20, stop=words[4])["messages"]
    events = chunks(server, "chat/completions", messages=said, return_token_ids=True)
    ids = server.engine.encode(said)
    assert events[0]["choices"][0]["prompt_token_ids"] == ids
    assert sum(len(event["choices"][0].get("token_ids", [])) for event in events) == 8


def test_prompts_beyond_the_limit_of_requests_are_refused(server: Any) -> None:
    most = server.engine.max_requests
    body = {"model": "a1", "prompt": ["w5"] * (most + 1), "max_tokens": 1}
    found = server.client.post("/v1/completions", json=body)
    assert found.status_code == 400
    message = f"prompt: expected at most {most} prompts, found {most + 1}"
    assert message in found.json()["error"]["message"]
    for prompt in (["w5", ""], [[5], []], [[5], "w5"], [5, "w5"], [[5], [97]], [[[5]]]):
        found = server.client.post("/v1/completions", json={**body, "prompt": prompt})
        assert found.status_code in (400, 422) and "prompt" in found.json()["error"]["message"]
    found = server.client.post("/v1/completions", json={**body, "max_tokens": 3000, "prompt": "w5"})
    assert "max_tokens: expected at most 2048 tokens" in found.json()["error"]["message"]
    body = {"model": "a1", "prompt": "w5", "max_completion_tokens": 3000}
    found = server.client.post("/v1/completions", json=body)
    assert "max_completion_tokens: expected at most 2048" in found.json()["error"]["message"]
    settle(server)
    assert len(complete(server, ["w5"] * most, max_tokens=1)["choices"]) == most
