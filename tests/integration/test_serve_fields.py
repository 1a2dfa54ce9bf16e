"""Fields of requests to ``lora-ext serve``: neutral values, refusals, sampling and token ids."""

import concurrent.futures
import json
from typing import Any

import pytest
import torch
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


def test_echo_alone_needs_no_text_of_the_required_format(server: Any) -> None:
    form = {"structured_outputs": {"choice": ["w5"]}}
    (choice,) = complete(server, "w5 w6", echo=True, max_tokens=0, **form)["choices"]
    assert choice["text"] == "w5 w6" and choice["finish_reason"] == "length"


@pytest.mark.parametrize("kind", ["chat/completions", "completions"])
def test_refusals_name_the_field_the_value_and_what_is_expected(server: Any, kind: str) -> None:
    asked = {"model": "a1", "prompt": "w5 w6 w7"} if kind == "completions" else chat("a1")
    body = {**asked, "max_tokens": 8}
    for field, value, expected in (
        ("use_beam_search", True, "null or false, found true"),
        ("ignore_eos", 0, "null or false, found 0"),
        ("best_of", 2, "null or 1, found 2"),
        ("best_of", True, "null or 1, found true"),
        ("presence_penalty", 0.5, "null or 0, found 0.5"),
        ("skip_special_tokens", False, "null or true, found false"),
        ("allowed_token_ids", [5], "null, found [5]"),
        ("bad_words", ["w5"], 'null or [], found ["w5"]'),
        ("max_completion_tokens", 9, "null or 8, found 9"),
        ("truncation_side", "up", 'null or "left" or "right", found "up"'),
    ):
        found = server.client.post(f"/v1/{kind}", json={**body, field: value})
        assert found.status_code == 422
        assert found.json()["error"]["message"] == f"{field}: expected {expected}"
    wrong = (("max_completion_tokens", 0), ("seed", 1 << 70), ("stop", [3]))
    wrong += (("n", 0), ("n", 129), ("n", True), ("n", 1.5), ("n", "2"))
    for field, value in wrong:
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


def test_n_gives_answers_of_consecutive_seeds(server: Any) -> None:
    how: dict[str, Any] = {"temperature": 1.5, "return_token_ids": True}
    alone = [complete(server, ids, seed=seed, **how) for ids in IDS[:2] for seed in (3, 4, 5)]
    found = complete(server, IDS[:2], seed=3, n=3, **how)
    choices = found["choices"]
    assert [choice["index"] for choice in choices] == [*range(6)]
    expected = [each["choices"][0]["token_ids"] for each in alone]
    assert [choice["token_ids"] for choice in choices] == expected
    assert len({*map(tuple, expected)}) == 6
    generated = sum(map(len, expected))
    usage = {"prompt_tokens": 4, "completion_tokens": generated, "total_tokens": 4 + generated}
    assert found["usage"] == usage
    events = chunks(
        server,
        "completions",
        prompt=IDS[:2],
        seed=3,
        n=3,
        stream_options={"include_usage": True},
        **how,
    )
    assert events.pop()["usage"] == usage
    for i, tokens in enumerate(expected):
        parts = [each["choices"][0] for each in events if each["choices"][0]["index"] == i]
        assert [token for part in parts for token in part["token_ids"]] == tokens
    body = chat("a1", n=2, temperature=1.5, max_tokens=20)
    choices = server.client.post("/v1/chat/completions", json=body).json()["choices"]
    assert len({choice["message"]["content"] for choice in choices}) == 2
    body = {"model": "a1", "prompt": ["w5"] * 5, "n": 13, "max_tokens": 1}
    refused = server.client.post("/v1/completions", json=body)
    assert refused.status_code == 400
    assert "n: expected at most 64 prompts times n, found 65" in refused.text
    settle(server)


