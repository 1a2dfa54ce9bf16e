"""Constraints as formal languages: construction, combination, caching and errors."""

from __future__ import annotations

import importlib.util
import itertools
import json
import time
from typing import Any

import pytest
import torch
from control_tokenizer import accepts, random_texts, tokenizer
from control_toys import EDGES, EOS, V, constraint, satisfies

from lora_ext.control import Constraint, ConstraintTooLarge, Limits

pytest.importorskip("transformers")
outlines = pytest.mark.skipif(
    importlib.util.find_spec("outlines_core") is None,
    reason="outlines-core is not installed: pip install --no-build-isolation '.[control]'",
)


def every(longest: int, tokens: int = 4) -> list[tuple[int, ...]]:
    return [t for n in range(longest + 1) for t in itertools.product(range(tokens), repeat=n)]


def small(*texts: tuple[int, ...]) -> Constraint:
    """Return a constraint that accepts exactly these texts, built from a tree of edges."""
    number: dict[tuple[int, ...], int] = {(): 0}
    edges = []
    for text in texts:
        for i, token in enumerate(text):
            node = number.setdefault(text[: i + 1], len(number))
            edges.append((number[text[:i]], token, node))
    return Constraint.from_edges(edges, 0, {number[t] for t in texts}, V, EOS)


# --- from edges -----------------------------------------------------------------------------------
def test_automaton_accepts_the_texts_of_its_edges() -> None:
    one = constraint()
    assert [one.accepts(t) for t in every(5)] == [satisfies(t) for t in every(5)]
    assert one.num_states == len({s for s, _, _ in EDGES})
    assert one.accepts(torch.tensor([2])) and not one.accepts([EOS]) and not one.accepts([99])


def test_constraints_of_equal_languages_are_equal_for_any_edges() -> None:
    twice = [(s + 10, t, n + 10) for s, t, n in EDGES]  # an unreachable copy of the automaton
    lost = [(0, 0, 77)]  # No final state follows, so the edge is dropped.
    again = Constraint.from_edges([*EDGES[1:], *twice], 0, {2, 3, 12, 13}, V, EOS)
    other = Constraint.from_edges([*EDGES[1:], *lost], 0, {2, 3}, V, EOS)
    assert again == other and hash(again) == hash(other) and again.key == other.key
    assert again != constraint()
    assert small((0,), (0, 1), (2, 1)) == small((2, 1), (0, 1), (0,))


