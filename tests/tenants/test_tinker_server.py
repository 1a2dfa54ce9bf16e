"""The Tinker server in examples/, tested with handwritten requests and, if installed, Tinker's
SDK."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("google.protobuf")

from service_held import held
from test_service import VOCAB, llama

from lora_ext.server.tinker import _wire
from lora_ext.tenants import Service

ROOT = Path(__file__).parents[2]

FB = _wire.messages["ForwardBackwardRequest"]
KEY = {"X-API-Key": "tml-a"}


class Server:
    """Server in a separate process that stores adapters in a folder."""

    def __init__(self, folder: Path, *more: str):
        self.model = str(folder / "model")
        command = [sys.executable, str(ROOT / "examples/tinker_server.py"), "--port", "0"]
        command += ["--model", self.model, "--store", str(folder / "store"), *more]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.match(r"listening on (http://\S+)", line)
        assert found, line
        self.url = found[1]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def post(self, path: str, body: Any, key: str = "tml-a") -> Any:
        given, kind = (
            (body, _wire.MIME)
            if isinstance(body, bytes)
            else (json.dumps(body).encode(), "application/json")
        )
        request = urllib.request.Request(
            f"{self.url}/api/v1/{path}", given, {"X-API-Key": key, "Content-Type": kind}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            data = answer.read()
            return data if _wire.MIME in answer.headers["content-type"] else json.loads(data)

    def get(self, promise: dict[str, Any], key: str = "tml-a") -> Any:
        return self.post("retrieve_future", {"request_id": promise["request_id"]}, key)

    def status(self, path: str, body: Any, key: str = "tml-a") -> int:
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.post(path, body, key)
        return caught.value.code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    keys = folder / "keys"
    keys.write_text("tml-a\ntml-b\n")
    made = Server(folder, "--keys", str(keys))
    yield made
    made.close()


def request(
    model: str, seq: int | None, tokens: list[int], loss: str = "cross_entropy", **inputs: Any
) -> bytes:
    message = FB(model_id=model, seq_id=seq, loss_fn=loss)
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.array(tokens[:-1], np.int32).tobytes()
    for name, values in {"target_tokens": tokens[1:], **inputs}.items():
        value = datum.loss_fn_inputs.add(key=name).value
        kind = np.int64 if name == "target_tokens" else np.float32
        value.dtype = 2 if name == "target_tokens" else 1
        value.dense = np.array(values, kind).tobytes()
        value.shape.append(len(values))
    return message.SerializeToString()


def losses(body: bytes) -> float:
    answer = _wire.messages["ForwardBackwardOutput"].FromString(body)
    return {each.key: each.value for each in answer.metrics}["loss:sum"]


def new_model(server: Server, key: str = "tml-a", **more: Any) -> str:
    session = server.post("create_session", {"tags": [], "sdk_version": "0"}, key)["session_id"]
    asked = {"session_id": session, "model_seq_id": 0, **more}
    if "path" in more:
        return server.get(server.post("load_weights", asked, key), key)["model_id"]
    asked |= {"base_model": server.model, "lora_config": {"rank": 4, "seed": 1}}
    return server.get(server.post("create_model", asked, key), key)["model_id"]


@pytest.mark.slow
def test_requests_train_save_load_and_sample(server: Server, folder: Path) -> None:
    assert server.status("create_session", {}, "tml-c") == 401
    model, tokens = new_model(server), [1, 2, 3, 4, 5]
    step = {"model_id": model, "seq_id": 2, "adam_params": {"learning_rate": 0.05}}
    second = server.post("optim_step", step)  # This call must wait for the call with number 1.
    third = server.post("forward_backward", request(model, 3, tokens))
    first = server.post("forward_backward", request(model, 1, tokens))
    assert server.post("forward_backward", request(model, 1, tokens)) == first
    assert "grad_norm:mean" in server.get(second)["metrics"]
    assert losses(server.get(third)) < losses(server.get(first))
    assert server.status("retrieve_future", first, "tml-b") == 410
    bad = server.post("forward_backward", request(model, 4, tokens, weights=[float("nan")] * 4))
    assert server.get(bad)["category"] == "user"
    assert server.status("forward_backward", request(model, 5, [1, VOCAB, 2])) == 400
    saved = server.get(server.post("save_weights", {"model_id": model, "seq_id": 6, "path": "a"}))
    assert saved["path"] == f"tinker://{model}/weights/a"
    out = {"model_id": model, "seq_id": 7, "path": "../../x"}
    assert server.status("save_weights", out) == 400
    last = losses(server.get(server.post("forward_backward", request(model, 8, tokens))))

    asked = {"model_id": model, "seq_id": 9, "sampling_session_seq_id": 0}
    session = server.get(server.post("save_weights_for_sampler", asked))["sampling_session_id"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": tokens}]}
    asked = {"sampling_session_id": session, "seq_id": 0, "num_samples": 2, "prompt": prompt}
    asked |= {"sampling_params": {"max_tokens": 3, "seed": 5}, "prompt_logprobs": True}
    promise = server.post("asample", asked)
    assert len(promise["sample_sequence_ids"]) == 2
    answer = _wire.messages["SampleResponse"].FromString(server.get(promise))
    assert [len(s.tokens) // 4 for s in answer.sequences] == [3, 3]
    of_prompt = np.frombuffer(answer.prompt_logprobs, np.float32)
    assert np.isnan(of_prompt[0]) and -of_prompt[1:].sum() == pytest.approx(last, abs=1e-4)

    other = {"session_id": "none", "model_seq_id": 0, "path": saved["path"]}
    assert server.status("load_weights", other) == 410
    with pytest.raises(KeyError):  # A checkpoint of another API key is not found.
        new_model(server, "tml-b", path=saved["path"])
    server.close()
    again = Server(folder)  # Without a key file, any key is accepted.
    try:
        assert again.status("retrieve_future", first) == 410
        loaded = new_model(again, path=saved["path"])
        found = losses(again.get(again.post("forward_backward", request(loaded, 1, tokens))))
        assert found == pytest.approx(last, abs=1e-5)
    finally:
        again.close()


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield the server app in this process. ``ask(path, body, key)`` returns ``(status code,
    JSON)``."""
    from starlette.testclient import TestClient

    from lora_ext.server import tinker

    with Service(llama(), store=tmp_path, queue=4) as service:
        with TestClient(tinker.make_app(service, "base", None)) as client:

            def ask(path: str, body: Any = None, key: str = "tml-a") -> tuple[int, Any]:
                how = {"content": body} if isinstance(body, bytes) else {"json": body or {}}
                found = client.post(f"/api/v1/{path}", headers={"X-API-Key": key}, **how)
                return found.status_code, found.json()

            def begun(key: str = "tml-a") -> str:
                session = ask("create_session", {}, key)[1]["session_id"]
                asked = {"session_id": session, "model_seq_id": 0, "base_model": "base"}
                promise = ask("create_model", {**asked, "lora_config": {"rank": 2}}, key)[1]
                return ask("retrieve_future", promise, key)[1]["model_id"]

            made = {"service": service, "store": tmp_path, "client": client}
            yield SimpleNamespace(ask=ask, begun=begun, **made)


