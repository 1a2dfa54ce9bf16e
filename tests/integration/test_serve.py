"""examples/serve.py and a real HTTP client: many requests at once, and what clients do wrong."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripts import load_script, missing
from tiny import make_model, make_peft
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MISSING = missing("fastapi", "uvicorn", "httpx")
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")

NAMES = [f"a{i}" for i in range(8)]
LIMIT = 20_000  # --max-body
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} {% endfor %}"
    "{% if messages[0].role == 'nobody' %}{{ raise_exception('no such role') }}{% endif %}"
    "<|assistant|>"
)


def save_model(folder: Path) -> None:
    """A tiny random Llama whose words are w5 to w96, and eight adapters for it."""
    marks = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
    words = {word: i for i, word in enumerate([*marks, *(f"w{i}" for i in range(5, 97))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tiny")
    model = make_model("llama")
    model.config.max_position_embeddings = 2048
    model.save_pretrained(folder / "tiny")
    configs = {
        name: {"r": 2 + i, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        for i, name in enumerate(NAMES)
    }
    make_peft(make_model("llama"), configs).save_pretrained(folder / "adapters")
    make_peft(make_model("llama"), {"x": configs["a0"]}).save_pretrained(folder / "secret")
    (folder / "adapters" / "broken").mkdir()
    (folder / "adapters" / "broken" / "adapter_config.json").write_text("{")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The server in a thread of its own, and a client for it."""
    import httpx
    import uvicorn

    folder = tmp_path_factory.mktemp("serve")
    save_model(folder)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        serve = load_script(patch, "examples", "serve")
        started = threading.Event()
        found: dict[str, Any] = {}

        def run(app: Any, **how: Any) -> None:
            found.update(how, app=app)
            server = found["server"] = uvicorn.Server(
                uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1)
            )
            serving = server.startup

            async def startup(**how: Any) -> None:
                await serving(**how)
                found["port"] = server.servers[0].sockets[0].getsockname()[1]
                started.set()

            server.startup = startup
            server.run()

        engine = serve.Engine
        patch.setattr(serve, "Engine", lambda *a: found.setdefault("engine", engine(*a)))
        patch.setattr(serve.uvicorn, "run", run)
        arguments = ["--model", str(folder / "tiny"), "--adapters", str(folder / "adapters")]
        patch.setattr("sys.argv", ["serve.py", *arguments, "--max-body", str(LIMIT)])
        thread = threading.Thread(target=serve.main)
        thread.start()
        assert started.wait(60)
        url = f"http://127.0.0.1:{found['port']}"
        limits = httpx.Limits(max_connections=None)
        client = stack.enter_context(httpx.Client(base_url=url, timeout=60, limits=limits))
        yield SimpleNamespace(client=client, folder=folder, **found)
        found["server"].should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def chat(model: str, words: str = "w5 w6 w7", **fields: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": words}]
    return {"model": model, "messages": said, "temperature": 0, "max_tokens": 8, **fields}


def ask(server: Any, *given: Any, **fields: Any) -> Any:
    return server.client.post("/v1/chat/completions", json=chat(*given, **fields))


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def streamed(server: Any, *given: Any, **fields: Any) -> list[dict[str, Any]]:
    body = chat(*given, stream=True, **fields)
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def said(events: list[dict[str, Any]]) -> str:
    """The text of a stream's events."""
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def post(server: Any, what: str, name: str, **fields: Any) -> int:
    body = {"lora_name": name, **fields}
    return server.client.post(f"/v1/{what}_lora_adapter", json=body).status_code


def metric(server: Any, name: str) -> int:
    lines = server.client.get("/metrics").text.splitlines()
    return next(
        (int(line.split()[-1]) for line in lines if line.startswith(f"lora_ext_{name} ")), 0
    )


def settle(server: Any) -> None:
    """Wait until nothing runs; nothing may be pinned then."""
    end = time.monotonic() + 20
    while server.engine.requests and time.monotonic() < end:
        time.sleep(0.02)
    assert server.engine.requests == 0
    assert server.engine.pool.stats()["pins"] == 0


def by_generate(server: Any, name: str | None, words: str, count: int) -> str:
    """What ``generate`` of the model says, while the server runs."""
    ids = torch.tensor([server.engine.encode([{"role": "user", "content": words}])])
    how = {"max_new_tokens": count, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
    out = server.engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), adapter_names=[name], **how
    )
    return server.engine.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_32_requests_of_8_adapters_while_others_load_and_unload_200_times(server: Any) -> None:
    jobs = [(NAMES[i % 8], f"w{5 + i} w{90 - i} w7") for i in range(32)]
    alone = {job: text_of(ask(server, *job)) for job in jobs}
    assert len(set(alone.values())) > 16  # adapters and prompts matter
    assert alone[jobs[3]] == by_generate(server, *jobs[3], 8)

    def churn() -> int:
        dice, changes = random.Random(0), 0
        while changes < 400:
            what = ("load", "unload")[changes % 2]
            status = post(server, what, dice.choice(NAMES))
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


