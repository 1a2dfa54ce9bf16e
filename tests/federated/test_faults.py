"""Only invalid replies are rejected; errors name client, key, and expected and found values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from federated_rounds import key, make_state, make_update, same_bits

from lora_ext.federated import LayerPlan, Update, aggregate

GOOD = make_update(1, examples=30)
A0, B0 = key(0, "A"), key(0, "B")


def changed(**tensors: Any) -> Update:
    """Return a reply of client 7 with ``tensors`` instead of its own; None removes a tensor."""
    bad = make_update(7)
    found = {**bad.tensors, **{k.replace("__", "."): v for k, v in tensors.items()}}
    return dataclasses.replace(bad, tensors={k: v for k, v in found.items() if v is not None})


def with_tensor(name: str, value: Any) -> Update:
    return changed(**{name: value})


class Odd:
    """Object with a ``__repr__`` that raises. A client could send such an object."""

    def __repr__(self) -> str:
        raise RuntimeError


NOT_FINITE = torch.ones(3, 5)
NOT_FINITE[1, 2] = math.inf

FAULTS = {
    "failed": (
        dataclasses.replace(make_update(7), failed=True),
        "reply: expected a trained update, found a failed update",
    ),
    "nested": (
        with_tensor(A0, torch.nested.nested_tensor([torch.ones(5), torch.ones(2)])),
        f"{A0}: expected a dense tensor, found a nested tensor",
    ),
    "one row is not broadcast": (
        with_tensor(A0, torch.ones(1, 5)),
        rf"{A0}: expected shape \[3, 5\], found shape \[1, 5\]",
    ),
    "no row": (
        with_tensor(A0, torch.ones(0, 5)),
        rf"{A0}: expected shape \[3, 5\], found shape \[0, 5\]",
    ),
    "a number": (
        with_tensor(A0, torch.tensor(1.0)),
        rf"{A0}: expected shape \[3, 5\], found shape \[\]",
    ),
    "turned": (
        with_tensor(A0, torch.ones(5, 3)),
        rf"{A0}: expected shape \[3, 5\], found shape \[5, 3\]",
    ),
    "another rank than planned": (
        dataclasses.replace(make_update(7, (1,), (3,)), plan=LayerPlan((1,), (2,))),
        rf"{key(1, 'A')}: expected shape \[2, 5\], found shape \[3, 5\]",
    ),
    "a rank above the global one": (
        dataclasses.replace(make_update(7, (1,)), plan=LayerPlan((1,), (9,))),
        rf"{key(1, 'A')}: plan.ranks: expected at most 3, found 9",
    ),
    "an unknown name": (
        with_tensor("x.lora_A.weight", torch.ones(3, 5)),
        "x.lora_A.weight: expected a name of the global state, found another name",
    ),
    "a name that is no string": (
        dataclasses.replace(make_update(7), tensors={1: torch.ones(1)}),
        "1: expected a name of the global state",
    ),
    "outside the plan": (
        dataclasses.replace(make_update(7), plan=LayerPlan((1, 2))),
        rf"{A0}: expected one of layers \(1, 2\), found layer 0",
    ),
    "integers": (
        with_tensor(A0, torch.ones(3, 5, dtype=torch.int32)),
        rf"{A0}: expected one of .*torch.float64.*, found torch.int32",
    ),
    "complex numbers": (
        with_tensor(A0, torch.ones(3, 5, dtype=torch.complex64)),
        rf"{A0}: expected one of .*, found torch.complex64",
    ),
    "eight bits": (
        with_tensor(A0, torch.ones(3, 5).to(torch.float8_e4m3fn)),
        rf"{A0}: expected one of .*, found torch.float8_e4m3fn",
    ),
    "sparse": (
        with_tensor(A0, torch.ones(3, 5).to_sparse()),
        rf"{A0}: expected a dense tensor, found torch.sparse_coo",
    ),
    "on meta": (
        with_tensor(A0, torch.ones(3, 5, device="meta")),
        rf"{A0}: expected a dense tensor, found a meta tensor",
    ),
    "no tensor": (with_tensor(A0, Odd()), rf"{A0}: expected a tensor, found Odd"),
    "no mapping": (
        dataclasses.replace(make_update(7), tensors=[torch.ones(1)]),
        "tensors: expected a mapping, found list",
    ),
    "nothing": (
        dataclasses.replace(make_update(7), tensors={}, plan=LayerPlan(())),
        "tensors: expected at least one tensor that can be averaged, found none",
    ),
    "a module is missing": (
        changed(**{A0: None, B0: None}),
        rf"{A0}: expected a tensor of the plan, found none",
    ),
    "half a pair": (with_tensor(B0, None), rf"{B0}: expected a tensor, since .*{A0}, found none"),
    "the other half": (with_tensor(A0, None), rf"{A0}: expected a tensor, .*{B0}, found none"),
    "nan": (
        with_tensor(A0, torch.full((3, 5), math.nan)),
        rf"{A0}: expected finite values, found 15 that are not finite",
    ),
    "infinity": (with_tensor(A0, NOT_FINITE), rf"{A0}: expected finite values, found 1 that"),
    "no plan": (
        dataclasses.replace(make_update(7), plan=None),
        "plan: expected a LayerPlan, found NoneType",
    ),
    "a layer that is not there": (
        dataclasses.replace(make_update(7), plan=LayerPlan((0, 4))),
        r"plan.layers: expected layers among \[0, 1, 2\], found 4",
    ),
    **{
        f"examples {i}": (
            dataclasses.replace(make_update(7), num_examples=examples),
            r"num-examples: expected a number above 0, up to \d+, found",
        )
        for i, examples in enumerate(
            (None, 0, -3, math.nan, math.inf, [10], "10", True, 10**5000, 1 + 2j)
        )
    },
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rank_agg", ["covered", "svd"])
def test_invalid_reply_is_rejected_and_the_others_are_averaged(fault: str, rank_agg: str):
    bad, message = FAULTS[fault]
    state = make_state()
    found = aggregate(state, [bad, GOOD], rank_agg=rank_agg)
    assert found.accepted == (1,)
    with pytest.raises(AssertionError, match=f"^client 7: {message}"):
        raise AssertionError(found.rejected[7])
    alone = aggregate(state, [GOOD], rank_agg=rank_agg)
    assert same_bits(found.state, alone.state)
    assert found.noise == alone.noise
    assert not found.skipped


@pytest.mark.parametrize("fault", FAULTS)
def test_round_of_invalid_replies_is_skipped(fault: str):
    state = make_state()
    found = aggregate(state, [FAULTS[fault][0]])
    assert found.skipped
    assert found.reason == "replies: expected at least 1, found 0"
    assert all(found.state[k] is state[k] for k in state)
    assert found.state.keys() == state.keys()
    assert (found.accepted, found.uncovered, found.noise) == ((), (0, 1, 2), {})


def test_too_few_replies_skip_the_round():
    state = make_state()
    before = {k: v.clone() for k, v in state.items()}
    found = aggregate(state, [GOOD, FAULTS["nan"][0]], min_replies=2)
    assert found.skipped
    assert found.reason == "replies: expected at least 2, found 1"
    assert found.accepted == (1,)
    assert same_bits(found.state, before)
    assert aggregate(state, []).skipped


def test_zero_weights_skip_the_round():
    replies = [dataclasses.replace(make_update(i), num_examples=0) for i in range(3)]
    for weighted_by in ("num-examples", None):
        found = aggregate(make_state(), replies, weighted_by=weighted_by)
        assert found.skipped
        assert set(found.rejected) == {0, 1, 2}


def test_drop_tensor_drops_only_the_tensor():
    state, bad = make_state(), FAULTS["nan"][0]
    found = aggregate(state, [bad, GOOD], nan_policy="drop_tensor")
    assert found.accepted == (1, 7)
    alone, both = aggregate(state, [GOOD]).state, aggregate(state, [make_update(7), GOOD]).state
    for k in state:
        assert torch.equal(found.state[k], (alone if k == A0 else both)[k])
    assert found.noise[0] != 0
    for rank_agg in ("svd", "stack", "fro"):  # rules that need both factors
        with_pair = aggregate(state, [bad, GOOD], rank_agg=rank_agg, nan_policy="drop_tensor")
        without = aggregate(state, [GOOD], rank_agg=rank_agg)
        assert torch.equal(with_pair.state[B0], without.state[B0])
    all_bad = {k: v * math.nan for k, v in bad.tensors.items()}
    nothing = dataclasses.replace(bad, tensors=all_bad)
    found = aggregate(state, [nothing], nan_policy="drop_tensor")
    assert "tensors: expected at least one" in found.rejected[7]


def test_nan_policy_raise_names_client_and_key():
    with pytest.raises(ValueError, match=rf"^aggregate: client 7: {A0}: expected finite values"):
        aggregate(make_state(), [FAULTS["nan"][0], GOOD], nan_policy="raise")
    rejected = aggregate(make_state(), [FAULTS["turned"][0]], nan_policy="raise").rejected
    assert "shape" in rejected[7]  # Faults other than NaN do not raise.


def test_partial_replies_are_averaged_for_their_modules():
    state = make_state()
    found = aggregate(state, [FAULTS["a module is missing"][0], GOOD], partial_ok=True)
    assert found.accepted == (1, 7)
    alone, both = aggregate(state, [GOOD]).state, aggregate(state, [make_update(7), GOOD]).state
    for k in state:
        assert torch.equal(found.state[k], (alone if k in (A0, B0) else both)[k])
    half = aggregate(state, [FAULTS["half a pair"][0], GOOD], partial_ok=True)
    assert half.rejected[7].endswith(f"since the reply has {A0}, found none")


def test_equal_replies_of_a_client_count_once_and_different_ones_are_rejected():
    state = make_state()
    once = aggregate(state, [GOOD, make_update(7)])
    again = aggregate(state, [make_update(7), GOOD, make_update(7)])
    assert same_bits(once.state, again.state)
    other = dataclasses.replace(make_update(7), num_examples=11)
    for pair in ([make_update(7), other], [other, make_update(7)]):
        found = aggregate(state, [*pair, GOOD])
        assert found.rejected == {
            7: "client 7: reply: expected one reply, or equal replies, found two that differ"
        }
        assert same_bits(found.state, aggregate(state, [GOOD]).state)
    values = make_update(7)
    values.tensors[A0] = values.tensors[A0] + 1e-9
    assert 7 in aggregate(state, [make_update(7), values]).rejected
    empty = [with_tensor(A0, torch.ones(0, 5))] * 2
    assert "expected shape" in aggregate(state, empty).rejected[7]
    many = dataclasses.replace(make_update(7), num_examples=10**5000)
    assert "num-examples" in aggregate(state, [many, many, GOOD]).rejected[7]
    lost = [FAULTS["nan"][0]] * 2  # The two replies count as equal, although NaN != NaN.
    assert aggregate(state, lost, nan_policy="drop_tensor").accepted == (7,)


def test_values_outside_the_range_of_the_state_are_rejected():
    state = make_state(dtype=torch.float16)
    huge = with_tensor(A0, torch.full((3, 5), 1e6, dtype=torch.float64))
    found = aggregate(state, [huge, GOOD])
    assert found.rejected[7].endswith(
        f"{A0}: expected values that torch.float16 can hold, found 1e+06"
    )
    steep = with_tensor(A0, torch.full((3, 5), 60000.0))
    found = aggregate(state, [steep], server_lr=4.0)
    assert found.skipped
    assert found.reason.startswith(f"{A0}: expected values that torch.float16 can hold")
    assert all(found.state[k] is state[k] for k in state)
    wild = with_tensor(A0, torch.full((3, 5), 1e300, dtype=torch.float64))
    for rank_agg in ("covered", "fro", "svd", "stack"):
        wide = aggregate(make_state(), [wild, GOOD], rank_agg=rank_agg).state
        assert all(bool(v.isfinite().all()) for v in wide.values())
    heavy = dataclasses.replace(wild, num_examples=2**53)
    assert not aggregate(make_state(), [heavy, GOOD]).skipped
    skipped = aggregate(make_state(), [wild, GOOD], rank_agg="svd")
    assert skipped.reason.startswith("layers.0.q: expected products with a finite norm, found")


def test_updates_of_other_types_are_refused():
    with pytest.raises(TypeError, match="updates: expected Update values, found dict"):
        aggregate(make_state(), [{}])
