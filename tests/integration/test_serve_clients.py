"""``lora-ext serve`` with faulty or disconnecting clients: the server keeps working."""

import contextlib
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import LIMIT, NAMES, ask, chat, connect, metric, needs_packages, post, settle, text_of

pytestmark = needs_packages


@pytest.mark.parametrize(
    "path", ["../secret/x", "/etc", "a0/../../secret/x", "link", "linked", "", "a\0"]
)
def test_path_outside_the_folder_is_not_loaded(server: Any, path: str) -> None:
    root, secret = server.folder / "adapters", server.folder / "secret" / "x"
    with contextlib.suppress(FileExistsError):
        (root / "link").symlink_to(secret)
        (root / "linked").mkdir()
        (root / "linked" / "adapter_config.json").symlink_to(secret / "adapter_config.json")
    assert post(server, "load", "new", lora_path=path) == 400
    assert ask(server, path).status_code == 404
    assert post(server, "load", "new", lora_path=str(secret)) == 400


@pytest.mark.parametrize(
    "name",
    [
        "",
        "__base__",
        "a\0",
        "a\nb",
        "\x1b[2J",
        "x" * 201,
        "x" * 10_000,
        "a/b",
        "/a",
        "..",
        "\u202eb",
    ],
)
def test_names_that_are_not_a_folder_return_400(server: Any, name: str) -> None:
    body = {"lora_name": name, "lora_path": "a4"}
    response = server.client.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 400
    told = response.json()["error"]["message"]
    assert told.startswith("load_lora_adapter: lora_name: expected a folder name of")
    assert len(told) < 400 and told.isprintable()
    listed = [m["id"] for m in server.client.get("/v1/models").json()["data"]]
    assert name not in listed


def set_fields(config: Path, **fields: Any) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))


DAMAGES: dict[str, Callable[[Path, Path], Any]] = {
    "no-json": lambda config, weights: config.write_text("{"),
    "no-config": lambda config, weights: config.unlink(),
    "no-weights": lambda config, weights: weights.unlink(),
    "short-weights": lambda config, weights: weights.write_bytes(weights.read_bytes()[:200]),
    "empty-weights": lambda config, weights: weights.write_bytes(b""),
    "another-kind": lambda config, weights: set_fields(config, peft_type="IA3"),
    "another-rank": lambda config, weights: set_fields(config, r=4096),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_details_of_an_invalid_adapter_are_only_in_the_log(
    server: Any, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = server.folder / "adapters" / how
    shutil.copytree(server.folder / "adapters" / "a0", adapter)
    DAMAGES[how](adapter / "adapter_config.json", adapter / "adapter_model.safetensors")
    body = {"lora_name": "mine", "lora_path": how}
    loaded = server.client.post("/v1/load_lora_adapter", json=body)
    for name, response in (("mine", loaded), (how, ask(server, how))):
        assert response.status_code == 400
        told = response.json()["error"]["message"]
        assert repr(name) in told and "the log has" in told
        assert str(server.folder) not in response.text and "/" not in told
        assert any(repr(name) in message for message in caplog.messages)
    assert sum(" is not loaded: " in message for message in caplog.messages) == 2


def test_bad_requests_name_the_field_and_the_server_keeps_working(server: Any) -> None:
    before = text_of(ask(server, "a1"))
    for fields, code, named in (
        ({"model": "nobody"}, 404, "nobody"),
        ({"model": "a1\ud800"}, 422, ""),
        ({"temperature": -1}, 422, "temperature"),
        ({"temperature": "hot"}, 422, "temperature"),
        ({"max_tokens": 0}, 422, "max_"),
        ({"max_tokens": 10_000}, 400, "max_tokens: expected at most 2048 tokens"),
        ({"n": 0}, 422, "n: "),
        ({"n": 65}, 400, "n: expected at most 64 prompts times n, found 65"),
        ({"logprobs": 1}, 422, "logprobs: "),
        ({"tools": [{"type": "function"}]}, 422, "tools: "),
        ({"stop": [""]}, 422, "stop"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options: expected null"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, 422, "stream_options"),
        ({"stream": True, "stream_options": {"obfuscate": True}}, 422, "obfuscate"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"role": "user"}]}, 422, "content"),
        ({"messages": [{"role": "nobody", "content": "w5"}]}, 400, "no such role"),
        ({"messages": [{"role": "user", "content": "w5 " * 3000}]}, 400, "found 30"),
    ):
        body = json.dumps({**chat("a1"), **fields})
        response = server.client.post("/v1/chat/completions", content=body)
        assert response.status_code == code, response.text
        assert response.json()["error"]["code"] == code
        assert named in response.json()["error"]["message"]
    for body in (b"", b"{", b"[" * 15_000, b"\xff\xfe", b"null", b'"text"', b"[]"):
        response = server.client.post("/v1/chat/completions", content=body)
        assert response.status_code == 422, response.text
    assert server.client.get("/v1/chat/completions").status_code == 405
    assert server.client.get("/nowhere").status_code == 404
    assert text_of(ask(server, "a1")) == before
    settle(server)