def test_answers_have_openais_shape(server: Any) -> None:
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
    assert deltas[-1] == {"index": 0, "delta": {}, "finish_reason": "length"}
    assert len(deltas) > 4  # it came piece by piece
    assert {delta["finish_reason"] for delta in deltas[:-1]} == {None}
    body = {**chat("a1"), "max_completion_tokens": 2}
    del body["max_tokens"]
    shorter = server.client.post("/v1/chat/completions", json=body)
    assert text_of(shorter).split() == choice["message"]["content"].split()[:2]


def test_a_tokenizer_without_a_template_gets_the_contents(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", None)
    said = [{"role": "system", "content": "w5 w6"}, {"role": "user", "content": "w7"}]
    assert server.engine.encode(said) == [5, 6, 7]


def test_stop_seed_and_temperature(server: Any) -> None:
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


def test_null_is_a_field_that_was_not_given(server: Any) -> None:
    """OpenAI documents its optional fields as a value or null."""
    for field in ("max_tokens", "temperature", "top_p", "seed", "stop", "n", "stream"):
        text_of(ask(server, "a1", **{field: None}))
    said = [text_of(ask(server, "a1", temperature=None, top_p=None, seed=3)) for _ in range(2)]
    assert said == [text_of(ask(server, "a1", temperature=1.0, top_p=1.0, seed=3))] * 2


def test_models_are_listed_loaded_and_unloaded(server: Any) -> None:
    for name in [m["id"] for m in server.client.get("/v1/models").json()["data"][1:]]:
        assert post(server, "unload", name) == 200
    assert post(server, "load", "a3") == 200
    assert post(server, "load", "mine", lora_path="a4") == 200
    text_of(ask(server, "a5"))
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(m["id"], m.get("parent")) for m in listed["data"]] == [
        ("tiny", None),
        ("a3", "tiny"),
        ("mine", "tiny"),
        ("a5", "tiny"),
    ]
    assert text_of(ask(server, "mine")) == text_of(ask(server, "a4"))
    base = by_generate(server, None, "w5 w6 w7", 8)
    assert text_of(ask(server, "tiny")) == base != text_of(ask(server, "a4"))
    assert post(server, "unload", "mine") == 200
    assert post(server, "unload", "mine") == 404
    assert ask(server, "mine").status_code == 404
    assert post(server, "load", "tiny", lora_path="a1") == 400  # the base model's name
    assert post(server, "load", "broken") == 400
    assert ask(server, "broken").status_code == 400


def test_a_running_request_ends_with_the_adapter_that_it_began_with(server: Any) -> None:
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


@pytest.mark.parametrize(
    "path", ["../secret/x", "/etc", "a0/../../secret/x", "link", "linked", "", "a\0"]
)
def test_nothing_outside_the_folder_is_loaded(server: Any, path: str) -> None:
    root, secret = server.folder / "adapters", server.folder / "secret" / "x"
    with contextlib.suppress(FileExistsError):
        (root / "link").symlink_to(secret)
        (root / "linked").mkdir()
        (root / "linked" / "adapter_config.json").symlink_to(secret / "adapter_config.json")
    assert post(server, "load", "new", lora_path=path) == 400
    assert ask(server, path).status_code == 404
    assert post(server, "load", "new", lora_path=str(secret)) == 400


