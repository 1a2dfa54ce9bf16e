"""``lora-ext serve`` as a program: its arguments, and how it ends."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import ROOT, needs
from served import chat, needs_packages, save_model

from lora_ext import cli

pytestmark = needs_packages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("program")
    save_model(found)
    return found


def test_arguments_are_checked_before_the_model_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    model, adapters = ["--model", str(folder / "tiny")], ["--adapters", str(folder / "adapters")]
    bad = folder / "bad"
    bad.mkdir()
    # An attempt to load this model would give another message.
    (bad / "config.json").write_text("{}")
    for given, named in (
        ([], "--model, --adapters"),
        (["--model", "nowhere", *adapters], "--model: expected a folder, found 'nowhere'"),
        (["--model", str(folder), *adapters], "--model: expected a folder of a transformers model"),
        ([*model, "--adapters", "nowhere"], "--adapters: expected a folder, found 'nowhere'"),
        (["--model", str(bad), *adapters, "--port", "70000"], "--port: expected 0 to 65535"),
        (["--model", str(bad), *adapters, "--port", "x"], "--port"),
        (["--model", str(bad), *adapters, "--max-rank", "0"], "--max-rank: expected at least 1"),
        (["--model", str(bad), *adapters, "--pack", "16"], "--pack"),
        (
            ["--model", str(bad), *adapters, "--device", "abacus"],
            "--device: expected a device of this machine",
        ),
        (
            ["--model", str(bad), *adapters, "--port", str(taken.getsockname()[1])],
            "--host, --port: expected a free address",
        ),
    ):
        try:
            status = cli.main(["serve", *given])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        assert (status, out) == (2, "") and named in err, err
        assert err.startswith("lora-ext serve: ") and err.count("\n") == 1
    taken.close()


def test_ctrl_c_ends_a_server_even_if_the_shell_ignores_the_signal() -> None:
    import uvicorn

    from lora_ext.server._running import run

    async def nothing(scope: object, receive: object, send: object) -> None: ...

    config = uvicorn.Config(nothing, lifespan="off", log_level="warning")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        listening = socket.create_server(("127.0.0.1", 0))
        with listening, pytest.raises(KeyboardInterrupt):
            run(config, listening, lambda: signal.raise_signal(signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("paused", [False, True])
def test_ctrl_c_ends_streams_with_an_error_and_no_traceback(folder: Path, paused: bool) -> None:
    """Check two clients; one of them does not read, and is disconnected."""
    command = [sys.executable, "-m", "lora_ext", "serve", "--port", "0"]
    arguments = ["--model", str(folder / "tiny"), "--adapters", str(folder / "adapters")]
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        # A shell starts its background jobs with this signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
    reader.start()
    try:
        # The first line reports the packing, the second line the address.
        told = process.stdout.readline() + process.stdout.readline()
        place = re.search(r"answers at http://127\.0\.0\.1:(\d+)/v1", told)
        assert place, told + "".join(errors)
        body = json.dumps(chat("a1", stream=True, max_tokens=1900)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        reads, waits = (socket.create_connection(("127.0.0.1", int(place[1]))) for _ in range(2))
        for connection in (waits, reads):
            connection.sendall(head.encode() + b"\r\n" + body)
            found = connection.recv(1 << 12)
        if paused:
            url = f"http://127.0.0.1:{place[1]}/pause?mode=keep"
            urllib.request.urlopen(urllib.request.Request(url, method="POST")).close()
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        while more := reads.recv(1 << 16):
            found += more
        took = time.monotonic() - begin
        status = process.wait(120)  # Python may take long on a busy machine.
        reads.close()
        waits.close()
    finally:
        process.kill()
        reader.join()
    assert status == 130 and "Traceback" not in "".join(errors), "".join(errors)
    assert errors[-1] == "lora-ext serve: interrupted\n"
    assert took < 2
    *_, error, done = re.findall(rb"data: (.*)", found)
    told = json.loads(error)["error"]
    assert done.strip() == b"[DONE]" and told["message"].endswith("server is stopping")


@contextlib.contextmanager
def program(folder: Path, *flags: str) -> Iterator[Any]:
    """Yield a client of ``lora-ext serve`` in another process."""
    import httpx

    command = [sys.executable, "-m", "lora_ext", "serve", "--port", "0", *flags]
    command += ["--model", str(folder / "tiny"), "--adapters", str(folder / "adapters")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            places = (re.search(r"answers at (http://\S+)/v1", line) for line in process.stdout)
            place = next(filter(None, places))
            with httpx.Client(base_url=place[1], timeout=60) as client:
                yield client
        finally:
            process.terminate()


def keys(value: Any) -> Any:
    """Return the structure of a JSON value: the keys of its objects."""
    if isinstance(value, list):
        return [keys(each) for each in value]
    return {key: keys(each) for key, each in value.items()} if isinstance(value, dict) else None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_lines_of_the_page_run_as_they_stand(folder: Path, tmp_path: Path) -> None:
    """Run the page's lines in one shell, with another port, and compare their output."""
    page = (ROOT / "docs" / "serving.md").read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```", page, re.S | re.M)
    (block,) = [each for each in fenced if each.startswith("$ lora-ext serve")]
    parts = re.split(r"^\$ ", block, flags=re.M)[1:]
    pairs = [re.match(r"(ask='[^']*'|[^\n]*)(.*)", part, re.S) for part in parts]
    commands, told = zip(*((each[1], each[2].strip()) for each in pairs if each), strict=True)
    (tmp_path / "smollm2").symlink_to(folder / "tiny")
    (tmp_path / "adapters").mkdir()
    for name, path in (("pirate", "a1"), ("telegram", "a2")):
        shutil.copytree(folder / "adapters" / path, tmp_path / "adapters" / name)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first, *rest = commands
    script = f"""
        lora-ext() {{ exec {sys.executable} -m lora_ext "$@" --port {port} &> log; }}
        curl() {{ command curl "${{@//localhost:8000/localhost:{port}}}"; }}
        {first}
        trap "kill $!" EXIT
        until command curl -sf localhost:{port}/health; do sleep 0.1; done
    """
    script += "".join(f"\necho; echo =====\n{command}" for command in rest)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    _, asked, chat, other, stream, load = map(str.strip, done.stdout.split("====="))
    log = (tmp_path / "log").read_text()
    assert "smollm2 with 2 adapters answers at" in log and asked == done.stderr == "", log
    assert keys(json.loads(chat)) == keys(json.loads(told[2].replace("\n", "")))
    assert json.loads(other)["model"] == "telegram"
    assert stream.startswith("data: {") and stream.endswith("data: [DONE]")
    assert load == told[-1]


@pytest.mark.slow
@needs("httpx", "peft")
def test_logprobs_of_an_exact_server_have_the_bits_of_another_process(folder: Path) -> None:
    """Compare a batch of samples, before and after new weights, with forwards of a trainer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_ext import exact, from_peft

    prompts = [[5 + i * i % 90 for i in range(150)], [5, 6, 7], [7] * 70]
    how = {"temperature": 1, "max_tokens": 20, "logprobs": 0, "return_token_ids": True}
    found: list[tuple[str, dict[str, Any]]] = []
    with program(folder, "--exact") as client, ThreadPoolExecutor(4) as clients:

        def ask(asked: tuple[str, int]) -> dict[str, Any]:
            name, generation = asked
            body = {"model": name, "prompt": prompts, "adapter_generation": generation, **how}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["adapter_generation"] == generation
            return answer.json()

        def load(path: str) -> int:
            body = {"lora_name": "policy", "lora_path": path, "load_inplace": True}
            return client.post("/v1/load_lora_adapter", json=body).json()["adapter_generation"]

        for path in ("a1", "a9"):
            asked = [("policy", load(path))] * 2  # the second request reads pages of the first
            other = client.post("/v1/load_lora_adapter", json={"lora_name": "a12"}).json()
            asked += [("a12", other["adapter_generation"])] * 2
            names = [path, path, "a12", "a12"]
            found += zip(names, clients.map(ask, asked), strict=True)
    trainers: dict[str, Any] = {}
    for name in ("a1", "a9", "a12"):
        base = AutoModelForCausalLM.from_pretrained(folder / "tiny")
        peft_model = PeftModel.from_pretrained(base, folder / "adapters" / name)
        trainers[name] = exact(from_peft(peft_model).eval())
    draws = set()
    for name, answer in found:
        for choice in answer["choices"]:
            prompt, tokens = choice["prompt_token_ids"], choice["token_ids"]
            draws.add(tuple(tokens))
            with torch.no_grad():
                logits = trainers[name](torch.tensor([prompt + tokens])).logits[0]
            expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            expected = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            logprobs = torch.tensor(choice["logprobs"]["token_logprobs"])
            assert logprobs.equal(expected), (name, len(prompt))
    assert len(found) == 8 and len(draws) == 24  # samples, not the most likely tokens