NAN, INF, SCHEMA = float("nan"), float("inf"), {"type": "json_schema"}
#: Invalid values by field, for chats and completions.
HOSTILE: dict[str, list[Any]] = {
    "model": [None, 5, [], {}, True, "", "nobody", "../a1", "a1\0", "x" * 9000, "\ud800"],
    "temperature": [-1, 2.5, "hot", True, [], NAN, INF, 10**400],
    "top_p": [0, -0.5, 1.5, "1", NAN],
    "top_k": [-2, 1.5, "3", True],
    "min_p": [-0.1, 1.5, "0", NAN],
    "repetition_penalty": [0, -1, INF, NAN, "1"],
    "seed": [1 << 70, -(1 << 70), 1.5, "1", NAN],
    "max_tokens": [-1, 1.5, "8", 10**9, 10**400, True, []],
    "max_completion_tokens": [-1, 9, "8", {}],
    "n": [0, -1, 129, 1.5, "2", True, 65, NAN],
    "stop": ["", [""], 5, [5], ["w5"] * 17, "w" * 257, {}, [None]],
    "stop_token_ids": [[97], [-1], ["w5"], 5, [1.5], [True], [5] * 1025, [10**30]],
    "min_tokens": [-1, 9, "1", 1.5, True, 10**30],
    "logit_bias": [{"97": 1}, {"-1": 1}, {"5": 101}, {"5": "x"}, [1], {"w5": 1}, {"5": NAN}],
    "stream": ["yes", 1, []],
    "stream_options": [{"include_usage": True}, {"include_usage": 1}, {"x": 1}, 5],
    "response_format": [{"type": "xml"}, [], "json", {}, SCHEMA, {**SCHEMA, "json_schema": 5}],
    "structured_outputs": [{"x": 1}, [], {}, {"choice": []}, {"regex": "("}, {"json": "{"}],
    "adapter_generation": [-1, "1", 1.5, 10**9, True],
    "lora": [{}, "a1", [5], [{"id": "a1", "scale": "1"}], [{"id": "a1", "scale": 1}]],
    "return_token_ids": [1, "yes"],
    "logprobs": [21, -1, "1", 1.5, []],
    "tools": [[{}], "x"],
    "best_of": [2, True],
    "suffix": ["w5"],
    "user": [5, {}],
    "nonsense": [1],
}


def test_hostile_bodies_get_an_error_that_names_the_field(server: Any) -> None:
    before, count = text_of(ask(server, "a1")), 0
    said = {"messages": [[], 5, [{}], [{"role": "user", "content": 5}], [None], {}, "w5"]}
    given = {"prompt": [[], 5, [97], [-1], [[5], [97]], [10**30], [[]], {}, [True], [NAN], None]}
    more = {"prompt_logprobs": [21, -1, True], "echo": [1, "yes"]}
    for path, body, fields in (
        ("chat/completions", chat("a1"), {**HOSTILE, **said, "top_logprobs": [1, -1, 21]}),
        ("completions", {"model": "a1", "prompt": "w5", "max_tokens": 8}, HOSTILE | given | more),
    ):
        for field, values in fields.items():
            for value in values:
                content = json.dumps({**body, field: value})
                found = server.client.post(f"/v1/{path}", content=content)
                count += 1
                assert 400 <= found.status_code < 500, (field, value, found.text)
                told = found.json()["error"]["message"]
                assert field in told or value == "\ud800", (field, value, told)
                assert len(told) < 1500 and "\n" not in told
    assert count > 200 and text_of(ask(server, "a1")) == before
    settle(server)


