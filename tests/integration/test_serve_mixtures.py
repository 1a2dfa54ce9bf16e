"""Mixtures of adapters in requests to ``lora-ext serve``, with llama.cpp's field ``lora``."""

import concurrent.futures
import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from served import (
    MANY,
    NAMES,
    ask,
    chat,
    metric,
    needs_packages,
    pause,
    post,
    resume,
    said,
    serving,
    settle,
    streamed,
    text_of,
    until,
)
from test_serve_fields import chunks, complete
from test_serve_generations import computed
from tiny import make_model, make_peft

from lora_ext.adapter import LoraAdapter
from lora_ext.serving import Engine

pytestmark = needs_packages
WORDS = " ".join(f"w{5 + i * 7 % 90}" for i in range(200))  # several pages


def lora(**scales: float) -> list[dict[str, Any]]:
    return [{"id": name, "scale": scale} for name, scale in scales.items()]


def expected(server: Any, entry: Any, words: str = "w5 w6 w7", count: int = 8) -> str:
    ids = torch.tensor([server.engine.encode([{"role": "user", "content": words}])])
    how = {"max_new_tokens": count, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    out = server.engine.model.generate(ids, attention_mask=mask, adapter_names=[entry], **how)
    return server.engine.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_answers_are_those_of_the_mixture(server: Any) -> None:
    for name in ("a1", "a2", "a9"):
        assert post(server, "load", name) == 200
    listed = server.client.get("/lora-adapters").json()
    assert [each["id"] for each in listed] == list(range(len(listed)))
    names = [each["path"] for each in listed]
    assert names == sorted(names) and {*names} >= {*MANY} and {e["scale"] for e in listed} == {0}
    number = names.index("a9")
    texts = set()
    for given, entry in (
        (lora(a1=0.7, a2=0.3), {"a1": 0.7, "a2": 0.3}),
        ([{"id": number, "scale": -2}, *lora(a1=1)], {"a9": -2.0, "a1": 1.0}),
        (lora(a1=1), "a1"),
        (lora(a1=0.5), ("a1", 0.5)),
        (lora(a1=0, a2=1.5), ("a2", 1.5)),
        ([], None),
        (lora(a1=0), None),
        (None, None),
    ):
        wanted = expected(server, entry)
        assert text_of(ask(server, "tiny", lora=given)) == wanted
        assert said(streamed(server, "tiny", lora=given)) == wanted
        texts.add(wanted)
    assert len(texts) == 6
    how: dict[str, Any] = {"lora": lora(a1=0.7, a2=0.3), "model": "tiny", "n": 2, "logprobs": 1}
    whole = complete(server, [[5, 6, 7], [9]], **how)
    parts = [event["choices"][0] for event in chunks(server, "completions", prompt=[9], **how)]
    text = "".join(part["text"] for part in parts if part["index"] == 0)
    assert [choice["text"] for choice in whole["choices"]][2:] == [text, text]
    assert whole["adapter_generation"] is None
    settle(server)


def test_requests_with_different_mixtures_run_in_one_batch(server: Any) -> None:
    mixtures = [{f"a{i}": 0.5, f"a{i + 1}": 0.1 * j} for i in range(4) for j in range(1, 5)]
    alone = [text_of(ask(server, "tiny", lora=lora(**each))) for each in mixtures]
    assert len({*alone}) > 8
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        pause(server)
        asked = [threads.submit(ask, server, "tiny", lora=lora(**each)) for each in mixtures]
        until(lambda: server.engine.requests == 16)
        resume(server)
        assert [text_of(each.result()) for each in asked] == alone
    settle(server)


def test_shared_pages_are_those_of_the_same_members_and_scales(server: Any) -> None:
    def added(**scales: float) -> int:
        before = computed(server)
        entry = {{"mine": path}.get(name, name): scale for name, scale in scales.items()}
        assert text_of(ask(server, "tiny", WORDS, lora=lora(**scales))) == wanted[str(entry)]
        return computed(server) - before

    mixtures: list[dict[str, float]] = [
        {name: scale, "a4": 0.5} for name in ("a1", "a2") for scale in (0.25, 1.0)
    ]
    for name in ("a1", "a2", "a4"):
        post(server, "load", name)
    wanted = {str(each): expected(server, each, WORDS) for each in mixtures}
    assert len({*wanted.values()}) == 4
    for path in ("a1", "a2", "a1"):
        assert post(server, "load", "mine", lora_path=path, load_inplace=True) == 200
        for scale in (0.25, 1.0):
            first, second = added(mine=scale, a4=0.5), added(mine=scale, a4=0.5)
            assert first > 200 and second < first - 128
    settle(server)


def test_running_mixture_keeps_members_that_are_updated_or_unloaded(server: Any) -> None:
    for name in ("a1", "a2", "a3"):
        assert post(server, "load", name) == 200
    post(server, "load", "mine", lora_path="a1")
    old = {"a1": 0.5, "a3": 0.5}
    wanted = expected(server, old, count=300)
    body = chat("tiny", stream=True, max_tokens=300, lora=lora(mine=0.5, a3=0.5))
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        events = [next(lines)]
        assert post(server, "load", "mine", lora_path="a2") == 200
        assert metric(server, "pool_slots_pinned") >= 3
        new = text_of(ask(server, "tiny", lora=body["lora"]))
        assert new == expected(server, {"a2": 0.5, "a3": 0.5})
        assert post(server, "unload", "mine") == 200
        gone = ask(server, "tiny", lora=body["lora"])
        assert gone.status_code == 404 and "lora.0.id: " in gone.text and "'mine'" in gone.text
        events += lines
    assert said([json.loads(event[6:]) for event in events]) == wanted
    settle(server)


@pytest.mark.slow
def test_prompts_of_a_request_use_one_version_of_every_member(server: Any) -> None:
    prompts = [[5 + (i + 7 * j) % 90 for i in range(100)] for j in range(8)]
    answers = {}
    for path in ("a1", "a9"):
        post(server, "load", "mine", lora_path=path)
        answers[path] = mixed(server, prompts)
    assert answers["a1"] != answers["a9"]
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            for path in answers:
                post(server, "load", "mine", lora_path=path)

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        threads.submit(change)
        try:
            found = [mixed(server, prompts) for _ in range(12)]
        finally:
            ended.set()
    assert all(each in (*answers.values(), None) for each in found)
    assert any(found)
    settle(server)


def mixed(server: Any, prompts: list[list[int]]) -> list[str] | None:
    body = {"model": "tiny", "lora": lora(mine=0.8, a4=0.3), "prompt": prompts, "temperature": 0}
    found = server.client.post("/v1/completions", json={**body, "max_tokens": 6})
    if found.status_code == 409:
        return None
    assert found.status_code == 200, found.text
    return [choice["text"] for choice in found.json()["choices"]]


def test_invalid_mixtures_are_refused_with_the_field_and_the_value(server: Any) -> None:
    config = {"r": 2, "target_modules": ["q_proj"]}
    for name, more in (
        ("act", {"alora_invocation_tokens": [7, 8]}),
        ("dora", {"use_dora": True}),
        ("whole", {"modules_to_save": ["lm_head"]}),
    ):
        model: Any = make_peft(make_model("llama"), {name: {**config, **more}})
        model.save_pretrained(server.folder / "adapters")
    one = lora(a1=1)
    unknown = "expected a name or a number in /lora-adapters, found "
    cases: list[tuple[Any, int, str]] = [
        (lora(nobody=1), 404, f"lora.0.id: {unknown}'nobody'"),
        (lora(nobody=0), 404, f"lora.0.id: {unknown}'nobody'"),
        ([*one, {"id": "__base__", "scale": 1}], 404, f"lora.1.id: {unknown}'__base__'"),
        ([{"id": "../secret/x", "scale": 1}], 404, "lora.0.id: "),
        ([{"id": "", "scale": 1}], 404, "lora.0.id: "),
        ([{"id": 10**30, "scale": 1}], 404, "lora.0.id: "),
        ([{"id": 999, "scale": 1}], 404, f"lora.0.id: {unknown}999"),
        ([{"id": -1, "scale": 1}], 422, "lora.0.id"),
        ([{"id": True, "scale": 1}], 422, "lora.0.id"),
        ([{"id": 1.5, "scale": 1}], 422, "lora.0.id"),
        ([{"id": None, "scale": 1}], 422, "lora.0.id"),
        ([{"id": ["a1"], "scale": 1}], 422, "lora.0.id"),
        (one * 2, 422, "lora.1.id: expected each adapter once, found 'a1' again"),
        ([{"id": "a1", "scale": "1"}], 422, "lora.0.scale: "),
        ([{"id": "a1", "scale": True}], 422, "lora.0.scale: "),
        ([{"id": "a1", "scale": None}], 422, "lora.0.scale: "),
        ([{"id": "a1", "scale": [1]}], 422, "lora.0.scale: "),
        (lora(a1=float("nan")), 422, "lora.0.scale: "),
        (lora(a1=float("-inf")), 422, "lora.0.scale: "),
        (lora(a1=1e39), 400, "lora: 'a1': expected a finite weight, found 1e+39"),
        ([{"id": "a1"}], 422, "lora.0.scale: Field required"),
        ([{"scale": 1}], 422, "lora.0.id: Field required"),
        ([{"id": "a1", "scale": 1, "path": "x"}], 422, "lora.0.path: Extra inputs"),
        ({"a1": 1}, 422, "lora: "),
        ("a1", 422, "lora: "),
        (["a1"], 422, "lora.0: "),
        ([{"id": "a1", "scale": 0.1}] * 65, 422, "lora: List should have at most 64 items"),
        (lora(a13=1, a14=1, a15=1, a12=1, a11=1), 400, "lora: expected a mixture of at most"),
        (lora(a1=1, act=1), 400, "lora: 'act': expected an ordinary adapter in a mixture"),
        (lora(a1=1, dora=1), 400, "lora: 'dora': expected an adapter that only adds"),
        (lora(dora=0.5), 400, "lora: 'dora': expected an adapter that only adds"),
        (lora(a1=1, whole=1), 400, "lora: 'whole': expected an adapter that only adds"),
        (lora(a1=1, broken=1), 400, "adapter 'broken': expected the files of an adapter"),
    ]
    for kind, given in (
        ("completions", {"prompt": "w5"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "w5"}]}),
    ):
        for wrong, code, named in cases:
            body = {"model": "tiny", "max_tokens": 2, **given, "lora": wrong}
            found = server.client.post(f"/v1/{kind}", content=json.dumps(body))
            assert found.status_code == code, (wrong, found.text)
            assert named in found.json()["error"]["message"], found.text
    found = ask(server, "a1", lora=lora(a2=1))
    assert found.status_code == 400
    told = "lora: expected null unless model is the base model 'tiny', found model 'a1'"
    assert found.json()["error"]["message"] == told
    found = ask(server, "tiny", lora=lora(a1=1, a2=1), adapter_generation=1)
    told = "begin: adapter_generation: expected None for the base model or a mixture, found 1"
    assert (found.status_code, found.json()["error"]["message"]) == (400, told)
    generation = ask(server, "tiny", lora=one).json()["adapter_generation"]
    assert ask(server, "tiny", lora=one, adapter_generation=generation).status_code == 200
    assert ask(server, "tiny", lora=one, adapter_generation=generation + 1).status_code == 409
    assert ask(server, "tiny", lora=lora(dora=1)).status_code == 200
    assert server.client.post("/lora-adapters", json=one).status_code == 405
    settle(server)