def test_no_new_tokens_with_echo_give_the_prompt_alone(server: Any) -> None:
    how: dict[str, Any] = {"echo": True, "logprobs": 2, "return_token_ids": True}
    more = complete(server, IDS, max_tokens=1, **how)
    found = complete(server, IDS, max_tokens=0, **how)
    assert found["usage"] == {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}
    events = chunks(server, "completions", prompt=IDS, max_tokens=0, **how)
    for i, (choice, longer) in enumerate(zip(found["choices"], more["choices"], strict=True)):
        count = len(IDS[i])
        assert choice["text"] == " ".join(f"w{token}" for token in IDS[i])
        assert (choice["token_ids"], choice["finish_reason"]) == ([], "length")
        for name, values in choice["logprobs"].items():
            assert len(values) == count and values == longer["logprobs"][name][:count]
        parts = [each["choices"][0] for each in events if each["choices"][0]["index"] == i]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["logprobs"] for part in parts if part["logprobs"]] == [choice["logprobs"]]
    text = complete(server, PROMPTS[0], max_tokens=0, echo=True, stop="w5")["choices"][0]
    assert text["text"] == PROMPTS[0] and text["logprobs"] is None
    body = {"model": "a1", "prompt": "w5", "max_tokens": 0}
    refused = server.client.post("/v1/completions", json=body)
    assert refused.status_code == 400
    told = refused.json()["error"]["message"]
    assert told == "max_tokens: expected at least 1 without echo, found 0"
    settle(server)


def by_generate(server: Any, name: str, ids: list[int], **how: Any) -> list[int]:
    given = torch.tensor([ids])
    out = server.engine.model.generate(
        given,
        attention_mask=torch.ones_like(given),
        adapter_names=[name],
        **{"do_sample": False, "max_new_tokens": 12, "eos_token_id": 1, "pad_token_id": 0, **how},
    )
    return out[0, len(ids) :].tolist()


FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
    ({"logit_bias": {"20": 4, "7": -100}}, {"sequence_bias": [[[20], 4.0], [[7], -100.0]]}),
    (
        {"logit_bias": {"1": 100}, "min_tokens": 5, "repetition_penalty": 1.3},
        {"sequence_bias": [[[1], 100.0]], "min_new_tokens": 5, "repetition_penalty": 1.3},
    ),
    ({"stop_token_ids": [20, 30], "logit_bias": {"30": 2.5}}, {"sequence_bias": [[[30], 2.5]]}),
]