def test_floods_are_answered_429_for_the_flooding_key_only(
    app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_ext.server.tinker import _promises

    monkeypatch.setattr(_promises, "MOST", 6)
    model, other = app.begun(), app.begun("tml-b")
    tokens = [1, 2, 3]
    # A call waits until all calls with smaller numbers have arrived. At most MOST calls may wait.
    codes = [app.ask("forward_backward", request(model, n, tokens))[0] for n in range(2, 11)]
    assert codes == [200] * 6 + [429] * 3
    # The queue of the tenant fills up while a long call runs.
    monkeypatch.setattr(_promises, "MOST", 100)
    with held(app.service):
        calls = [request(other, n, tokens) for n in range(1, 6)]
        codes = [app.ask("forward_backward", call, "tml-b")[0] for call in calls]
    assert codes == [200] * 4 + [429]
    session = other.partition(":")[0]
    # The session belongs to another key.
    assert app.ask("session_heartbeat", {"session_id": session})[0] == 410
    assert app.ask(f"sessions/{session}/finish")[0] == 410
    assert app.ask("session_heartbeat", {"session_id": session}, "tml-b")[0] == 200
    assert app.ask("telemetry", b"[]")[0] == app.ask("telemetry", b"{")[0] == 400
    assert 429 in [app.ask("create_session")[0] for _ in range(70)]
    assert app.ask("create_session", {}, "tml-b")[0] == 200


def test_calls_without_a_number_are_independent(app: Any) -> None:
    model = app.begun()

    def loss(number: int | None, tokens: list[int]) -> float:
        promise = app.ask("forward_backward", request(model, number, tokens))[1]
        body = json.dumps({"request_id": promise["request_id"]}).encode()
        return losses(app.client.post("/api/v1/retrieve_future", content=body, headers=KEY).content)

    first, second = [1, 2, 3], [7, 8, 9, 10, 11]
    expected = [loss(1, first), loss(2, second)]
    assert expected[0] != expected[1]
    assert [loss(None, first), loss(None, second)] == pytest.approx(expected, rel=1e-5)
    assert loss(1, second) == expected[0]  # A call with a repeated number is not run again.


def test_unreadable_bodies_are_answered_400(app: Any) -> None:
    model, deep = app.begun(), b"[" * 100_000
    for path in ("create_session", "optim_step", "retrieve_future"):
        code, answer = app.ask(path, deep)
        assert code == 400 and "nested less deeply" in answer["error"], answer
    routes = ("save_weights", "save_weights_for_sampler", "optim_step", "get_info", "unload_model")
    for path in routes:
        code, answer = app.ask(path, {"model_id": None, "path": "a"})
        assert (code, answer["error"]) == (400, "model_id: expected a value, found none"), path
    kept = {"model_id": model, "path": "a", "optimizer": None, "overwrite": None, "seq_id": None}
    assert app.ask("save_weights", kept)[0] == 200  # null counts as a missing field


def test_answers_do_not_reveal_the_path_of_the_store(app: Any, tmp_path: Path) -> None:
    model, answers = app.begun(), []
    long, owner = "n" * 300, f"tinker://{model}/weights"
    for path, asked in (
        ("save_weights", {"path": long}),
        ("save_weights", {"path": long, "overwrite": False}),
        ("save_weights", {"path": "a\ud800"}),
        ("load_weights", {"path": f"{owner}/{long}"}),
        ("load_weights", {"path": f"{owner}/missing"}),
        ("weights_info", {"tinker_path": f"{owner}/missing"}),
    ):
        code, answer = app.ask(path, json.dumps({"model_id": model, **asked}).encode())
        answers.append((path, code, answer))
        if code == 200:
            answers.append((path, *app.ask("retrieve_future", answer)))
    assert all(code in (200, 400) for _, code, _ in answers), answers
    saved = app.ask("save_weights", {"model_id": model, "path": "damaged"})[1]
    assert app.ask("retrieve_future", saved)[1]["path"] == f"{owner}/damaged"
    (config,) = app.store.glob("*/*/weights/damaged/adapter_config.json")
    config.write_text("{")
    for path in ("load_weights", "weights_info", "create_sampling_session"):
        asked = {"path": f"{owner}/damaged", "tinker_path": f"{owner}/damaged"}
        asked |= {"model_path": f"{owner}/damaged", "session_id": model.partition(":")[0]}
        answer = app.ask(path, {**asked, "model_id": model, "sampling_session_seq_id": 0})
        answers.append((path, *answer))
        if answer[0] == 200:
            answers.append((path, *app.ask("retrieve_future", answer[1])))
    errors = [answer["error"] for _, _, answer in answers if "error" in answer]
    assert len(errors) == 9, answers
    assert not [error for error in errors if str(tmp_path) in error or "/tmp" in error], errors


@pytest.mark.parametrize(
    ("root", "message", "expected"),
    [
        ("/data", "/data/a/b: no such folder", "a/b: no such folder"),
        ("/data", "'/data', /data or /data", "'the store', the store or the store"),
        ("/data", "/database/x and /data-2/y and /srv/data/z", None),
        ("/data", "/data.bak/x", None),
        ("/", "base/model: /x/y and 1/2", None),
    ],
)
def test_only_the_complete_path_of_the_store_is_replaced_in_a_message(
    root: str, message: str, expected: str | None
) -> None:
    from lora_ext.server.tinker._api import Api

    service: Any = SimpleNamespace(store=SimpleNamespace(root=Path(root)))
    words = Api(service, "base").words_of(ValueError(message))
    assert words == (message if expected is None else expected)


def wrong_fields(model: str) -> list[tuple[str, dict[str, Any], str]]:
    """Return the path and body of wrong requests, with the field that the answer must name."""
    begins = {"session_id": model.partition(":")[0], "model_seq_id": 1, "base_model": "base"}
    step = {"model_id": model}  # runs immediately, since it has no number
    prompt = {"chunks": [{"tokens": [1, 2, 3]}]}
    sample = {"base_model": "base", "prompt": prompt, "sampling_params": {"max_tokens": 1}}
    numbers = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
    draws = ("temperature", "top_p", "top_k", "seed", "max_tokens")
    posts = ("optim_step", "save_weights")
    nan = float("nan")
    return [
        *(
            ("optim_step", {**step, "adam_params": {name: value}}, name)
            for name in numbers
            for value in ("1", -1, nan, [1])
        ),
        *(
            ("asample", {**sample, "sampling_params": {name: value}}, name)
            for name in draws
            for value in ("1", {}, -2.5, nan)
        ),
        *(
            ("asample", {**sample, "prompt": value}, "prompt")
            for value in (1, [], {"chunks": 1}, {"chunks": [1]}, {"chunks": [{"tokens": 1}]})
        ),
        *(("asample", {**sample, "num_samples": value}, "num_samples") for value in (0, "1", 1.5)),
        *(
            (path, {**step, "model_id": value}, "model_id")
            for path in posts
            for value in (1, [], {})
        ),
        *(
            (path, {**step, "seq_id": value}, "seq_id")
            for path in posts
            for value in ("1", [], 1.5)
        ),
        ("optim_step", {"adam_params": {}}, "model_id"),
        ("asample", {"base_model": "base"}, "prompt"),
        ("asample", {**sample, "model_path": "weights/a"}, "model_path"),
        ("weights_info", {"tinker_path": "a"}, "tinker_path"),
        ("load_weights", {**step, "path": "a"}, "path"),
        ("create_model", {**begins, "lora_config": [1]}, "lora_config"),
        ("create_model", {**begins, "base_model": "another"}, "base_model"),
        ("retrieve_future", {}, "request_id"),
    ]


@pytest.mark.slow
def test_wrong_fields_are_refused_by_their_names_in_the_protocol(app: Any) -> None:
    model, tokens = app.begun(), [1, 2, 3]
    for path, body, field in wrong_fields(model):
        code, answer = app.ask(path, json.dumps(body).encode())  # json.dumps allows NaN
        named = answer["error"].partition(": expected")[0]
        assert code == 400 and field in named, (path, body, answer)
    cases: Any = (
        ("dro", {}, "loss_fn"),
        ("cross_entropy", {"zz": [1.0] * 2}, "data[0].loss_fn_inputs"),
        ("ppo", {}, "data[0].loss_fn_inputs"),
    )
    for number, (loss, inputs, field) in enumerate(cases, 1):
        code, answer = app.ask("forward_backward", request(model, number, tokens, loss, **inputs))
        assert code == 400 and answer["error"].startswith(f"forward_backward: {field}: "), answer
    begins = {"session_id": model.partition(":")[0], "model_seq_id": 1, "base_model": "base"}
    for lora, field in (
        ({"rank": 0}, "rank"),
        ({"rank": "4"}, "rank"),
        ({"seed": 0.5}, "seed"),
        ({"train_attn": False, "train_mlp": False}, "train_attn, train_mlp"),
    ):
        promise = app.ask("create_model", {**begins, "lora_config": lora})[1]
        answer = app.ask("retrieve_future", promise)[1]
        assert answer["category"] == "user" and f": {field}: expected" in answer["error"], answer
    # The rejected calls must not have changed the state.
    assert app.ask("forward_backward", request(model, 4, tokens))[0] == 200


def test_server_arguments_are_checked_before_the_model_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_ext.server import tinker

    model, store = ["--model", str(folder / "model")], ["--store", str(folder / "store")]
    (folder / "file").write_text("")
    for given, named in (
        (["--model", "nowhere", *store], "--model: expected a folder"),
        ([*model, "--store", str(folder / "file")], "file: "),
        ([*model, *store, "--port", "70000"], "--port: expected 0 to 65535"),
        ([*model, *store, "--keys", "nowhere"], "nowhere: No such file"),
    ):
        with pytest.raises(SystemExit):
            tinker.main(given)
        assert named in capsys.readouterr().err
    with pytest.raises(TypeError, match="make_app: keys: expected a set"):
        with Service(llama()) as service:
            tinker.make_app(service, "base", "tml-a")  # pyright: ignore[reportArgumentType]


def test_idle_and_finished_sessions_are_saved(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_ext.server.tinker import app as routes

    ended, silent = app.begun(), app.begun()
    assert app.ask(f"sessions/{ended.partition(':')[0]}/finish")[0] == 200
    monkeypatch.setattr(routes, "SILENCE", 0.2)
    for model in (ended, silent):
        deadline = time.monotonic() + 60
        folders = f"*/{model.replace(':', '-')}/weights/last/adapter_config.json"
        while not list(app.store.glob(folders)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(app.store.glob(folders))
        step = {"model_id": model, "seq_id": 1}
        assert app.ask("optim_step", step)[0] == 410


SCRIPT = """
import sys, tinker
from tinker import types
service = tinker.ServiceClient()
client = service.create_lora_training_client(base_model=sys.argv[1], rank=4, seed=1).result()
tokens = [1, 2, 3, 4, 5]
prompt = types.ModelInput.from_ints(tokens[:-1])
data = [types.Datum(model_input=prompt, loss_fn_inputs={"target_tokens": tokens[1:]})] * 3
losses = []
for _ in range(3):
    call = client.forward_backward(data, "cross_entropy")
    step = client.optim_step(types.AdamParams(learning_rate=1e-2))
    losses.append(call.result().metrics["loss:sum"])
    step.result()
assert losses[2] < losses[1] < losses[0], losses
sampler = client.save_weights_and_get_sampling_client()
sampler = sampler.result() if hasattr(sampler, "result") else sampler
answer = sampler.sample(prompt, 2, types.SamplingParams(max_tokens=4, seed=3)).result()
assert [len(s.tokens) for s in answer.sequences] == [4, 4]
print("ok", client.save_state("a").result().path)
"""


COOKBOOK = """
import asyncio, json, pathlib, sys, chz, tinker
from tinker_cookbook.supervised import train, types
tokens = [1, 2, 3, 4, 5, 6]
datum = tinker.Datum(
    model_input=tinker.ModelInput.from_ints(tokens[:-1]),
    loss_fn_inputs={"target_tokens": tokens[1:], "weights": [0.0, 1.0, 1.0, 1.0, 1.0]},
)
class Same(types.SupervisedDataset):
    def get_batch(self, index): return [datum] * 3
    def __len__(self): return 6
    def set_epoch(self, seed=0): pass
@chz.chz
class Builder(types.SupervisedDatasetBuilder):
    def __call__(self): return Same(), Same()
log = pathlib.Path(sys.argv[2])
asyncio.run(train.main(train.Config(
    log_path=str(log), model_name=sys.argv[1], recipe_name="same", dataset_builder=Builder(),
    learning_rate=1e-2, lora_rank=4, save_every=3, eval_every=3,
)))
rows = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
nll = [row["train_mean_nll"] for row in rows if "train_mean_nll" in row]
assert len(nll) == 6 and nll[-1] < nll[0] - 0.5, nll
saved = [json.loads(line) for line in (log / "checkpoints.jsonl").read_text().splitlines()]
assert len(saved) >= 2 and saved[-1]["state_path"].startswith("tinker://"), saved
print("ok", saved[-1]["state_path"])
"""


def run_client(folder: Path, script: str, *more: str) -> None:
    """Run ``script`` in another process, which gets only the address of the server."""
    server = Server(folder)
    try:
        env = {**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local"}
        env |= {"TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", script, server.model, *more]
        run = subprocess.run(command, env=env, capture_output=True, text=True)
        assert run.returncode == 0 and "ok tinker://" in run.stdout, run.stderr
    finally:
        server.close()


def installed(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(
            f"{name} is not installed: the SDK and flwr need different versions of protobuf"
        )


def test_unmodified_tinker_sdk_trains(folder: Path) -> None:
    installed("tinker")
    run_client(folder, SCRIPT)


def test_supervised_loop_of_the_tinker_cookbook_trains_evaluates_and_saves(folder: Path) -> None:
    installed("tinker_cookbook")
    letters = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, "w0")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(letters))
    fast.save_pretrained(folder / "model")
    run_client(folder, COOKBOOK, str(folder / "log"))