def test_bad_requests_are_refused_by_name_and_the_server_serves_on(server: Any) -> None:
    before = text_of(ask(server, "a1"))
    for fields, code, named in (
        ({"model": "nobody"}, 404, "nobody"),
        ({"model": "a1\ud800"}, 422, ""),
        ({"temperature": -1}, 422, "temperature"),
        ({"temperature": "hot"}, 422, "temperature"),
        ({"max_tokens": 0}, 422, "max_"),
        ({"max_tokens": 10_000}, 400, "max_new_tokens: expected at most 2048 tokens"),
        ({"n": 2}, 422, "n\n"),
        ({"logprobs": True}, 422, "logprobs"),
        ({"tools": []}, 422, "tools"),
        ({"stop": [""]}, 422, "stop"),
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


def test_bodies_above_the_limit_are_refused_with_and_without_a_length(server: Any) -> None:
    large = json.dumps(chat("a1", "w5 " * LIMIT)).encode()

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    for path in ("chat/completions", "load_lora_adapter", "unload_lora_adapter"):
        for content in (large, chunks()):
            response = server.client.post(f"/v1/{path}", content=content)
            assert response.status_code == 413
            assert response.json()["error"]["message"] == "body: expected at most 20000 bytes"
    body = json.dumps(chat("a1")).encode()
    exact = server.client.post("/v1/chat/completions", content=body.ljust(LIMIT))
    assert exact.status_code == 200
    assert server.client.post("/v1/chat/completions", content=body.ljust(LIMIT + 1)).is_error


def connect(server: Any, **fields: Any) -> socket.socket:
    """A client that has sent its request and has read nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((server.client.base_url.host, server.client.base_url.port))
    body = json.dumps(chat(**fields)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_a_client_that_goes_within_its_body_is_no_error_of_the_server(
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
def test_clients_that_go_end_their_requests(server: Any, stream: bool) -> None:
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


def test_slow_readers_stop_nobody(server: Any) -> None:
    """Their requests run to their ends, and others are served meanwhile."""
    expected = text_of(ask(server, "a1"))
    tokens = server.engine.stats()["tokens_total"]
    slow = [connect(server, model=f"a{i}", stream=True, max_tokens=900) for i in range(2)]
    assert [text_of(ask(server, "a1")) for _ in range(3)] == [expected] * 3
    settle(server)
    assert server.engine.stats()["tokens_total"] >= tokens + 2 * 900
    answer = b""
    while not answer.endswith(b"0\r\n\r\n"):
        answer += slow[0].recv(1 << 16)
    assert answer.rstrip().endswith(b"data: [DONE]\n\n\r\n0")
    for connection in slow:
        connection.close()


def test_a_full_queue_says_when_to_come_again(server: Any) -> None:
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


def test_metrics_are_lines_of_a_name_and_a_number(server: Any) -> None:
    text_of(ask(server, "a1"))
    assert ask(server, "nobody").status_code == 404
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = dict(line.rsplit(" ", 1) for line in response.text.splitlines())
    assert all(float(value) >= 0 for value in found.values())
    assert int(found["lora_ext_tokens_total"]) >= 8
    assert int(found['lora_ext_refused_total{code="404"}']) >= 1
    assert {"lora_ext_requests", "lora_ext_pool_pins"} <= set(found)


def test_the_server_is_on_the_loopback_and_says_when_it_is_ill(server: Any) -> None:
    """The last test: it ends the manager's thread."""
    assert server.host == "127.0.0.1" and server.port != 8000
    assert server.client.get("/health").json() == {"healthy": True}
    server.engine.manager.batch_processor.update_batch = None
    assert ask(server, "a1").status_code == 500
    assert ask(server, "a1").status_code == 500
    assert server.client.get("/health").status_code == 503
    assert server.engine.pool.stats()["pins"] == 0
