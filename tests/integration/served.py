"""``lora-ext serve`` in a thread with a tiny model, and the requests of its tests."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripts import needs
from tiny import make_model, make_peft, word_tokenizer

needs_packages = needs("fastapi", "uvicorn", "httpx")

SPECIAL = {"unknown": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
NAMES = [f"a{i}" for i in range(8)]
MANY = [*NAMES, *(f"a{i}" for i in range(8, 16))]
LIMIT = 20_000  # bytes; the server's --max-body
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} {% endfor %}"
    "{% if messages[0].role == 'nobody' %}{{ raise_exception('no such role') }}{% endif %}"
    "<|assistant|>"
)


def save_model(folder: Path) -> None:
    """Save a tiny random Llama, a tokenizer of the words w5 to w96, and sixteen adapters."""
    marks = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
    words = {word: i for i, word in enumerate([*marks, *(f"w{i}" for i in range(5, 97))])}
    tokenizer = word_tokenizer(words, **SPECIAL)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tiny")
    model = make_model("llama")
    model.config.max_position_embeddings = 2048
    model.save_pretrained(folder / "tiny")
    configs = {
        name: {"r": 2 + i, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        for i, name in enumerate(MANY)
    }
    make_peft(make_model("llama"), configs).save_pretrained(folder / "adapters")
    make_peft(make_model("llama"), {"x": configs["a0"]}).save_pretrained(folder / "secret")
    (folder / "adapters" / "broken").mkdir()
    (folder / "adapters" / "broken" / "adapter_config.json").write_text("{")


@contextlib.contextmanager
def serving(folder: Path, **how: Any) -> Iterator[Any]:
    """Yield a client for a server of a new model in ``folder``, which runs in a separate thread."""
    import httpx

    from lora_ext.server import Settings, _running, serve

    save_model(folder)
    started, found = threading.Event(), {}
    kind, make = _running._Server, _running.make_app

    def make_app(engine: Any, *given: Any) -> Any:
        found["engine"] = engine
        return make(engine, *given)

    def make_server(*given: Any) -> Any:
        return found.setdefault("server", kind(*given))

    def say(line: str) -> None:
        found.setdefault("said", []).append(line)
        if " answers at " in line:
            started.set()

    how = {"port": 0, "max_body": LIMIT, **how}
    settings = Settings(folder / "tiny", folder / "adapters", **how)
    thread = threading.Thread(target=serve, args=(settings, say))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_running, "make_app", make_app)
        patch.setattr(_running, "_Server", make_server)
        thread.start()
        assert started.wait(60)
    url = found["said"][-1].split()[-1].removesuffix("/v1")
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=url, timeout=60, limits=limits) as client:
        try:
            yield SimpleNamespace(client=client, folder=folder, **found)
        finally:
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
    """Wait until no request runs, and check that no adapter is pinned then."""
    end = time.monotonic() + 20
    while server.engine.requests and time.monotonic() < end:
        time.sleep(0.02)
    assert server.engine.requests == 0
    assert server.engine.pool.stats()["pins"] == 0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def pause(server: Any) -> None:
    found = server.client.post("/pause", params={"mode": "keep"})
    assert (found.status_code, found.json()) == (200, {"status": "paused"})


def resume(server: Any) -> None:
    found = server.client.post("/resume")
    assert (found.status_code, found.json()) == (200, {"status": "resumed"})


def by_generate(server: Any, name: str | None, words: str, count: int) -> str:
    ids = torch.tensor([server.engine.encode([{"role": "user", "content": words}])])
    how = {"max_new_tokens": count, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
    out = server.engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), adapter_names=[name], **how
    )
    return server.engine.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def connect(server: Any, path: str = "/v1/chat/completions", **fields: Any) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((server.client.base_url.host, server.client.base_url.port))
    body = json.dumps(chat(**fields) if "chat" in path else fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection
