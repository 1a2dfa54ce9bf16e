"""Fields of requests to ``lora-ext serve``: neutral values, refusals, sampling and token ids."""

from typing import Any

import pytest
from served import chat, needs_packages

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