def test_distance_is_the_fewest_tokens_to_the_end() -> None:
    one = small((0, 1, 2), (1,))
    assert one.distance[0] == 2  # the shortest text: token 1 and the end token
    assert one.distance[one.next_state(0, 0)] == 3
    assert one.distance[one.end] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([(0, 9, 1)], 0, {1}, V, EOS), "edges: expected tokens below vocab_size 5, found \\[9\\]"),
        (([(0, EOS, 1)], 0, {1}, V, EOS), "no edge of an end token"),
        (([(0, 1, 1), (0, 1, 2)], 0, {1}, V, EOS), "one next state for state 0 and token 1"),
        (([(0, 1, 1)], 0, set(), V, EOS), "satisfies the constraint, found none"),
        (([(0, 1)], 0, {1}, V, EOS), "triples"),
        (([(0, 1, 1)], -1, {1}, V, EOS), "start: expected a whole number"),
        (([(0, 1, 1)], 0, {1}, V, 9), "eos_token_id: expected tokens in 0 .. 4, found 9"),
        (([(0, 1, 1)], 0, {1}, 0, EOS), "vocab_size: expected a whole number"),
    ],
)
def test_edges_that_are_not_an_automaton_raise(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Constraint.from_edges(*arguments)


# --- combining ------------------------------------------------------------------------------------
def test_and_or_and_not_equal_set_operations() -> None:
    a, b = constraint(), small((2,), (3, 3), (2, 1, 0), (3, 2))
    for text in every(4):
        one, two = a.accepts(text), b.accepts(text)
        assert (a & b).accepts(text) == (one and two)
        assert (a | b).accepts(text) == (one or two)
        assert (~a).accepts(text) != one
    assert ~~a == a and (a | a) == a == (a & a)
    assert ~(a & b) == (~a | ~b)


def test_empty_intersections_and_different_vocabularies_raise() -> None:
    with pytest.raises(ValueError, match="satisfies the constraint, found none"):
        _ = constraint() & ~constraint()
    with pytest.raises(ValueError, match="right operand: expected vocab_size and eos"):
        _ = constraint() & Constraint.from_edges([(0, 1, 1)], 0, {1}, V + 1, EOS)


def test_errors_for_products_above_the_limit_name_the_factors() -> None:
    """Check three constraints on the length, multiples of 61, 67 and 71. Their product has 290177
    states."""
    cycles = [
        Constraint.from_edges([(s, 0, (s + 1) % n) for s in range(n)], 0, {0}, V, EOS)
        for n in (61, 67, 71)
    ]
    with pytest.raises(ConstraintTooLarge, match="4087 states times 71"):
        _ = cycles[0] & cycles[1] & cycles[2]


# --- texts and words ------------------------------------------------------------------------------
def test_choice_accepts_its_texts_in_every_tokenization() -> None:
    tokens = tokenizer()
    one = Constraint.choice(["yes", "no", "yes, dog"], tokens)
    assert accepts(one, "yes") and accepts(one, "no") and accepts(one, "yes, dog")
    assert not accepts(one, "ye") and not accepts(one, "yes,") and not accepts(one, "")
    y, es, yes = (tokens.convert_tokens_to_ids(t) for t in ("y", "es", "yes"))
    assert one.accepts([y, es]) and one.accepts([yes]) and not one.accepts([es])
    assert Constraint.choice(["", "é"], tokens).accepts([])
    assert accepts(Constraint.choice(["", "é"], tokens), "é")


def test_keywords_are_found_in_every_tokenization() -> None:
    tokens = tokenizer()
    one = Constraint.keywords(tokens, all_of=["dog", ["cat", "ab"]], none_of=["bad"])
    texts = [
        "".join(p) for p in itertools.product(("dog", " dog", "ab", "cat", "b", "ad"), repeat=3)
    ]
    for text in texts:
        wanted = "dog" in text and ("cat" in text or "ab" in text) and "bad" not in text
        assert accepts(one, text) == wanted
        assert (
            one.accepts([tokens.convert_tokens_to_ids(c.replace(" ", "Ġ")) for c in text]) == wanted
        )


def test_overlapping_and_nested_keywords_all_count() -> None:
    one = Constraint.keywords(tokenizer(), all_of=["abab", "bab", "a"])
    for text in ("abab", "babab", "ababab"):
        assert accepts(one, text)
    for text in ("aba", "bab", "ab ab", "abba"):
        assert not accepts(one, text)


def test_empty_keywords_forbid_only_special_tokens() -> None:
    tokens = tokenizer()
    free = Constraint.keywords(tokens)
    assert free.num_states == 1
    allowed = free.table[0][free.class_of.long()] >= 0
    assert allowed.sum() == len(tokens) - 1 and not allowed[tokens.pad_token_id]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"all_of": "dog"}, "all_of: expected a list of texts"),
        ({"all_of": [""]}, r"all_of\[0\]: expected a non-empty string"),
        ({"all_of": ["dog"], "none_of": ["o"]}, "satisfies the constraint, found none"),
        ({"none_of": [3]}, "none_of: expected a non-empty string"),
    ],
)
def test_invalid_keywords_raise(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Constraint.keywords(tokenizer(), **arguments)


def test_errors_for_tables_above_the_limit_name_the_factors() -> None:
    with pytest.raises(ConstraintTooLarge, match=r"50 bytes, found \d+, from .* vocabulary"):
        Constraint.choice(["no", "yes"], tokenizer(), limits=Limits(max_table_bytes=50))


def test_too_many_keywords_raise_and_name_the_factors() -> None:
    words = [f"{i:02d}!" for i in range(16)]
    with pytest.raises(ConstraintTooLarge, match=r"2\^16 sets"):
        Constraint.keywords(tokenizer(), all_of=words)


def test_invalid_tokenizer_raises() -> None:
    with pytest.raises(ValueError, match="tokenizer: expected a transformers tokenizer"):
        Constraint.choice(["a"], "smollm2")
    with pytest.raises(ValueError, match="vocab_size: expected at least"):
        Constraint.choice(["a"], tokenizer(), vocab_size=3)
    wide = Constraint.choice(["a"], tokenizer(), vocab_size=400)
    assert wide.vocab_size == 400 and wide.next_state(0, 399) == -1


def test_constraint_is_cached_by_content_and_tokenizer() -> None:
    first = Constraint.choice(["yes", "no"], tokenizer())
    assert Constraint.choice(["yes", "no"], tokenizer()) is first
    assert Constraint.choice(["no", "yes"], tokenizer()) == first
    assert Constraint.choice(["yes", "no"], tokenizer(), vocab_size=400) != first


# --- regular expressions --------------------------------------------------------------------------
PATTERNS = [
    "(ab)+", "(ab)*a?", "a*b", "(a|b){1,4}", "ab(ab)?", "(ab){1,3}", "[ab]{2}(ab)*", "a|aba|b+ab",
    r"[0-9]+(\.[0-9]+)?", "^ab$", "a??b", r"1+\.?5",
]  # fmt: skip


@outlines
@pytest.mark.parametrize("pattern", PATTERNS)
def test_token_sequences_are_accepted_if_their_text_matches(pattern: str) -> None:
    """Check also texts whose last token extends one byte beyond a possible match."""
    import re

    tokens = tokenizer()
    names = ["a", "b", "ab", "ba", "abab", "12", "1", ".", ".5", "5"]
    ids = [tokens.convert_tokens_to_ids(n) for n in names]
    one = Constraint.regex(pattern, tokens)
    for length in range(5 if pattern[0] not in "[1" else 4):
        for places in itertools.product(range(len(names)), repeat=length):
            text = "".join(names[p] for p in places)
            wanted = re.fullmatch(pattern.replace(r"\z", r"\Z"), text) is not None
            assert one.accepts([ids[p] for p in places]) == wanted, text


@outlines
def test_character_of_several_bytes_matches_as_one_character() -> None:
    one = Constraint.regex("[é-ü]{2}.", tokenizer())
    assert accepts(one, "éü日") and not accepts(one, "éü") and not accepts(one, "éé12")


@outlines
@pytest.mark.parametrize("pattern", ["(", "(?=a)b", r"(a)\1", "a{3,1}", r"\bdog"])
def test_invalid_regular_expression_raises(pattern: str) -> None:
    with pytest.raises(ValueError, match="regex: pattern: expected valid input of outlines-core"):
        Constraint.regex(pattern, tokenizer())


@outlines
@pytest.mark.parametrize(
    "place", ["a$b", "a^b", "a($|b)", "(^a)", "a$?", "(?x)[a#]\n$|b]", r"a\Ab"]
)
def test_anchors_inside_an_expression_raise(place: str) -> None:
    expected = (
        r"pattern: expected \^ and \$ only at the beginning and end of the whole text, found "
    )
    with pytest.raises(ValueError, match=f"regex: {expected}"):
        Constraint.regex(place, tokenizer())
    with pytest.raises(ValueError, match=f"json_schema: #/items/{expected}"):
        items = {"type": "string", "pattern": place}
        Constraint.json_schema({"type": "array", "items": items}, tokenizer())


@outlines
def test_escaped_dollar_is_a_literal() -> None:
    assert accepts(Constraint.regex(r"[$]\$", tokenizer()), "$$")
    assert not accepts(Constraint.regex(r"[$]\$", tokenizer()), "$")
    one = Constraint.json_schema({"type": "string", "pattern": r"^a\$$|^\$"}, tokenizer())
    assert accepts(one, '"a$"') and accepts(one, '"$"') and not accepts(one, '"a"')


@outlines
@pytest.mark.parametrize(
    ("what", "content", "argument"),
    [
        ("regex", "a\ud800", "regex: pattern"),
        ("choice", ["b", "a\udfff"], "choice: texts"),
        ("json_schema", {"enum": ["a\ud800"]}, "json_schema: schema"),
        ("json_schema", '{"const": "\\ud800"}', "json_schema: schema"),
        ("json_schema", {"type": "object", "properties": {"\ud800": {"type": "null"}}}, "schema"),
    ],
)
def test_unpaired_surrogate_raises(what: str, content: Any, argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}: expected no unpaired surrogate"):
        getattr(Constraint, what)(content, tokenizer())
    with pytest.raises(ValueError, match=r"none_of: .* surrogate, found '.ud800' at index 1"):
        Constraint.keywords(tokenizer(), none_of=["a\ud800"])


@outlines
@pytest.mark.parametrize("pattern", ["(a|b)*a(a|b){24}", "((a{1,50}){1,50}){1,50}"])
def test_malicious_expressions_stop_within_the_limits(pattern: str) -> None:
    start = time.monotonic()
    with pytest.raises(ConstraintTooLarge, match=r"seconds|states|bytes"):
        Constraint.regex(pattern, tokenizer(), limits=Limits(max_seconds=2))
    assert time.monotonic() - start < 20  # The limit allows for a busy machine.
    assert accepts(Constraint.regex("a+", tokenizer()), "aa")  # Calls after the error still work.


def test_expressions_that_are_too_long_raise_before_they_are_parsed() -> None:
    with pytest.raises(ConstraintTooLarge, match="65536 characters, found 70000"):
        Constraint.regex("a" * 70_000, tokenizer())


def test_missing_outlines_core_raises_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"`pip install --no-build-isolation '\.\[control\]'`"):
        Constraint.regex("never built before", tokenizer())


