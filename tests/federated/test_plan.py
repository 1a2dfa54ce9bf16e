"""`LayerPlan`: its contents, its errors, and its representation in messages."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_ext.federated import LayerPlan


def test_ranks_are_sorted_with_their_layers():
    plan = LayerPlan([5, 0, 3], [16, 4, 8])
    assert (plan.layers, plan.ranks) == ((0, 3, 5), (4, 8, 16))
    assert plan.rank_of(3, full=64) == 8
    assert LayerPlan([3]).rank_of(3, full=64) == 64


@given(
    st.dictionaries(st.integers(0, 99), st.integers(1, 512), max_size=8),
    st.booleans(),
)
def test_plan_round_trips_through_a_message(ranks: dict[int, int], with_ranks: bool):
    plan = LayerPlan(tuple(ranks), tuple(ranks.values()) if with_ranks else None)
    config = plan.to_config()
    assert ("ranks" in config) == bool(with_ranks and ranks)
    assert LayerPlan.from_config({**json.loads(json.dumps(config)), "lr": 0.1}) == plan


def test_numpy_integers_are_accepted():
    plan = LayerPlan(np.array([2, 1]), np.array([4, 8]))
    assert plan == LayerPlan((1, 2), (8, 4))
    json.dumps(plan.to_config())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((True,),), TypeError, "layers: expected integers, found True"),
        (((1.0,),), TypeError, "layers: expected integers, found 1.0"),
        (("12",), TypeError, "layers: expected integers, found '12'"),
        ((3,), TypeError, "layers: expected integers, found 3"),
        (((-1,),), ValueError, "layers: expected integers from 0, found -1"),
        (((1, 1),), ValueError, "layers: expected each layer once, found 1 twice"),
        (((1, 2), (4,)), ValueError, "ranks: expected one rank for each of 2 layers"),
        (((1,), (0,)), ValueError, "ranks: expected integers from 1, found 0"),
        (((1,), (True,)), TypeError, "ranks: expected integers, found True"),
    ],
)
def test_invalid_plans_are_refused(arguments: tuple, error: type[Exception], message: str):
    with pytest.raises(error, match=f"^LayerPlan: {message}"):
        LayerPlan(*arguments)


def test_message_without_a_plan_is_refused():
    with pytest.raises(ValueError, match=r"config: expected the key 'layers', found .'ranks'"):
        LayerPlan.from_config({"ranks": [1]})


def test_check_for_duplicate_layers_takes_no_quadratic_time():
    layers = range(200_000)  # A malicious client could send so many layers.
    assert LayerPlan(tuple(layers)).layers[-1] == 199_999
    with pytest.raises(ValueError, match="each layer once, found 199999 twice"):
        LayerPlan((*layers, 199_999))