def test_requests_of_one_batch_equal_generate_with_their_own_processors(server: Any) -> None:
    for name in ("a0", "a1"):
        complete(server, "w5", model=name)  # loads the adapter
    expected = []
    for i, (fields, how) in enumerate(FIELDS):
        ends = [1, *fields.get("stop_token_ids", [])]
        expected.append(by_generate(server, f"a{i % 2}", IDS[0], **how, eos_token_id=ends))
    assert len({tuple(tokens) for tokens in expected}) == len(FIELDS)
    how: dict[str, Any] = {"max_tokens": 12, "return_token_ids": True, "logprobs": 1, "echo": True}
    with concurrent.futures.ThreadPoolExecutor(10) as threads:
        asked = [
            threads.submit(complete, server, IDS[0], model=f"a{i % 2}", **fields, **how)
            for i, (fields, _) in [*enumerate(FIELDS)] * 2
        ]
        found = [each.result()["choices"][0] for each in asked]
    assert [choice["token_ids"] for choice in found] == expected * 2
    reasons = ["length", "length", "length", "stop", "stop"]
    assert [choice["finish_reason"] for choice in found] == reasons * 2
    for i, choice in enumerate(found):  # sampling settings do not change log-probabilities
        ids = torch.tensor([IDS[0] + choice["token_ids"]])
        with torch.no_grad():
            law = server.engine.model(ids, adapter_names=[f"a{i % 5 % 2}"]).logits.log_softmax(-1)
        own = law[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        values = torch.tensor(choice["logprobs"]["token_logprobs"][1:])
        torch.testing.assert_close(values, own, atol=1e-5, rtol=1e-5)


def test_top_k_and_min_p_cut_after_the_temperature(server: Any) -> None:
    with torch.no_grad():
        logits = server.engine.model(torch.tensor([IDS[0]]), adapter_names=["a1"]).logits[0, -1]
    for temperature in (0.5, 2.0):
        law = (logits / temperature).softmax(-1)
        kept = {"top_k": set(logits.topk(3).indices.tolist())}
        kept["min_p"] = set((law >= 0.4 * law.max()).nonzero()[:, 0].tolist())
        assert 1 < len(kept["min_p"]) < 97
        for field, value in (("top_k", 3), ("min_p", 0.4)):
            seen = set()
            for seed in range(0, 192, 64):
                how = {"temperature": temperature, "max_tokens": 1, "return_token_ids": True}
                prompts = [IDS[0]] * 64
                with concurrent.futures.ThreadPoolExecutor(64) as threads:
                    asked = [
                        threads.submit(
                            complete, server, p, **how, **{field: value, "seed": seed + i}
                        )
                        for i, p in enumerate(prompts)
                    ]
                    seen |= {each.result()["choices"][0]["token_ids"][0] for each in asked}
            assert seen <= kept[field] and len(seen) > 1
            if len(kept[field]) < 5:
                assert seen == kept[field]
    alone = complete(server, IDS[0], temperature=2.0, seed=4, top_k=1, return_token_ids=True)
    greedy = complete(server, IDS[0], return_token_ids=True)
    assert alone["choices"] == greedy["choices"]


@pytest.mark.parametrize("kind", ["chat/completions", "completions"])
def test_refused_sampling_fields_are_named(server: Any, kind: str) -> None:
    asked = {"model": "a1", "prompt": "w5 w6 w7"} if kind == "completions" else chat("a1")
    choice = {"structured_outputs": {"choice": ["w5"]}}
    for fields, code, named in (
        ({"top_k": -2}, 422, "top_k: Input should be greater than or equal to -1, found -2"),
        ({"top_k": 1.5}, 422, "top_k: "),
        ({"min_p": 1.1}, 422, "min_p: "),
        ({"repetition_penalty": 0}, 422, "repetition_penalty: "),
        ({"logit_bias": {"5": 101}}, 422, "logit_bias.5: "),
        ({"logit_bias": {"w5": 1}}, 422, "logit_bias.w5"),
        ({"logit_bias": [1]}, 422, "logit_bias: "),
        ({"logit_bias": {"97": 1}}, 400, "logit_bias: expected token ids in [0, 97), found [97]"),
        (
            {"stop_token_ids": [97]},
            400,
            "stop_token_ids: expected token ids in [0, 97), found [97]",
        ),
        ({"stop_token_ids": ["w5"]}, 422, "stop_token_ids.0: "),
        ({"min_tokens": 9}, 400, "min_tokens: expected at most 8, the limit of tokens, found 9"),
        ({"min_tokens": -1}, 422, "min_tokens: "),
        ({"min_tokens": 2, **choice}, 400, "min_tokens: expected null with response_format"),
        ({"stop_token_ids": [5], **choice}, 400, "stop_token_ids: expected null with response"),
    ):
        found = server.client.post(f"/v1/{kind}", json={**asked, "max_tokens": 8, **fields})
        assert found.status_code == code, found.text
        assert named in found.json()["error"]["message"]
    body = json.dumps({**asked, "repetition_penalty": float("inf")})
    found = server.client.post(f"/v1/{kind}", content=body)
    assert found.status_code == 422 and "repetition_penalty: " in found.text
    extreme = {"repetition_penalty": 1e-300, "logit_bias": {"5": -100}, "min_p": 1e-300}
    for more in ({"temperature": 0}, {"temperature": 2.0, "top_k": 10**12, "seed": 1}):
        found = server.client.post(f"/v1/{kind}", json={**asked, **extreme, **more})
        assert found.status_code == 200, found.text
