"""Formats that clients of a server can require for answers, and the constraints that enforce them.

Two notations are supported: OpenAI's ``response_format`` and vLLM's ``structured_outputs``. A
format and its size are checked when the request arrives; the constraint is built later, in another
thread.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_ext._checks import instance, renamed, require

if TYPE_CHECKING:
    from lora_ext.control import Constraint

# lora_ext.control is imported only if a request has a format: _constraining.py gives the reason.

MOST_BYTES = 64 << 10  # maximum size of a schema, of an expression, or of all choices of a request
_KINDS = ("json", "regex", "choice", "json_object")
_OLD = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}
_REFUSED = ("grammar", "structural_tag")
_SCHEMA_FIELDS = {"name", "description", "schema", "strict"}


class FormatTooLongError(ValueError):
    """Error for a schema or an expression that is too large."""

    status_code = 413


@dataclass(frozen=True)
class Format:
    """Format that a request requires for its answer.

    Attributes:
        kind: kind of the format: "json" (with a schema), "regex", "choice", or "json_object".
        content: the schema as JSON, the regular expression, or the choices.
        field: name of the request's field that contains the format, for error messages.
    """

    kind: str
    content: str | tuple[str, ...] = ""
    field: str = dataclasses.field(default="format", compare=False, repr=False)

    def constraint(self, vocabulary: Any) -> Constraint:
        """Return the constraint of this format, from a cache if the same one was built before.

        Args:
            vocabulary: result of :func:`lora_ext.control.vocabulary_of`.

        Raises:
            ValueError: If the content is not a valid schema or expression, or exceeds the limits of
                ``lora_ext.control``.
            NotImplementedError: If the content cannot be expressed as an automaton, or
                outlines-core is not installed.
        """
        from lora_ext.control import Constraint

        with renamed(f"constraint: {self.field}"):
            try:
                if self.kind == "json_object":
                    return Constraint.json_object(vocabulary)
                if isinstance(self.content, tuple):
                    return Constraint.choice(self.content, vocabulary)
                if self.kind == "regex":
                    return Constraint.regex(self.content, vocabulary)
                return Constraint.json_schema(self.content, vocabulary)
            except ImportError as error:
                raise NotImplementedError(str(error)) from None


def read_format(
    response_format: Mapping[str, Any] | None = None,
    structured_outputs: Mapping[str, Any] | None = None,
) -> Format | None:
    """Return the format that a request requires, or None if its answer is plain text.

    Args:
        response_format: mapping ``{"type": "text" | "json_object" | "json_schema", "json_schema":
            ...}`` of OpenAI's API.
        structured_outputs: mapping of vLLM's API with exactly one of the keys ``json`` (a schema),
            ``regex``, ``choice`` and ``json_object``.

    Raises:
        ValueError: If an argument has the wrong form, or if both arguments require a format; the
            message names the field.
        FormatTooLongError: If a schema, an expression or the choices are too large.
        NotImplementedError: If ``structured_outputs`` has ``grammar`` or ``structural_tag``.
    """
    first = None if response_format is None else _of_openai(response_format)
    if structured_outputs is None:
        return first
    expected, found = "None with response_format", f"{structured_outputs!r:.200}"
    require(first is None, "structured_outputs", "value", expected, found)
    return _of_vllm(structured_outputs)


def refuse_old_names(body: Mapping[str, Any]) -> None:
    """Raise ValueError if a request has a ``guided_*`` field, which vLLM removed in version 0.12.

    The message names the key of ``structured_outputs`` that replaces the field.
    """
    for old, kind in _OLD.items():
        if body.get(old) is not None:
            raise ValueError(f'{old}: expected structured_outputs {{"{kind}": ...}}, found {old}')


def _of_openai(given: Mapping[str, Any]) -> Format | None:
    where = "response_format"
    kind = given.get("type")
    if kind in ("text", "json_object"):
        more = sorted(set(given) - {"type"})
        require(not more, where, str(kind), "no keys except type", more[:3])
        return None if kind == "text" else Format("json_object", field=where)
    expected = 'one of "text", "json_object", "json_schema"'
    require(kind == "json_schema", where, "type", expected, repr(kind)[:80])
    inner = given.get("json_schema")
    instance(where, "json_schema", inner, Mapping)
    assert isinstance(inner, Mapping)
    more = sorted({*given} - {"type", "json_schema"} | {*inner} - _SCHEMA_FIELDS)
    require(not more, where, "json_schema", f"fields {sorted(_SCHEMA_FIELDS)}", more[:3])
    instance(where, "json_schema.schema", inner.get("schema"), Mapping)
    field = f"{where}.json_schema"
    return Format("json", _measured(field, json.dumps(inner["schema"])), field)


def _of_vllm(given: Mapping[str, Any]) -> Format:
    where = "structured_outputs"
    named = {k: v for k, v in given.items() if v is not None and v is not False}
    known, found = ", ".join(_KINDS), "an unsupported field"
    for name in _REFUSED:
        require(name not in named, where, name, known, found, NotImplementedError)
    require(len(named) == 1, where, "fields", f"exactly one of {_KINDS}", sorted(named)[:5])
    ((kind, content),) = named.items()
    require(kind in _KINDS, where, "fields", f"one of {_KINDS}", repr(kind)[:80])
    field = f"{where}.{kind}"
    if kind == "json_object":
        require(content is True, where, kind, "true", repr(content)[:80])
        return Format(kind, field=field)
    if kind == "choice":
        good = isinstance(content, list) and bool(content)
        good = good and all(isinstance(text, str) for text in content)
        require(good, where, kind, "a list of at least one string", repr(content)[:80])
        _measured(field, "".join(content))
        return Format(kind, tuple(content), field)
    if kind == "json" and isinstance(content, Mapping):
        content = json.dumps(content)
    instance(where, kind, content, str)
    return Format(kind, _measured(field, content), field)


def _measured(where: str, text: str) -> str:
    count = len(text.encode(errors="replace"))
    if count > MOST_BYTES:
        raise FormatTooLongError(f"{where}: expected at most {MOST_BYTES} bytes, found {count}")
    return text