@pytest.mark.parametrize("more", [{}, {"logprobs": True}, {"temperature": 1}, {"max_tokens": 1}])
@pytest.mark.parametrize("entry", [{"a1": 3e38, "a2": -3e38}, {"a1": 3e38}, "huge"])
def test_adapter_that_overflows_is_refused_alone_and_in_a_mixture(
    server: Any, entry: Any, more: dict[str, Any]
) -> None:
    value = LoraAdapter.load(server.folder / "adapters" / "a1")
    huge = {n: f._replace(a=f.a * 1e6, b=f.b * 1e38) for n, f in value.modules.items()}
    dataclasses.replace(value, modules=huge).save(server.folder / "adapters" / "huge")
    plain = isinstance(entry, str)
    model, fields = (entry, more) if plain else ("tiny", {**more, "lora": lora(**entry)})
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        other = threads.submit(ask, server, "a3")
        found = ask(server, model, **fields)
        assert text_of(other.result()) == expected(server, "a3")
    name = tuple(entry) if len(entry) == 2 else entry if plain else "a1"
    told = "RequestStream: the request failed: model: expected finite logits, found NaN or inf "
    error = {"message": f"{told}with adapter {name!r}", "code": 400}
    assert (found.status_code, found.json()) == (400, {"error": error})
    *parts, last = streamed(server, model, **fields)
    assert last == {"error": error} and said(parts) == ""
    settle(server)


def test_server_of_one_request_answers_mixtures_up_to_its_rank(tmp_path: Path) -> None:
    names = [*NAMES[:6], "a9"]  # together 8 pages, as many as an adapter of max_rank
    with serving(tmp_path, max_requests=1, context=128) as server:
        for few in (names[:2], names, names[4:]):
            entry = dict.fromkeys(few, 0.5)
            assert text_of(ask(server, "tiny", lora=lora(**entry))) == expected(server, entry)
        found = ask(server, "tiny", lora=lora(**dict.fromkeys([*names, "a6"], 0.5)))
        assert found.status_code == 400 and "needs 1 pages" in found.text
        assert text_of(ask(server, "a15")) == expected(server, "a15")
        settle(server)


@pytest.mark.parametrize("name", ["max_requests", "max_rank"])
def test_engine_names_its_invalid_arguments(server: Any, name: str) -> None:
    for wrong in (0, "1", 1.5):
        with pytest.raises(ValueError, match=f"Engine: {name}: expected .*, found {wrong!r}"):
            Engine(None, None, "", **{name: wrong})