# --- schemas --------------------------------------------------------------------------------------
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-c]+$"}},
        "kind": {"$ref": "#/$defs/kind"},
        "size": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    },
    "required": ["name", "kind"],
    "$defs": {"kind": {"enum": ["a", 'b"', None]}},
}


def holds(value: Any) -> bool:
    """Return whether a value satisfies the schema, by a check in plain Python."""
    keys = {"name", "age", "tags", "kind", "size"}
    return (
        {"name", "kind"} <= set(value) <= keys
        and isinstance(value["name"], str)
        and len(value["name"]) <= 5
        and type(value.get("age", 0)) is int
        and all(t and set(t) <= set("abc") for t in value.get("tags", []))
        and value["kind"] in ("a", 'b"', None)
        and (value.get("size") is None or type(value["size"]) in (int, float))
    )


@outlines
def test_random_texts_of_a_schema_are_json_that_satisfies_it() -> None:
    one = Constraint.json_schema(SCHEMA, tokenizer())
    assert one == Constraint.json_schema(json.dumps(SCHEMA), tokenizer())
    for text in random_texts(one, 300, 60):
        assert holds(json.loads(text)), text
    assert accepts(one, '{"name":"x","kind":"a"}')
    assert accepts(one, '{ "name": "x", "age": 12, "kind": "b\\""}')
    assert not accepts(one, '{"name":"x"}') and not accepts(one, '{"name":"123456","kind":"a"}')


