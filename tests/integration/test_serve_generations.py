"""``lora-ext serve`` while adapters change: generations, shared pages, and pauses."""

import concurrent.futures
import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scripts import needs
from served import (
    ask,
    chat,
    connect,
    needs_packages,
    pause,
    post,
    resume,
    said,
    save_model,
    serving,
    settle,
    streamed,
    text_of,
    until,
)
from tiny import make_model, make_peft

pytestmark = needs_packages

LONG = " ".join(f"w{5 + i % 90}" for i in range(200))  # several pages of 64 tokens


@pytest.fixture(autouse=True)
def mine_is_not_loaded_later(server: Any) -> Iterator[None]:
    yield
    post(server, "unload", "mine")


def load(server: Any, path: str, **fields: Any) -> int:
    body = {"lora_name": "mine", "lora_path": path, **fields}
    found = server.client.post("/v1/load_lora_adapter", json=body)
    assert found.status_code == 200, found.text
    return found.json()["adapter_generation"]


def models(server: Any) -> dict[str, Any]:
    return {each["id"]: each for each in server.client.get("/v1/models").json()["data"]}


def test_every_load_has_a_larger_generation_that_answers_contain(server: Any) -> None:
    seen: list[int] = []
    for path, fields in (
        ("a1", {}),
        ("a2", {"load_inplace": True}),
        ("a2", {"load_inplace": False}),
        ("a3", {"load_inplace": None}),
    ):
        seen.append(load(server, path, **fields))
        assert ask(server, "mine").json()["adapter_generation"] == seen[-1]
        assert {event["adapter_generation"] for event in streamed(server, "mine")} == {seen[-1]}
        assert models(server)["mine"]["adapter_generation"] == seen[-1]
        assert text_of(ask(server, "mine")) == text_of(ask(server, path))
    assert post(server, "unload", "mine") == 200
    seen.append(load(server, "a1"))
    body = {"model": "mine", "prompt": "w5", "max_tokens": 1}
    found = server.client.post("/v1/completions", json=body).json()
    assert found["adapter_generation"] == seen[-1]
    assert seen == sorted(set(seen))


def test_base_model_and_absent_adapters_have_no_generation(server: Any) -> None:
    assert ask(server, "tiny").json()["adapter_generation"] is None
    post(server, "unload", "a7")
    found = models(server)
    assert found["tiny"]["adapter_generation"] is found["a7"]["adapter_generation"] is None
    assert {each["max_model_len"] for each in found.values()} == {2048}
    assert server.client.get("/v1/models/a7").json() == found["a7"]


def test_request_for_a_generation_that_is_gone_returns_409(server: Any) -> None:
    old = load(server, "a1")
    expected = text_of(ask(server, "mine", adapter_generation=old))
    assert expected == text_of(ask(server, "a1"))
    new = load(server, "a2", load_inplace=True)
    assert text_of(ask(server, "mine", adapter_generation=new)) == text_of(ask(server, "a2"))
    for fields in ({"adapter_generation": old}, {"adapter_generation": old, "stream": True}):
        gone = ask(server, "mine", **fields)
        assert gone.status_code == 409, gone.text
        told = gone.json()["error"]
        assert told["code"] == 409
        assert f"generation: expected {new}, the current one, found {old}" in told["message"]
    for value, code in (("1", 422), (1.5, 422), (-1, 422)):
        refused = ask(server, "mine", adapter_generation=value)
        assert refused.status_code == code
        assert "adapter_generation" in refused.json()["error"]["message"]
    refused = ask(server, "tiny", adapter_generation=1)
    assert refused.status_code == 400
    assert "adapter_generation: expected None" in refused.json()["error"]["message"]
    settle(server)


def test_running_stream_keeps_the_generation_that_it_began_with(server: Any) -> None:
    old = load(server, "a1")
    body = chat("mine", stream=True, max_tokens=300)
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        next(lines)
        new = load(server, "a2")
        assert ask(server, "mine", max_tokens=1).json()["adapter_generation"] == new
        assert {json.loads(line[6:])["adapter_generation"] for line in lines} == {old}
    settle(server)


def test_shared_pages_are_not_reused_after_new_weights(server: Any) -> None:
    """Check that the second request of a generation reads pages, and the first computes them."""

    def added(path: str) -> int:
        before = computed(server)
        assert text_of(ask(server, "mine", LONG)) == expected[path]
        return computed(server) - before

    expected = {path: text_of(ask(server, path, LONG)) for path in ("a1", "a2", "a3")}
    assert len(set(expected.values())) == 3
    for path in ("a1", "a2", "a3", "a1"):
        load(server, path)
        first, second = added(path), added(path)
        assert first > 200 and second < first - 128  # the second request shares at least two pages
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for path in ("a2", "a3") * 2:
            generation, before = load(server, path), computed(server)
            pause(server)  # so that all requests begin before the first one has computed a page
            asked = [threads.submit(ask, server, "mine", LONG) for _ in range(8)]
            until(lambda: server.engine.requests == 8)
            resume(server)
            answers = [each.result() for each in asked]
            assert {text_of(answer) for answer in answers} == {expected[path]}
            assert {answer.json()["adapter_generation"] for answer in answers} == {generation}
            # One request computes the new pages, and the others wait for it.
            assert computed(server) - before < 500
    settle(server)


