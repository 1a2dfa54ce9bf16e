"""Output formats of requests: OpenAI's and vLLM's fields give equal formats, or errors by name."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from lora_ext.serving._formats import Format, FormatTooLongError, read_format, refuse_old_names

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("openai", "vllm", "wanted"),
    [
        (None, None, None),
        ({"type": "text"}, None, None),
        ({"type": "json_object"}, None, Format("json_object")),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {}}},
            None,
            Format("json", "{}"),
        ),
        ({"type": "text"}, {"regex": "a+"}, Format("regex", "a+")),
        (None, {"choice": ["a", "b"], "json": None}, Format("choice", ("a", "b"))),
        (None, {"json": {"type": "null"}}, Format("json", '{"type": "null"}')),
        (None, {"json": "{}", "json_object": False}, Format("json", "{}")),
        (None, {"json_object": True}, Format("json_object")),
    ],
)
def test_openai_and_vllm_fields_give_the_same_format(openai: Any, vllm: Any, wanted: Any) -> None:
    assert read_format(openai, vllm) == wanted


@pytest.mark.parametrize(
    ("openai", "vllm", "message"),
    [
        ({"type": "xml"}, None, "response_format: type: expected one of"),
        ({"type": "json_object", "schema": {}}, None, "no keys except type"),
        ({"type": "json_schema"}, None, "json_schema: expected a Mapping"),
        (
            {"type": "json_schema", "json_schema": {"name": "x"}},
            None,
            "json_schema.schema: expected",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {}, "more": 1}},
            None,
            "expected fields",
        ),
        ({"type": "json_object"}, {"regex": "a"}, "None with response_format"),
        (None, {}, "fields: expected exactly one of"),
        (None, {"regex": "a", "choice": ["a"]}, "fields: expected exactly one of"),
        (None, {"choice": []}, "choice: expected a list"),
        (None, {"choice": [1]}, "choice: expected a list"),
        (None, {"regex": 3}, "regex: expected a str"),
        (None, {"whitespace_pattern": " "}, "fields: expected one of"),
        (None, {"grammar": "root ::= x"}, "grammar: expected json, regex"),
        (None, {"json": {}, "structural_tag": "{}"}, "structural_tag: expected json, regex"),
    ],
)
def test_unsupported_fields_are_refused_by_name(openai: Any, vllm: Any, message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        read_format(openai, vllm)


def test_formats_that_are_too_long_are_refused_before_parsing() -> None:
    for given in ({"regex": "a" * 70_000}, {"choice": ["b" * 70_000]}, {"json": "[" * 70_000}):
        with pytest.raises(FormatTooLongError, match="at most 65536 bytes, found 70000") as error:
            read_format(None, given)
        assert error.value.status_code == 413


def test_field_names_from_before_vllm_0_12_are_refused_with_the_new_ones() -> None:
    refuse_old_names({"guided_json": None, "model": "a"})
    with pytest.raises(ValueError, match=r'guided_regex: expected structured_outputs \{"regex"'):
        refuse_old_names({"guided_regex": "a"})


def test_error_without_outlines_core_names_the_command_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from control_tokenizer import tokenizer

    vocabulary = tokenizer()  # Made before the patch, since transformers uses find_spec too.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        NotImplementedError, match=r"`pip install --no-build-isolation '\.\[control\]'`"
    ):
        Format("regex", "never built b?fore").constraint(vocabulary)
    assert Format("choice", ("a",)).constraint(vocabulary).num_states == 2
