"""Ranks that change between rounds: raising is exact, lowering gives the best approximation."""

from __future__ import annotations

import math

import pytest
import torch
from federated_rounds import key, make_state, same_bits
from torch import Tensor

from lora_ext.methods.legend import resize_lora, resize_state


def factors(rank: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(rank, 7, generator=g, dtype=torch.float64)
    return a.to(dtype), torch.randn(6, rank, generator=g, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_larger_rank_keeps_every_bit_and_the_product(dtype: torch.dtype):
    a, b = (torch.randint(-4, 5, t.shape).to(dtype) for t in factors())
    new_a, new_b, error = resize_lora(a, b, 6)
    assert error == 0
    assert torch.equal(new_a[:4], a)
    assert torch.equal(new_b[:, :4], b)
    assert torch.equal(new_b @ new_a, b @ a)
    assert not new_b[:, 4:].any()
    assert new_a[4:].any(1).all()  # no zero rows, which could not be trained
    assert (new_a.dtype, new_b.dtype) == (dtype, dtype)


def test_new_rows_are_initialised_like_those_of_a_new_adapter():
    a, _, _ = resize_lora(torch.zeros(1, 400), torch.zeros(3, 1), 200, torch.Generator())
    bound = 1 / math.sqrt(400)
    assert a[1:].abs().max() <= bound
    assert a[1:].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_smaller_rank_drops_the_smallest_singular_values(rank: int):
    a, b = factors()
    new_a, new_b, error = resize_lora(a, b, rank)
    u, s, vh = torch.linalg.svd(b @ a)
    assert (new_a.shape, new_b.shape) == ((rank, 7), (6, rank))
    assert error == pytest.approx(s[rank:].norm().item(), abs=1e-10)
    nearest = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    assert torch.allclose(new_b @ new_a, nearest, rtol=0, atol=1e-10)
    # Each factor contains the square roots of the singular values.
    assert torch.allclose(torch.linalg.svdvals(new_a)[:rank], s[:rank].sqrt(), atol=1e-10)


def test_growing_and_shrinking_back_keeps_the_product():
    a, b = factors()
    grown_a, grown_b, _ = resize_lora(a, b, 6)
    new_a, new_b, error = resize_lora(grown_a, grown_b, 4)
    assert error <= 1e-10
    assert torch.allclose(new_b @ new_a, b @ a, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r_new": -1}, "r_new: expected an integer from 0, found -1"),
        ({"r_new": 2.0}, "r_new: expected an integer from 0, found 2.0"),
        ({"a": torch.zeros(4)}, r"a: expected a matrix, found \[4\]"),
        ({"b": torch.zeros(6, 3)}, r"b: expected shape \(O, 4\), found \[6, 3\]"),
        ({"b": torch.full((6, 4), math.nan)}, "b: expected finite values, found NaN or inf"),
    ],
)
def test_invalid_factors_are_refused(change: dict, message: str):
    a, b = factors()
    with pytest.raises(ValueError, match=f"resize_lora: {message}"):
        resize_lora(**{"a": a, "b": b, "r_new": 2, **change})


def test_state_is_resized_by_layer_with_an_error_per_layer():
    state = {**make_state(layers=3), "head.weight": torch.ones(2)}
    before = {name: t.clone() for name, t in state.items()}
    found, errors = resize_state(state, (3, 2, 5))
    assert same_bits(state, before)
    assert found["head.weight"] is state["head.weight"]
    assert [found[key(i, "A")].shape[0] for i in range(3)] == [3, 2, 5]
    assert torch.equal(found[key(0, "B", "v")], state[key(0, "B", "v")])
    dropped = [
        torch.linalg.svdvals(state[key(1, "B", m)] @ state[key(1, "A", m)])[2:].square().sum()
        for m in ("q", "v")
    ]
    assert errors[1] == pytest.approx(math.sqrt(sum(dropped)), abs=1e-10)
    assert (errors[0], errors[2]) == (0, 0)


@pytest.mark.parametrize("ranks", [(3, 3), (3, 3, 0)])
def test_resize_state_needs_a_positive_rank_per_layer(ranks: tuple[int, ...]):
    with pytest.raises(ValueError, match="resize_state: ranks: expected"):
        resize_state(make_state(layers=3), ranks)