@outlines
@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "integer", "minimum": 3}, "minimum"),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"type": "string", "not": {}}}}, "not"),
        ({"type": "object", "properties": {}, "required": ["z"]}, "required 'z'"),
        ({"allOf": [{"type": "integer"}, {"type": "number"}]}, "allOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "format": "email"}, "format 'email'"),
        ({"type": "string", "pattern": "a", "minLength": 3}, "pattern or format together with"),
        ({"type": "string", "pattern": ".*"}, "only match the inside of a JSON string"),
        ({"anyOf": [{"type": "integer"}], "minimum": 1}, "minimum together with anyOf"),
        ({"$ref": "#"}, "a recursive reference"),
        ({}, "no type"),
        ({"type": "object"}, "an object without properties"),
    ],
)
def test_schema_keywords_that_would_be_ignored_raise(schema: Any, word: str) -> None:
    with pytest.raises(NotImplementedError, match=word):
        Constraint.json_schema(schema, tokenizer())


@pytest.mark.parametrize("schema", ["{", [], 3, '"text"', {"type": "text"}, {"enum": []}])
def test_invalid_schema_raises(schema: Any) -> None:
    with pytest.raises(ValueError, match="json_schema"):
        Constraint.json_schema(schema, tokenizer())


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": [["integer"]]}, "#/type: expected one of"),
        ({"type": 1}, "#/type: expected one of"),
        ({"enum": [1], "type": [[1]]}, "#/type: expected one of"),
        ({"enum": [1], "type": {"x": []}}, "#/type: expected one of"),
        ({"type": "array", "prefixItems": 3}, "#/prefixItems: expected a list of schemas"),
        ({"type": "object", "properties": {}, "required": [[]]}, "required: expected a list of na"),
        ({"type": "string", "minLength": 2**64}, "#/minLength: expected a whole number from 0 to"),
        ({"type": "array", "items": {"type": "null"}, "minItems": 2**70}, "#/minItems: expected"),
        (
            {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 0},
            r"#/minItems: expected at most maxItems \(0\), found 1",
        ),
        (
            {"type": "string", "minLength": 3, "maxLength": 2},
            r"#/minLength: expected at most maxLength \(2\), found 3",
        ),
        ({"enum": [9373.711634780513]}, "9373.711634780513, a number with more digits than outli"),
        ({"const": {"a": [2**64 + 1]}}, "18446744073709551617, a number with more digits"),
        # As a regular expression, the dot would match any character.
        ({"const": {"a.b": 1}}, "a value with the name 'a.b'"),
        ({"enum": [1, [{"a|b": 1}]]}, r"a value with the name 'a\|b'"),
    ],
)
def test_schemas_that_outlines_core_misreads_raise(schema: Any, message: str) -> None:
    """Check schemas for which outlines-core would ignore a length of 2^64 or more, change the last
    digit of a number, or read a name inside a value as a regular expression."""
    with pytest.raises((ValueError, NotImplementedError), match=message) as error:
        Constraint.json_schema(schema, tokenizer())
    assert not isinstance(error.value, ConstraintTooLarge)


