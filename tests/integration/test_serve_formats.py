"""Structured answers over HTTP: they satisfy their format, and other requests are unchanged."""

import concurrent.futures
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import served
from scripts import needs
from served import NAMES, ask, needs_packages, said, streamed, text_of
from tiny import word_tokenizer
from tokenizers import decoders

pytestmark = [needs_packages, needs("outlines_core")]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy", None]}},
    "required": ["a", "b"],
}
FORMATS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"regex": r"[a-c]{3}-\d\d"}},
    {"structured_outputs": {"choice": ["yes", "no", "it depends"]}},
    {"response_format": {"type": "json_object"}},
]


def holds(form: dict[str, Any], text: str) -> bool:
    asked = form.get("structured_outputs", {})
    if "regex" in asked:
        return re.fullmatch(asked["regex"], text) is not None
    if "choice" in asked:
        return text in asked["choice"]
    value = json.loads(text)
    if form.get("response_format") == {"type": "json_object"}:
        return type(value) is dict
    return type(value["a"]) is int and value["b"] in ("x", "yy", None) and len(value) == 2


def save_letters(folder: Path, save: Any = served.save_model) -> None:
    """Save the model of ``served`` with a tokenizer that has one token per character."""
    save(folder)
    marks = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
    listed = [*marks, *string.ascii_letters, *string.digits, *' {}[]":,.-_']
    words = {w: i for i, w in enumerate([*listed, *(f"w{i}" for i in range(len(listed), 97))])}
    tokenizer = word_tokenizer(words, **served.SPECIAL)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.chat_template = served.TEMPLATE
    tokenizer.save_pretrained(folder / "tiny")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "save_model", save_letters)
        with served.serving(tmp_path_factory.mktemp("forms")) as found:
            yield found


@pytest.mark.slow
def test_answers_satisfy_their_formats_and_other_answers_are_unchanged(server: Any) -> None:
    plain = {name: text_of(ask(server, name, max_tokens=30)) for name in NAMES[:4]}
    jobs = [(NAMES[i % 4], form) for i, form in enumerate([*FORMATS, {}] * 3)]

    def answer(job: tuple[str, dict[str, Any]]) -> tuple[str, str]:
        response = ask(server, job[0], max_tokens=30, **job[1])
        return text_of(response), response.json()["choices"][0]["finish_reason"]

    with concurrent.futures.ThreadPoolExecutor(18) as threads:
        found = list(threads.map(answer, jobs))
    for (name, form), (text, reason) in zip(jobs, found, strict=True):
        if form:
            assert holds(form, text) and reason == "stop", text
        else:
            assert text == plain[name]
    events = streamed(server, "a1", max_tokens=30, **FORMATS[0])
    assert holds(FORMATS[0], said(events))
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    warm = ask(server, "a2", max_tokens=30, **FORMATS[1] | {"temperature": 1.5, "seed": 3})
    assert holds(FORMATS[1], text_of(warm))


def test_completions_support_forms(server: Any) -> None:
    body = {"model": "a1", "prompt": "a b", "max_tokens": 12, **FORMATS[3]}
    choice = server.client.post("/v1/completions", json=body).json()["choices"][0]
    assert holds(FORMATS[3], choice["text"]) and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({**FORMATS[2], "max_tokens": 6}, 400, "max_tokens: expected at least 7"),
        ({**FORMATS[2], "stop": "a"}, 400, "stop: expected null with response_format"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, 400, "grammar: expected json, regex"),
        ({"structured_outputs": {"json": {"type": "integer", "minimum": 3}}}, 400, "minimum"),
        (
            {"structured_outputs": {"regex": "("}},
            400,
            "structured_outputs.regex: pattern: expected",
        ),
        (
            {"structured_outputs": {"regex": "a$b"}},
            400,
            "expected ^ and $ only at the beginning and end",
        ),
        (
            {"structured_outputs": {"json": {"type": 1}}},
            400,
            "structured_outputs.json: #/type: exp",
        ),
        ({"structured_outputs": {"choice": ["x" * 5000]}}, 400, "at most 4096 states"),
        ({"structured_outputs": {"regex": "((a{1,30}){1,30}){1,30}"}}, 400, "expected at most"),
        ({"structured_outputs": {"regex": "日"}}, 400, "satisfies the constraint, found none"),
        ({"guided_regex": "a+"}, 422, 'expected structured_outputs {"regex": ...}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": [[]]}}}},
            400,
            "response_format.json_schema: #/type: expected one of",
        ),
        ({"response_format": {"type": "xml"}}, 400, "response_format: type: expected one of"),
        ({"response_format": "json"}, 422, "response_format"),
    ],
)
def test_forms_that_cannot_be_satisfied_are_rejected_early(
    server: Any, fields: dict[str, Any], code: int, message: str
) -> None:
    response = ask(server, "a1", **fields)
    assert response.status_code == code, response.text
    assert message in response.json()["error"]["message"]
    assert holds(FORMATS[3], text_of(ask(server, "a1", max_tokens=12, **FORMATS[3])))


@pytest.mark.slow
def test_format_that_is_too_long_returns_413(server: Any) -> None:
    assert ask(server, "a1", structured_outputs={"regex": "a" * 30_000}).status_code == 413


@pytest.mark.slow
def test_constraint_is_built_once_and_outside_the_loop(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from lora_ext.serving import Format

    build, going, may_end = Format.constraint, threading.Event(), threading.Event()

    def slow(self: Format, vocabulary: Any) -> Any:
        going.set()
        assert may_end.wait(60)
        return build(self, vocabulary)

    monkeypatch.setattr(Format, "constraint", slow)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(ask, server, "a1", max_tokens=12, **FORMATS[3])
        assert going.wait(60)
        assert ask(server, "a2").status_code == 200
        may_end.set()
        assert holds(FORMATS[3], text_of(waiting.result()))
