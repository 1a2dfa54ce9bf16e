"""Weight updates, merging and DoRA norms of adapters, compared with their formulas."""

from __future__ import annotations

import pytest
import torch
from cases import ROUNDING, _values
from torch import Tensor

from lora_ext import ops, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (5, 7, 3), (64, 48, 16), (33, 130, 8), (16, 24, 0)]


def factors(
    shape: tuple[int, int, int], dtype: torch.dtype, *, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    out, wide, rank = shape
    g = torch.Generator().manual_seed(out)
    return (
        _values(g, exact, (out, wide), dtype),
        _values(g, exact, (rank, wide), dtype, 0.2),
        _values(g, exact, (out, rank), dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_small_integer_results_are_exact(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight, a, b = factors(shape, dtype, exact=True)
    wide = [t.double() for t in (weight, a, b)]
    assert torch.equal(ops.lora_delta(a, b, 0.5).double(), reference.lora_delta(*wide[1:], 0.5))
    for sign in (1, -1):
        mine = ops.lora_merge_(weight.clone(), a, b, 2.0, sign)
        assert mine.dtype == dtype
        assert torch.equal(
            mine.double(), reference.lora_merge_(wide[0].clone(), *wide[1:], 2.0, sign)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_random_results_are_rounded_once(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight, a, b = factors(shape, dtype)
    wide = [t.double() for t in (weight, a, b)]
    accumulator = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    magnitude = wide[0].abs() + 3 * wide[2].abs() @ wide[1].abs()
    sums = (16 + shape[2] ** 0.5) * accumulator * magnitude
    exact = 3 * wide[2] @ wide[1]
    for got, expected in (
        (ops.lora_delta(a, b, 3.0), exact),
        (ops.lora_merge_(weight.clone(), a, b, 3.0), wide[0] + exact),
    ):
        tiny = torch.finfo(dtype).smallest_normal
        allowed = 1.02 * ROUNDING[dtype] * (expected.abs() + tiny) + sums
        assert ((got.double() - expected).abs() <= allowed).all()
    # The squared norm contains three sums of up to I products, which are all bounded by (|w| +
    # |b||a|)^2.
    norm = (wide[0] + exact).norm(dim=1)
    square = (16 + 2 * shape[1] ** 0.5) * accumulator * magnitude.sum(1).square()
    got = ops.lora_dora_norm(weight, a, b, 3.0).double()
    allowed = square / norm.clamp(min=1e-30) + accumulator * norm
    assert ((got - norm).abs() <= allowed).all()
    assert torch.allclose(got, norm, rtol=2e-6, atol=0)


def test_norm_of_a_weight_that_cancels_the_update_is_zero_and_not_nan() -> None:
    _, a, b = factors((33, 130, 8), torch.float32)
    norm = ops.lora_dora_norm(ops.lora_delta(a, b), a, b, -1.0)
    assert norm.isfinite().all() and (norm < 0.02).all()


def test_unmerging_restores_small_integers() -> None:
    weight, a, b = factors((5, 7, 3), torch.bfloat16, exact=True)
    merged = ops.lora_merge_(weight.clone(), a, b)
    assert not torch.equal(merged, weight)
    assert torch.equal(ops.lora_merge_(merged, a, b, sign=-1), weight)


def test_autocast_changes_nothing_and_only_the_delta_has_a_gradient() -> None:
    weight, a, b = factors((5, 7, 3), torch.float32)
    expected = ops.lora_dora_norm(weight, a, b)
    a.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        norm = ops.lora_dora_norm(weight, a, b)
        delta = ops.lora_delta(a, b)
    assert torch.equal(norm, expected) and not norm.requires_grad
    assert delta.dtype == torch.float32
    (gradient,) = torch.autograd.grad(delta.sum(), a)
    assert torch.allclose(gradient, b.sum(0)[:, None].expand_as(a))


def test_wrong_input_raises() -> None:
    weight, a, b = factors((5, 7, 3), torch.float32)
    for call, message in [
        (lambda: ops.lora_delta(a, b[:, 1:]), r"lora_delta: a and b: expected shapes \(r, I\)"),
        (lambda: ops.lora_delta(a[0], b), r"lora_delta: .* found \(7,\) and \(5, 3\)"),
        (lambda: ops.lora_merge_(weight.T, a, b), r"lora_merge_: weight: expected .*\[5, 7\]"),
        (
            lambda: ops.lora_merge_(weight, a, b, 1.0, 2),
            "lora_merge_: sign: expected 1 or -1, found 2",
        ),
        (lambda: ops.lora_merge_(weight.int(), a, b), "lora_merge_: weight: expected a floating"),
        (lambda: ops.lora_dora_norm(weight[1:], a, b), "lora_dora_norm: weight: expected shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