def test_absolute_paths_and_folders_with_a_dot_are_loaded(server: Any) -> None:
    root = server.folder / "adapters"
    shutil.copytree(root / "a5", root / ".vllm_lora" / "policy-v1")
    expected = text_of(ask(server, "a5"))
    for path in (root / ".vllm_lora" / "policy-v1", ".vllm_lora/policy-v1", root / "a5"):
        load(server, str(path))
        assert text_of(ask(server, "mine")) == expected
    assert post(server, "load", "mine", lora_path=str(root)) == 400
    assert post(server, "load", "mine", lora_path=str(root / "nothing")) == 404
    assert post(server, "load", "mine", lora_path="a5", load_inplace="yes") == 422


def computed(server: Any) -> int:
    return server.engine.manager.__dict__["_lora_ext_requests"].computed


def test_pause_holds_running_requests_and_new_ones_wait(server: Any) -> None:
    expected = [text_of(ask(server, "a1", max_tokens=300)), text_of(ask(server, "a2"))]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        start = computed(server)
        running = threads.submit(streamed, server, "a1", max_tokens=300)
        until(lambda: computed(server) > start)
        pause(server)
        pause(server)  # a second pause changes nothing
        assert server.client.get("/is_paused").json() == {"is_paused": True}
        before = computed(server)
        waiting = [threads.submit(ask, server, "a2") for _ in range(3)]
        until(lambda: server.engine.requests == 4)
        generation = load(server, "a3")  # an adapter can be loaded during a pause
        assert server.client.get("/health").status_code == 200
        time.sleep(0.3)
        assert computed(server) == before and not running.done()
        assert not any(each.done() for each in waiting)
        resume(server)
        assert said(running.result()) == expected[0]
        assert {text_of(each.result()) for each in waiting} == {expected[1]}
    resume(server)  # a resume without a pause changes nothing
    assert server.client.get("/is_paused").json() == {"is_paused": False}
    assert ask(server, "mine").json()["adapter_generation"] == generation
    settle(server)


def test_idle_server_can_be_paused(server: Any) -> None:
    settle(server)
    for _ in range(3):
        pause(server)
        before = computed(server)
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(ask, server, "a1")
            until(lambda: server.engine.requests == 1)
            time.sleep(0.15)
            assert computed(server) == before
            resume(server)
            text_of(waiting.result())


def test_client_that_disconnects_during_a_pause_is_cancelled(server: Any) -> None:
    connection = connect(server, model="a1", stream=True, max_tokens=1900)
    assert connection.recv(64)
    pause(server)
    try:
        connection.close()
        settle(server)
    finally:
        resume(server)
    text_of(ask(server, "a1"))


def complete(server: Any, model: str, *prompts: list[int], **fields: Any) -> Any:
    body = {"model": model, "prompt": [*prompts], "temperature": 0, "max_tokens": 6, **fields}
    return server.client.post("/v1/completions", json=body)


TOKENS = [5 + i * 7 % 90 for i in range(200)]


def test_choices_of_a_request_that_waits_during_a_load_use_one_generation(server: Any) -> None:
    load(server, "a4")
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        pause(server)
        waiting = threads.submit(
            complete, server, "mine", TOKENS, TOKENS
        )  # the second request shares pages
        until(lambda: server.engine.requests == 2)
        time.sleep(0.2)
        generation = load(server, "a7")
        resume(server)
        found = waiting.result().json()
    expected = complete(server, "a7", TOKENS).json()["choices"][0]["text"]
    assert found["adapter_generation"] == generation
    assert [choice["text"] for choice in found["choices"]] == [expected, expected]
    settle(server)


