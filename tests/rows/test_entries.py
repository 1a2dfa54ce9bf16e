"""Entries of `adapters(names)`: names, weights and mixtures, and the errors for invalid ones."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from two_layers import inputs, make

import lora_ext
from lora_ext.rows import Assignment, Layout, UnknownAdapterError, _traced
from lora_ext.serving._names import CallNames

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("given", "shape", "names", "weights"),
    [
        ("a", (), ["a"], None),
        (None, (), [], None),
        ("__base__", (), [], None),
        (("a", 0.5), (), ["a"], [[0.5]]),
        (("a", 1), (), ["a"], None),
        (("a", 0), (), [], None),
        (("a", 1e-60), (), [], None),
        (("a", "b"), (2,), ["a", "b"], None),
        (("a", None), (2,), ["a"], None),
        (("a", {"b": 2}), (2,), ["a", "b"], [[1], [2]]),
        ({"b": 0.3, "a": 0.7}, (), [("a", "b")], [[0.7, 0.3]]),
        ({"b": 1, "a": 1, "c": 0}, (), [("a", "b")], None),
        ({"a": np.float32(0.5)}, (), ["a"], [[0.5]]),
        ({"a": Fraction(1, 4), "b": True + 1}, (), [("a", "b")], [[0.25, 2]]),
        ([{"a": 0}], (1,), [], None),
        ([("a", 0.5), "a", None], (3,), ["a"], [[0.5], [1], [0]]),
        ([{"a": 1, "b": -2}, ("c", 3)], (2,), [("a", "b"), "c"], [[1, -2], [3, 0]]),
        ([("a", "b")], (1, 2), ["a", "b"], None),
        ([["a", "b"], ["b", "a"]], (2, 2), ["a", "b"], None),
        ([[{"a": 1, "b": 2}, None]], (1, 2), [("a", "b")], [[1, 2], [0, 0]]),
    ],
)
def test_entries_have_names_and_weights(
    given: Any, shape: tuple[int, ...], names: list[Any], weights: Any
) -> None:
    found = Assignment.of(given)
    assert (found.shape, list(found.names)) == (shape, names)
    assert (None if found.weights is None else [list(row) for row in found.weights]) == weights


HOSTILE: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, "[]"),
    ((), ValueError, "()"),
    ({}, ValueError, "{}"),
    ([{}], ValueError, "{}"),
    (7, ValueError, "7"),
    (0.5, ValueError, "0.5"),
    (b"a", ValueError, "b'a'"),
    (object, ValueError, "object"),
    ({"a", "b"}, ValueError, "{"),
    (iter(["a"]), ValueError, "iterator"),
    ([3], ValueError, "3"),
    (["a", 3], ValueError, "3"),
    ([("a", 0.5, 1), "b"], ValueError, "('a', 0.5, 1)"),
    ([(0.5, "a"), "b"], ValueError, "(0.5, 'a')"),
    ((None, 0.5), ValueError, "(None, 0.5)"),
    ([None, ["a"]], ValueError, '{"a": 1, "b": 1}'),
    ([["a", "b"], None], ValueError, '{"a": 1, "b": 1}'),
    ([("a", "b"), {"a": 1}], ValueError, '{"a": 1, "b": 1}'),
    ([["a"], ["a", "b"]], ValueError, "[1, 2]"),
    ([[], []], ValueError, "[0]"),
    ([["a", 3]], ValueError, "3"),
    ([[["a"]]], ValueError, "['a']"),
    ({"a": NAN}, ValueError, "'a': expected a finite weight, found nan"),
    ({"a": INF}, ValueError, "found inf"),
    ({"a": 1, "b": -INF}, ValueError, "'b': expected a finite weight, found -inf"),
    (("a", NAN), ValueError, "found nan"),
    (("a", 1e39), ValueError, "found 1e+39"),
    (("a", 10**400), ValueError, "'a': expected a finite weight, found 1000"),
    ({"a": "1"}, TypeError, "'a': expected a real number as weight, found '1'"),
    ({"a": None}, TypeError, "found None"),
    ({"a": True}, TypeError, "found True"),
    ({"a": 1j}, TypeError, "found 1j"),
    ({"a": [1.0]}, TypeError, "found [1.0]"),
    ({"a": torch.tensor(1.0)}, TypeError, "found tensor(1.)"),
    (("a", True), TypeError, "found True"),
    (("a", np.bool_(True)), TypeError, "True"),
    ([("a", object()), None], TypeError, "object"),
    ({"__base__": 1}, ValueError, "'__base__'"),
    (("__base__", 0.5), ValueError, "'__base__'"),
    ({"": 1}, ValueError, "''"),
    ({None: 1}, ValueError, "None"),
    ({("a", "b"): 1}, ValueError, "('a', 'b')"),
    ({f"a{i}": 1 for i in range(65)}, ValueError, "1 to 64 adapters"),
]


@pytest.mark.parametrize(("given", "error", "text"), HOSTILE)
def test_invalid_entries_raise_with_argument_and_value(
    given: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as found:
        Assignment.of(given)
    message = str(found.value)
    assert "names" in message and text in message


#: Invalid values for one row. Functions that take a single entry must also reject them.
SINGLE = [(given, error, text) for given, error, text in HOSTILE if not isinstance(given, list)]


@pytest.mark.parametrize(("given", "error", "text"), SINGLE)
def test_every_door_refuses_an_invalid_entry(given: Any, error: type[Exception], text: str) -> None:
    model: Any = make()
    pool = model.up.pool
    layer = lora_ext.nn.LoraLinear(torch.nn.Linear(5, 4), "a", r=2)
    calls = {
        "AdapterPool.acquire: names: ": lambda: pool.acquire([given]),
        "add_requests: adapter_names: ": lambda: CallNames(pool, None).of_requests(
            "add_requests", [given], 1
        ),
        "adapters: names: ": lambda: layer(torch.ones(1, 5), adapter_names=given),
        "attach: default: ": lambda: lora_ext.attach(model, pool, default=given),
    }
    lora_ext.detach(model)
    for argument, call in calls.items():
        with pytest.raises(error) as found:
            call()
        assert str(found.value).startswith(argument) and text in str(found.value)
    assert pool.stats()["pins"] == 0
    model(inputs(1, 2))


def test_unknown_adapters_of_mixtures_are_named() -> None:
    model = make()
    for given in (
        {"red": 1, "gren": 2},
        [("gren", 0.5)] * 2,
        [["red", {"gren": 3}]],
        {"red": 1, "gren": 0},
        ["red", ("gren", 0)],
    ):
        with pytest.raises(UnknownAdapterError, match=r"names: adapter 'gren' is not load"):
            with lora_ext.adapters(given):
                model(inputs(2, 2))


def test_unknown_adapters_with_weight_0_are_named_by_layers() -> None:
    layer = lora_ext.nn.LoraLinear(torch.nn.Linear(5, 4), "red", r=2)
    x = torch.ones(2, 5)
    for given in ([{"red": 1, "gren": 0}, None], [("gren", 0.0)] * 2):
        with pytest.raises((KeyError, ValueError), match="'gren'"):
            layer(x, given)
        with pytest.raises(UnknownAdapterError, match="'gren'"):
            with lora_ext.adapters(given, pool=lora_ext.nn.layer_names):
                layer(x)
    torch.testing.assert_close(layer(x, [{"red": 0}] * 2), layer(x, [None] * 2))


def test_weights_follow_their_rows() -> None:
    names: Any = [{"a": 1, "b": 2}, None, ("a", 3)]
    found = Assignment.of(names)
    leading = torch.Size([3, 2])

    def rows(assignment: Assignment, size: torch.Size = leading) -> list[list[float]]:
        weights = assignment.row_weights(Layout(size, torch.device("cpu")))
        assert weights is not None and weights.dtype == torch.float32
        return weights.tolist()

    assert rows(found) == [[1, 2], [1, 2], [0, 0], [0, 0], [3, 0], [3, 0]]
    assert rows(found.times(2), torch.Size([6])) == rows(found)
    chosen = found.select([2, 0], 3)
    assert rows(chosen, torch.Size([2])) == [[3, 0], [1, 2]]
    assert chosen.spelled() == [("a", 3.0), {"a": 1.0, "b": 2.0}]
    assert found.spelled() == [{"a": 1.0, "b": 2.0}, "__base__", ("a", 3.0)]
    assert not found.same_as(Assignment.of([{"a": 1, "b": 3}, None, ("a", 3)]))
    of_tokens = Assignment.of(names, torch.tensor([[2, 0, -1]]))
    assert rows(of_tokens, torch.Size([1, 3]))[:2] == [[3, 0], [1, 2]]
    turned = Layout(torch.Size([2, 1]), torch.device("cpu"), True)
    per_token = Assignment.of([[("a", 2), ("a", 4)]])
    assert per_token.row_weights(turned).tolist() == [[2], [4]]  # pyright: ignore
    plain = Assignment.of(["a", {"a": 1}])
    assert plain.weights is None and plain.row_weights(Layout(leading, torch.device("cpu"))) is None


def test_compiled_graphs_with_their_own_adapters_refuse_weights() -> None:
    layer = lora_ext.nn.LoraLinear(torch.nn.Linear(5, 4), r=2)
    where = torch.Size([2]), torch.device("cpu"), False, False
    for given in [("default", 0.5)], [{"default": 2}]:
        with lora_ext.adapters(given * 2, pool=lora_ext.nn.layer_names):
            layer(torch.ones(2, 5))
            with pytest.raises(NotImplementedError, match=r"found .*default.*compiled.*AdapterP"):
                _traced.layer_rows(("default",), -1, *where)  # as in a compiled graph