@outlines
def test_numbers_and_property_names_are_written_literally() -> None:
    dotted = {"type": "object", "properties": {"a.b|$": {"type": "null"}}, "required": ["a.b|$"]}
    for text in random_texts(Constraint.json_schema(dotted, tokenizer()), 9, 40):
        assert json.loads(text) == {"a.b|$": None}
    for number in (0.1, -1e22, 1e-22, 2**53 / 1e4, 2**64 - 1, -(2**63), 1.5e300 / 1e290):
        one = Constraint.json_schema({"const": number}, tokenizer())
        (text,) = set(random_texts(one, 3, 40))
        assert json.loads(text) == number


def test_schemas_nested_too_deeply_raise() -> None:
    deep = '{"type":"array","items":' * 5000 + '{"type":"null"}' + "}" * 5000
    with pytest.raises((ConstraintTooLarge, NotImplementedError, ValueError)):
        Constraint.json_schema(deep, tokenizer())


# --- hostile input --------------------------------------------------------------------------------
def test_iterators_and_arrays_with_equal_repr_are_not_confused() -> None:
    import numpy as np

    for i in range(8):
        texts: Any = (text for text in [f"w{i}"])  # an iterator instead of a Sequence
        assert accepts(Constraint.choice(texts, tokenizer()), f"w{i}")
    many: Any = np.array([f"a{i:04d}" for i in range(1100)])
    other = many.copy()
    other[600] = "b"
    assert not accepts(Constraint.choice(many, tokenizer()), "b")
    assert accepts(Constraint.choice(other, tokenizer()), "b")


def test_all_256_bytes_may_be_in_different_classes() -> None:
    import numpy as np

    from lora_ext.control.language._algebra import Automaton, over_tokens
    from lora_ext.control.language._limits import Clock

    letters = Automaton(
        np.arange(256, dtype=np.int32),
        np.stack([np.arange(256), np.full(256, -1)]).clip(-1, 1).astype(np.int32),
        np.array([False, True]),
        0,
    )
    tokens = [bytes([b]) for b in range(256)]
    read = over_tokens(letters, tokens, Clock("test"), "bytes")
    assert (read.class_of >= 0).all()


@outlines
@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string", "pattern": "a|b"}, ['"a"', '"b"'], ['"a', 'b"']),
        ({"type": "string", "pattern": "^a|b$"}, ['"a"', '"b"'], ['"a', 'b"']),
        ({"type": "string", "format": "date"}, ['"2024-12-31"'], ['"२०२४-12-31"']),
    ],
)
def test_string_constraints_apply_inside_the_quotes(
    schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    before = json.dumps(schema)
    one = Constraint.json_schema(schema, tokenizer())
    assert all(accepts(one, text) for text in good) and not any(accepts(one, t) for t in bad)
    assert json.dumps(schema) == before


@outlines
@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "pattern": "a)|(b"}, "valid input of outlines-core"),
        ({"type": "object", "properties": {'a"b': {"type": "null"}}}, "that JSON escapes"),
        ({"const": [{"a\nb": 1}]}, "that JSON escapes"),
        ({"type": []}, "#/type: expected one of"),
        ({"type": "string", "maxLength": 2.0}, "maxLength: expected a whole number"),
        ({"type": "array", "items": {"type": "null"}, "minItems": True}, "minItems: expected"),
        ({"type": "object", "properties": {"a": {"type": "null"}}, "required": "a"}, "required"),
    ],
)
def test_schemas_that_outlines_misreads_raise(schema: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        Constraint.json_schema(schema, tokenizer())


@outlines
def test_unbalanced_bracket_raises() -> None:
    with pytest.raises(ValueError, match="valid input of outlines-core"):
        Constraint.regex("a)|(b", tokenizer())


def test_definitions_are_visited_once_if_each_one_references_the_next_twice() -> None:
    from lora_ext.control.language import _schema

    names = {
        f"n{i}": {"anyOf": [{"$ref": f"#/$defs/n{i + 1}"}, {"$ref": f"#/$defs/n{i + 1}"}]}
        for i in range(18)
    }
    names["n18"] = {"anyOf": [{"type": "null"}]}
    begun = time.monotonic()
    _schema.check({"$defs": names, "$ref": "#/$defs/n0"})
    assert time.monotonic() - begun < 1  # 2^18 visits would take many seconds.