def test_bodies_above_the_limit_are_rejected_with_and_without_a_length(server: Any) -> None:
    large = json.dumps(chat("a1", "w5 " * LIMIT)).encode()

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    for path in ("chat/completions", "load_lora_adapter", "unload_lora_adapter"):
        for content in (large, chunks()):
            response = server.client.post(f"/v1/{path}", content=content)
            assert response.status_code == 413
            assert response.json()["error"]["message"].endswith("at most 20000 bytes, found more")
    body = json.dumps(chat("a1")).encode()
    exact = server.client.post("/v1/chat/completions", content=body.ljust(LIMIT))
    assert exact.status_code == 200
    assert server.client.post("/v1/chat/completions", content=body.ljust(LIMIT + 1)).is_error


def test_client_that_disconnects_within_its_body_is_no_server_error(
    server: Any,
) -> None:
    refused = metric(server, 'refused_total{code="400"}')
    with socket.create_connection((server.client.base_url.host, server.client.base_url.port)) as c:
        c.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
    end = time.monotonic() + 10
    while metric(server, 'refused_total{code="400"}') == refused and time.monotonic() < end:
        time.sleep(0.02)
    assert metric(server, 'refused_total{code="400"}') == refused + 1


@pytest.mark.parametrize("stream", [True, False])
def test_disconnected_clients_end_their_requests(server: Any, stream: bool) -> None:
    cancelled = server.engine.stats()["cancelled_total"]
    gone = [connect(server, model=name, stream=stream, max_tokens=1900) for name in NAMES]
    while server.engine.requests < len(gone):
        time.sleep(0.01)
    for connection in gone:
        if stream:
            assert connection.recv(9) == b"HTTP/1.1 "
        connection.close()
    settle(server)
    assert server.engine.stats()["cancelled_total"] == cancelled + len(gone)


@pytest.mark.slow
def test_slow_readers_do_not_delay_other_clients(server: Any) -> None:
    expected = text_of(ask(server, "a1"))
    tokens = server.engine.stats()["tokens_total"]
    slow = [connect(server, model=f"a{i}", stream=True, max_tokens=900) for i in range(2)]
    assert [text_of(ask(server, "a1")) for _ in range(3)] == [expected] * 3
    end = time.monotonic() + 60  # A busy server may read slow requests late.
    while server.engine.stats()["tokens_total"] < tokens + 2 * 900 and time.monotonic() < end:
        time.sleep(0.02)
    settle(server)
    assert server.engine.stats()["tokens_total"] >= tokens + 2 * 900
    answer = b""
    while not answer.endswith(b"0\r\n\r\n"):
        answer += slow[0].recv(1 << 16)
    assert answer.rstrip().endswith(b"data: [DONE]\n\n\r\n0")
    for connection in slow:
        connection.close()


@pytest.mark.slow
def test_stream_that_fails_midway_reports_it_and_the_server_keeps_working(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, told = text_of(ask(server, "a1")), metric(server, 'refused_total{code="500"}')
    decode, left = server.engine.tokenizer.decode, iter(range(9))

    def breaks(*given: Any, **how: Any) -> str:
        if next(left, None) is None:
            raise RuntimeError("no such token")
        return decode(*given, **how)

    body = chat("a1", stream=True, max_tokens=1900)
    with monkeypatch.context() as patch:
        patch.setattr(server.engine.tokenizer, "decode", breaks)
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            *events, error, done = [line for line in response.iter_lines() if line]
    assert response.status_code == 200 and done == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events)
    found = json.loads(error.removeprefix("data: "))
    assert found == {"error": {"message": "no such token", "code": 500}}
    assert metric(server, 'refused_total{code="500"}') == told + 1
    settle(server)  # Without a reader, no tokens are generated.
    assert text_of(ask(server, "a1")) == expected


@pytest.mark.slow
def test_full_queue_returns_a_retry_time(server: Any) -> None:
    most = server.engine.max_requests
    waiting = [connect(server, model="a0", max_tokens=1900) for _ in range(most)]
    while server.engine.requests < most:
        time.sleep(0.01)
    response = ask(server, "a1")
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert server.client.get("/health").status_code == 200
    for connection in waiting:
        connection.close()
    settle(server)
    text_of(ask(server, "a1"))