def test_request_whose_adapter_never_stays_is_refused(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, count = server.engine.begin, []

    async def begin_and_load(*given: Any, **how: Any) -> Any:
        stream = await begin(*given, **how)
        count.append(server.engine.folder.load("mine", "a5"))
        return stream

    load(server, "a4")
    monkeypatch.setattr(server.engine, "begin", begin_and_load)
    found = complete(server, "mine", TOKENS, TOKENS[:9])
    assert found.status_code == 409, found.text
    expected = "model: expected an adapter that does not change while its requests start, found 8"
    assert found.json()["error"]["message"] == f"{expected} changes"
    assert len(count) == 16
    assert complete(server, "mine", TOKENS).status_code == 200
    settle(server)


def test_client_that_disconnects_before_its_requests_begin_is_cancelled(server: Any) -> None:
    pause(server)
    try:
        connection = connect(
            server, "/v1/completions", model="a1", prompt=[TOKENS, TOKENS], echo=True, logprobs=1
        )
        until(lambda: server.engine.requests == 2)
        connection.close()
        settle(server)
    finally:
        resume(server)


def test_prompt_without_the_invocation_is_refused_with_a_field_of_the_request(server: Any) -> None:
    config = {"r": 2, "target_modules": ["q_proj"], "alora_invocation_tokens": [7, 8]}
    model = make_peft(make_model("llama"), {"act": config})
    model.save_pretrained(server.folder / "adapters")
    assert complete(server, "act", [*TOKENS, 7, 8, 9]).status_code == 200
    pause(server)
    try:
        found = complete(server, "act", TOKENS)
    finally:
        resume(server)
    assert found.status_code == 400
    expected = "expected the invocation [7, 8] of adapter 'act', found none in it"
    assert found.json()["error"]["message"] == f"begin: prompt: {expected}"
    found = ask(server, "act")
    assert found.json()["error"]["message"].startswith("begin: messages: expected the invocation")
    settle(server)


def test_wrong_prompt_is_refused_while_the_others_wait(server: Any) -> None:
    pause(server)
    try:
        found = complete(server, "a1", TOKENS, TOKENS, TOKENS * 15)
        assert found.status_code == 400
        assert found.json()["error"]["message"].startswith("begin: prompt: expected fewer than")
        settle(server)
    finally:
        resume(server)


def test_every_prompt_ends_at_its_stop_text(server: Any) -> None:
    first, second = TOKENS, TOKENS[:50]
    texts = [
        complete(server, "a1", p, max_tokens=30).json()["choices"][0]["text"]
        for p in (first, second)
    ]
    stop = next(word for word in texts[1].split() if word not in texts[0].split())
    before = computed(server)
    found = complete(server, "a1", first, second, max_tokens=400, stop=stop).json()["choices"]
    assert found[1]["finish_reason"] == "stop"
    assert computed(server) - before < 250 + 500  # not 250 + 800: the second one ends early


@pytest.mark.parametrize("mode", [None, "abort", "wait", "stop"])
def test_other_modes_of_pause_are_refused(server: Any, mode: str | None) -> None:
    found = server.client.post("/pause", params={} if mode is None else {"mode": mode})
    assert found.status_code == 400
    told = found.json()["error"]["message"]
    assert told == f"mode: expected 'keep', found {mode!r}"
    text_of(ask(server, "a1"))


def test_server_info_has_the_fields_that_trainers_read(server: Any) -> None:
    found = server.client.get("/server_info", params={"config_format": "json"}).json()
    assert found["vllm_config"] == {
        "model_config": {"dtype": "torch.float32", "max_model_len": 2048},
        "lora_config": {"max_loras": 64, "max_lora_rank": 64},
        "parallel_config": {"data_parallel_size": 1},
    }
    assert server.client.get("/get_world_size").json() == {"world_size": 1}


@pytest.mark.slow
def test_paused_server_stops_at_once(tmp_path: Any) -> None:
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        with serving(tmp_path) as server:
            running = threads.submit(streamed, server, "a1", max_tokens=1900)
            until(lambda: computed(server) > 0)
            pause(server)
            # The second request waits for the pages of the first one.
            waiting = [threads.submit(ask, server, "a2", LONG) for _ in range(2)]
            until(lambda: server.engine.requests == 3)
            begin = time.monotonic()
        assert time.monotonic() - begin < 10
        error = running.result()[-1]["error"]
        told = [error, *(each.result().json()["error"] for each in waiting)]
    assert {each["code"] for each in told} <= {500, 503}
    assert all("server is stopping" in each["message"] for each in told)


@pytest.mark.slow
@needs("peft")
def test_exact_server_computes_the_bits_of_a_trainer(tmp_path: Any) -> None:
    """Compare tokens of a batch, with and without shared pages, with a forward of PEFT's model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_ext import exact, from_peft
    from lora_ext.server import Settings
    from lora_ext.serving import Logprobs, Sampling

    save_model(tmp_path)
    lines: list[str] = []
    settings = Settings(tmp_path / "tiny", tmp_path / "adapters", exact=True)
    prompts = {"a1": [5, 6, 7], "a9": list(range(5, 90)), "a12": [7] * 70}
    found: dict[str, tuple[list[float], list[int]]] = {}
    with settings.engine(lines.append) as engine:
        for name in prompts:
            engine.folder.load(name)
        for seed in (3, 4):  # the second round reads the pages of the first
            logprobs = {f"{name}-{seed}": Logprobs() for name in prompts}
            for key, values in logprobs.items():
                name = key.partition("-")[0]
                how = {"adapter_name": name, "logprobs": values, "max_new_tokens": 12}
                sampling = Sampling(1.0, 1.0, seed)
                engine.manager.add_request(prompts[name], key, sampling=sampling, **how)
            for _ in logprobs:
                result = engine.manager.get_result(timeout=60)
                values = [each.value for each in logprobs[result.request_id].tokens]
                found[result.request_id] = values, result.generated_tokens
    assert lines == []  # an exact model is packed, so no line about packing is printed
    assert len(found) == 6
    for key, (sampled, tokens) in found.items():
        name = key.partition("-")[0]
        prompt = prompts[name]
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").eval()
        trainer = exact(from_peft(PeftModel.from_pretrained(base, tmp_path / "adapters" / name)))
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            wanted = trainer(ids).logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
        wanted = wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert torch.equal(torch.tensor(sampled), wanted), key
