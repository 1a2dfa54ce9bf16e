"""Check of a JSON schema, keyword by keyword, before outlines-core converts it.

outlines-core converts a schema to a regular expression and ignores unknown keywords. A constraint
must enforce its whole schema, so every keyword is checked here first. Keywords that outlines-core
ignores, or does not implement exactly, are rejected by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, NoReturn

from lora_ext._checks import require

from ._anchors import unanchored

_SAID = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs"}
_SAID |= {"definitions", "deprecated", "readOnly", "writeOnly"}
_WORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": set(),
    "number": set(),
    "boolean": set(),
    "null": set(),
}
# Accepted formats. outlines-core allows quotes or backslashes in other formats, or lacks them.
_FORMATS = ("date", "date-time", "uuid")
# Replaces the pattern of outlines-core, which accepts the digits of any script in a date.
_DATE = "[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
_LETTERS = "\\.+*?()|[]{}^$"  # special characters of a regular expression
_WHERE = "json_schema"
_MOST_DEPTH = 32
_MOST_LENGTH = (1 << 31) - 1  # outlines-core ignores a length that exceeds a machine word


def check(schema: Any) -> list[str]:
    """Check a schema, and return its patterns, which must only match the inside of a JSON string.

    Parts that outlines-core would misread are changed in place.

    Raises:
        NotImplementedError: If outlines-core would ignore a keyword; the message contains its name
            and place.
        ValueError: If the schema is invalid.
    """
    patterns: list[str] = []
    _check(schema, schema, "#", (), patterns, set())
    return patterns


def _check(
    schema: Any, root: Any, at: str, refs: tuple[str, ...], patterns: list[str], seen: set[str]
) -> None:
    """Check one schema.

    Args:
        schema: Schema to check.
        root: Outermost schema, which ``$ref`` refers to.
        at: Place of the schema, for error messages.
        refs: Targets of ``$ref`` that contain this schema. A ``$ref`` to one of these targets is a
            cycle.
        patterns: List to which the patterns of the schema are appended.
        seen: Targets of ``$ref`` that were checked. Each target is checked only once, because
            otherwise nested references could double the work at each level.
    """
    require(isinstance(schema, Mapping), _WHERE, at, "an object", repr(schema)[:80])
    if at.count("/") > 2 * _MOST_DEPTH:
        _refuse(at, f"more than {_MOST_DEPTH} nested schemas")
    words = {w: v for w, v in schema.items() if w not in _SAID}
    for choice in ("$ref", "enum", "const", "anyOf", "oneOf", "allOf"):
        if choice not in words:
            continue
        allowed = {choice, "type"} if choice in ("enum", "const") else {choice}
        if others := sorted(set(words) - allowed):
            _refuse(at, f"{others[0]} together with {choice}")
        if choice == "$ref":
            name = words["$ref"]
            if name in refs:
                _refuse(at, f"$ref {name!r}, a recursive reference, which has no finite depth")
            found = _resolved(name, root, at)
            if name not in seen:
                _check(found, root, f"{at}/$ref", (*refs, name), patterns, seen)
                seen.add(name)
        elif choice in ("enum", "const"):
            values = words["enum"] if choice == "enum" else [words["const"]]
            listed = isinstance(values, list) and bool(values)
            require(listed, _WHERE, f"{at}/enum", "a list of values", repr(values)[:80])
            if "type" in words:
                kinds = _kinds(words["type"], at)
                wrong = [v for v in values if _kind(v) not in _wide(kinds)]
                require(not wrong, _WHERE, f"{at}/{choice}", f"values of type {kinds}", wrong[:1])
            _plain(values, at)
        else:
            parts = words[choice]
            listed = isinstance(parts, list) and bool(parts)
            require(listed, _WHERE, f"{at}/{choice}", "a list of schemas", repr(parts)[:80])
            if choice == "allOf" and len(parts) > 1:
                _refuse(at, "allOf of several schemas")
            for i, part in enumerate(parts):
                _check(part, root, f"{at}/{choice}/{i}", refs, patterns, seen)
            if choice == "oneOf" and not _apart(parts, root):
                _refuse(at, "oneOf with schemas that a value may satisfy together (use anyOf)")
        return
    kinds: Any = words.pop("type", "object" if "properties" in words else None)
    if kinds is None:
        _refuse(at, "no type (any value)" if not words else f"{sorted(words)[0]} without type")
    allowed = {w for k in _kinds(kinds, at) for w in _WORDS[k]}
    if others := sorted(set(words) - allowed):
        _refuse(at, others[0])
    if not isinstance(kinds, str):
        if words:
            _refuse(at, f"{sorted(words)[0]} with several types (use anyOf)")
        if {"object", "array"} & set(kinds):
            _refuse(at, "an object or array among several types (use anyOf)")
        return
    if kinds == "string":
        _string(schema, words, at, patterns)
    for child, where in _children(kinds, words, at):
        _check(child, root, where, refs, patterns, seen)


def _string(schema: dict[str, Any], words: Mapping[str, Any], at: str, patterns: list[str]) -> None:
    """Check the keywords of a string.

    A pattern is put into a group, because alternatives at its top level would otherwise include the
    quotes of the string.
    """
    if len(words) > 1 and {"pattern", "format"} & set(words):
        _refuse(at, "pattern or format together with another keyword for strings")
    if "format" in words and words["format"] not in _FORMATS:
        _refuse(at, f"format {words['format']!r:.40}")
    if words.get("format") == "date":
        del schema["format"]
        schema["pattern"] = f"^(?:{_DATE})$"
    if "pattern" in words:
        pattern = words["pattern"]
        require(isinstance(pattern, str), _WHERE, f"{at}/pattern", "a string", repr(pattern))
        patterns.append(unanchored(_WHERE, f"{at}/pattern", pattern))
        schema["pattern"] = f"^(?:{patterns[-1]})$"


def _kinds(kinds: Any, at: str) -> list[str]:
    """Return the types of a schema as a list."""
    listed = kinds if isinstance(kinds, list) else [kinds]
    wrong = [k for k in listed if not isinstance(k, str) or k not in _WORDS]
    expected = f"one of {sorted(_WORDS)}"
    require(listed and not wrong, _WHERE, f"{at}/type", expected, repr((*wrong, kinds)[0])[:80])
    return listed


def _plain(value: Any, at: str) -> None:
    """Raise NotImplementedError for values that outlines-core would change.

    outlines-core does not escape special characters in property names, and rounds numbers with many
    digits twice.
    """
    if isinstance(value, list):
        for part in value:
            _plain(part, at)
    elif isinstance(value, (int, float)) and not _exact(value):
        _refuse(at, f"{value!r:.40}, a number with more digits than outlines-core keeps")
    elif isinstance(value, Mapping):
        for name, part in value.items():
            _unescaped(name, at)
            if set(_LETTERS) & set(name):
                _refuse(at, f"a value with the name {name!r:.40}, which has one of {_LETTERS}")
            _plain(part, at)


def _unescaped(name: str, at: str) -> None:
    """Raise NotImplementedError for a property name with characters that JSON escapes.

    outlines-core does not escape these characters.
    """
    if json.dumps(name, ensure_ascii=False) != f'"{name}"':
        _refuse(at, f"the name {name!r:.40}, which has a character that JSON escapes")


def _exact(number: float) -> bool:
    if isinstance(number, int):
        return -(1 << 63) <= number < 1 << 64
    _, digits, exponent = Decimal(repr(number)).as_tuple()
    # The digits and the power of ten are exact doubles within these limits, so their product is
    # rounded only once, as in Python.
    return int("".join(map(str, digits))) <= 1 << 53 and abs(int(exponent)) <= 22


def _children(kind: str, words: Mapping[str, Any], at: str) -> Iterator[tuple[Any, str]]:
    """Check the keywords of a value, and yield the schemas inside an object or array."""
    for name in ("minLength", "maxLength", "minItems", "maxItems"):
        value = words.get(name, 0)
        whole = type(value) is int and 0 <= value <= _MOST_LENGTH
        expected = f"a whole number from 0 to {_MOST_LENGTH}"
        require(whole, _WHERE, f"{at}/{name}", expected, repr(value)[:80])
    for least, most in (("minLength", "maxLength"), ("minItems", "maxItems")):
        low, high = words.get(least, 0), words.get(most)
        expected = f"at most {most} ({high})"
        require(high is None or low <= high, _WHERE, f"{at}/{least}", expected, low)
    if kind == "object":
        inside = words.get("properties", {})
        good = isinstance(inside, Mapping)
        require(good, _WHERE, f"{at}/properties", "an object", repr(inside)[:80])
        for name in inside:
            _unescaped(name, at)
        required = words.get("required", [])
        listed = isinstance(required, list) and all(isinstance(name, str) for name in required)
        require(listed, _WHERE, f"{at}/required", "a list of names", repr(required)[:80])
        if missing := [name for name in required if name not in inside]:
            _refuse(at, f"required {missing[0]!r}, which is not a property")
        more = words.get("additionalProperties", True)
        if not inside:
            if not isinstance(more, Mapping):
                _refuse(at, "an object without properties or a schema for additionalProperties")
            yield more, f"{at}/additionalProperties"
        for name, child in inside.items():
            yield child, f"{at}/properties/{name}"
    elif kind == "array":
        fixed = "prefixItems" in words
        if fixed == ("items" in words):
            _refuse(at, "an array with neither or both of items and prefixItems")
        if fixed and {"minItems", "maxItems"} & set(words):
            _refuse(at, "minItems or maxItems together with prefixItems")
        parts = words["prefixItems"] if fixed else [words["items"]]
        listed = isinstance(parts, list)
        require(listed, _WHERE, f"{at}/prefixItems", "a list of schemas", repr(parts)[:80])
        for i, child in enumerate(parts):
            yield child, f"{at}/prefixItems/{i}" if fixed else f"{at}/items"


def _refuse(at: str, what: str) -> NoReturn:
    raise NotImplementedError(
        f"{_WHERE}: {at}: expected keywords that an automaton can enforce, found {what}"
    )


def _resolved(name: Any, root: Any, at: str) -> Any:
    good = isinstance(name, str) and (name == "#" or name.startswith("#/"))
    require(good, _WHERE, f"{at}/$ref", "a reference such as #/$defs/name", repr(name)[:80])
    found = root
    for part in name.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        known = isinstance(found, Mapping) and part in found
        require(known, _WHERE, f"{at}/$ref", "an existing part of the schema", repr(name)[:80])
        found = found[part]
    return found


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    names = {int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]


def _wide(kinds: str | Sequence[str]) -> set[str]:
    listed = {kinds} if isinstance(kinds, str) else set(kinds)
    return listed | ({"integer"} if "number" in listed else set())


def _apart(parts: Sequence[Any], root: Any) -> bool:
    """Return whether types and constants prove that no value satisfies two of the schemas."""
    resolved = [p if "$ref" not in p else _resolved(p["$ref"], root, "#") for p in parts]
    pairs = ((a, b) for i, a in enumerate(resolved) for b in resolved[:i])
    return all(_differ(a, b) for a, b in pairs)


def _differ(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    values = [_values(s) for s in (a, b)]
    if values[0] is not None and values[1] is not None:
        return not any(x == y for x in values[0] for y in values[1])
    kinds = [_wide(s["type"]) if "type" in s else None for s in (a, b)]
    if kinds[0] is not None and kinds[1] is not None and not kinds[0] & kinds[1]:
        return True
    shared = set(a.get("required", ())) & set(b.get("required", ()))
    inside = [s.get("properties", {}) for s in (a, b)]
    told = [(_values(inside[0].get(n, {})), _values(inside[1].get(n, {}))) for n in shared]
    return any(x is not None and y is not None and not any(v in y for v in x) for x, y in told)


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema.get("enum")
