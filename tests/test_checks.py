"""Argument checks for integers, numbers, flags, choices and dataclasses, and their messages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch

from lora_ext._checks import (
    WrongKind,
    check_fields,
    choice,
    flag,
    instance,
    integer,
    number,
    require,
    within,
)

THREES = (3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3))
NO_NUMBERS = (None, "3", True, np.bool_(True), torch.tensor(True), [3], np.array([3]), 3j)


@pytest.mark.parametrize("three", THREES, ids=repr)
def test_numpy_and_torch_integers_are_returned_as_python_numbers(three):
    for found in (integer("op", "n", three), number("op", "x", three)):
        assert (type(found), found) == (int, 3)


@pytest.mark.parametrize("half", [0.5, np.float16(0.5), np.array(0.5), torch.tensor(0.5)], ids=repr)
def test_numpy_and_torch_floats_are_returned_as_python_floats(half):
    found = number("op", "x", half)
    assert (type(found), found) == (float, 0.5)


@pytest.mark.parametrize("true", [True, np.bool_(True), np.array(True), torch.tensor(True)])
def test_numpy_and_torch_bools_are_returned_as_python_bools(true):
    assert flag("op", "on", true) is True


@pytest.mark.parametrize("value", [*NO_NUMBERS, torch.tensor([3]), torch.ones((), device="meta")])
def test_values_that_are_not_numbers_raise_type_error_and_value_error(value):
    for check in (integer, number):
        with pytest.raises(WrongKind, match=r"^op: n: expected an? (finite n|inte)"):
            check("op", "n", value)
    assert issubclass(WrongKind, TypeError)
    assert issubclass(WrongKind, ValueError)


@pytest.mark.parametrize("value", [1, 0.0, "no", None, torch.tensor(1), torch.tensor([True])])
def test_values_that_are_not_bools_are_rejected_as_flags(value):
    with pytest.raises(WrongKind, match=r"^op: on: expected True or False, found "):
        flag("op", "on", value)


@pytest.mark.parametrize("value", [2.0, np.float64(2), torch.tensor(2.0), math.nan])
def test_floats_are_rejected_as_integers(value):
    with pytest.raises(WrongKind, match="expected an integer from 1, found "):
        integer("op", "n", value, 1)


@pytest.mark.parametrize("value", [math.nan, np.float32("nan"), math.inf, -math.inf, 10**400])
def test_nan_infinity_and_integers_too_large_for_floats_are_out_of_range(value):
    with pytest.raises(ValueError, match=r"^op: x: expected a finite number, found"):
        number("op", "x", value)
    for bounds in ({"minimum": -5}, {"maximum": 5}, {"above": 0, "below": 1}):
        with pytest.raises(ValueError, match=r"^op: x: expected a number"):
            number("op", "x", value, **bounds)


def test_infinite_bounds_allow_infinity_but_not_nan():
    assert number("op", "x", math.inf, 0, math.inf) == math.inf
    with pytest.raises(ValueError, match="found nan"):
        number("op", "x", math.nan, maximum=math.inf)


@pytest.mark.parametrize(
    ("bounds", "expected", "inside", "outside"),
    [
        ((1, None), "an integer from 1", [1, 2**70], [0, -1]),
        ((0, 6), "an integer from 0 to 6", [0, 6], [-1, 7]),
        ((None, 6), "an integer up to 6", [-9, 6], [7]),
    ],
)
def test_bounds_of_integers_are_checked(bounds, expected, inside, outside):
    assert [integer("op", "n", value, *bounds) for value in inside] == inside
    for value in outside:
        with pytest.raises(ValueError, match=rf"^op: n: expected {expected}, found {value}$") as e:
            integer("op", "n", value, *bounds)
        assert type(e.value) is ValueError


@pytest.mark.parametrize(
    ("bounds", "expected", "inside", "outside"),
    [
        ({"minimum": 0}, "a number from 0", [0, 0.5], [-1e-9]),
        ({"above": 0}, "a number above 0", [1e-9, 7], [0, 0.0]),
        ({"minimum": 0, "maximum": 1}, "a number in [0, 1]", [0, 1], [-0.5, 1.5]),
        ({"above": 0, "maximum": 1}, "a number in (0, 1]", [0.5, 1], [0, 1.5]),
        ({"minimum": 0, "below": 1}, "a number in [0, 1)", [0, 0.5], [1, -1]),
        ({"below": 1}, "a number below 1", [-3], [1]),
        ({"maximum": 1}, "a number up to 1", [1], [1.5]),
    ],
)
def test_bounds_of_numbers_are_checked(bounds, expected, inside, outside):
    assert [number("op", "x", value, **bounds) for value in inside] == inside
    for value in outside:
        with pytest.raises(ValueError) as error:
            number("op", "x", value, **bounds)
        assert str(error.value) == f"op: x: expected {expected}, found {value!r}"


def test_expected_text_replaces_the_text_of_the_bounds():
    with pytest.raises(ValueError, match=r"^op: n: expected a rank, found 0$"):
        integer("op", "n", 0, 1, expected="a rank")


def test_choice_returns_the_equal_option_of_the_same_type():
    assert choice("op", "mode", np.str_("b"), ("a", "b")) == "b"
    for value in ("c", 1, None, ["a"], np.array(["a", "b"])):
        with pytest.raises(ValueError, match=r"^op: mode: expected one of \('a', 'b'\), found"):
            choice("op", "mode", value, ("a", "b"))


def test_instance_error_contains_the_type_and_not_the_value():
    instance("op", "layer", torch.nn.Linear(1, 1), torch.nn.Module)
    with pytest.raises(WrongKind, match=r"^op: n: expected an int or str, found list$"):
        instance("op", "n", [1], (int, str))


def test_require_raises_the_given_exception():
    with pytest.raises(KeyError, match="op: name: expected one that is loaded, found 'a'"):
        require(False, "op", "name", "one that is loaded", "'a'", KeyError)


@dataclass(frozen=True)
class Settings:
    rank: int = 8
    share: float = 0.5
    mode: Literal["a", "b"] = "a"
    on: bool = True
    most: int | None = None
    names: Any = ()

    def __post_init__(self) -> None:
        table = {
            "rank": within(1),
            "share": within(above=0, maximum=1),
            "most": within(1),
            "names": lambda where, name, value: tuple(value),
        }
        check_fields(self, table)


def test_dataclass_stores_the_values_that_its_checks_return():
    found = Settings(np.int32(4), torch.tensor(1.0), "b", np.bool_(False), np.int64(2), ["x"])
    assert found == Settings(4, 1.0, "b", False, 2, ("x",))
    assert [type(v) for v in vars(found).values()] == [int, float, str, bool, int, tuple]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rank", 0, "an integer from 1"),
        ("rank", None, "an integer from 1"),
        ("share", 0, r"a number in \(0, 1\]"),
        ("mode", "c", r"one of \('a', 'b'\)"),
        ("on", 1, "True or False"),
        ("most", 0, "an integer from 1"),
    ],
)
def test_dataclass_fields_are_checked_by_annotations_and_table(field, value, expected):
    with pytest.raises(ValueError, match=f"^Settings: {field}: expected {expected}, found"):
        Settings(**{field: value})
