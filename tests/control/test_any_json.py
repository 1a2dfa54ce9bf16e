"""Constraint to JSON objects with any content, compared with json.loads."""

from __future__ import annotations

import json

import pytest
from control_tokenizer import accepts, random_texts, tokenizer

from lora_ext.control import Constraint

RIGHT = [
    "{}",
    "{ }",
    '{"a":1}',
    '{ "a" : -0.5e+10 , "b":[ ] }',
    '{"a":[1,{"b":null}],"é":"日\\u00e9"}',
]
WRONG = ["", "[]", "{", '{"a"}', '{"a":}', '{"a":1,}', "{,}", '{"a":01}', '{"a":[1,]}', '{"a":[1}']
WRONG += ['{"a":"\n"}', '{"a":+1}', '{"a":.5}', '{"a":1.}', "{}}", '{"a":1 "b":2}', '{"a":tru}']
WRONG += ['{"a":"\\x"}', '{"a":-}', '{"a":1e}']


def test_json_objects_up_to_the_depth_are_accepted_like_by_python() -> None:
    one = Constraint.json_object(tokenizer())
    for text in RIGHT:
        assert type(json.loads(text)) is dict and accepts(one, text), text
    for text in WRONG:
        assert not accepts(one, text), text
    deep = '{"a":{"b":{}}}'
    assert accepts(one, deep) and not accepts(one, deep.replace("{}", '{"c":{}}'))
    assert not accepts(Constraint.json_object(tokenizer(), depth=2), deep)


def test_random_texts_of_the_constraint_are_json_objects() -> None:
    for text in random_texts(Constraint.json_object(tokenizer()), 200, 40):
        assert type(json.loads(text)) is dict


def test_depth_below_one_and_too_large_a_depth_raise() -> None:
    with pytest.raises(ValueError, match="json_object: depth: expected an integer from 1, found 0"):
        Constraint.json_object(tokenizer(), depth=0)
    with pytest.raises(ValueError, match=r"states.*2\^30 ways to nest objects"):
        Constraint.json_object(tokenizer(), depth=30)
