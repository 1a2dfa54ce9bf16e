"""Products with packed weights: every law, on every instruction set of the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends import Backend
from cases import _values
from test_contract import assert_same_bits, off_grid
from torch import Tensor

from lora_ext import ops, reference

DTYPES = [torch.float32, torch.bfloat16]
# Rows, I, O: whole and part panels, chunks of 128 steps and beyond, an odd I, nothing at all.
SHAPES = [
    (1, 1, 1), (2, 7, 31), (3, 64, 32), (5, 33, 40), (8, 128, 96), (9, 129, 65), (12, 300, 33),
    (16, 257, 70), (17, 520, 64), (31, 96, 100), (32, 255, 32), (33, 40, 50), (70, 140, 37),
    (0, 5, 6), (4, 0, 6), (4, 5, 0),
]  # fmt: skip


@pytest.fixture(autouse=True)
def on_the_cpu(backend: Backend) -> None:
    if backend.device != "cpu":
        pytest.skip("weights are packed on the CPU alone")


def make(
    shape: tuple[int, int, int], dtype: torch.dtype, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, wide, out = shape
    g = torch.Generator().manual_seed(rows + 7 * wide + 31 * out)
    x, weight = _values(g, exact, (rows, wide), dtype), _values(g, exact, (out, wide), dtype)
    return x, weight, _values(g, exact, (out,), dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return ops.packed_linear(x, ops.pack_weight(weight), bias, weight.shape[0])


# --- the formula --------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_follows_the_formula(backend: Backend, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = make(shape, dtype, exact=False)[1]
        assert_same_bits(ops.pack_weight(weight), reference.pack_weight(weight))
        assert_same_bits(ops.pack_weight(off_grid(weight)), reference.pack_weight(weight))
        turned = weight.t().contiguous().t()
        assert_same_bits(ops.pack_weight(turned), reference.pack_weight(weight))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_give_the_exact_product(
    backend: Backend, dtype: torch.dtype, biased: bool
) -> None:
    for shape in SHAPES:
        x, weight, bias = make(shape, dtype, exact=True)
        wide = x.double() @ weight.double().t() + (bias.double() if biased else 0)
        got = product(x, weight, bias if biased else None)
        assert_same_bits(got, wide.to(dtype), f"{shape}: ")
        packed = reference.pack_weight(weight)
        formula = reference.packed_linear(x, packed, bias if biased else None, shape[2])
        assert torch.equal(formula, wide)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_values_stay_within_the_bound(backend: Backend, dtype: torch.dtype) -> None:
    """One rounding to float32 for each of I terms at most, two where pairs are multiplied, then
    one of the result."""
    last = torch.finfo(dtype).eps / 2
    for shape in SHAPES:
        x, weight, bias = make(shape, dtype, exact=False)
        packed = reference.pack_weight(weight)
        exact = reference.packed_linear(x, packed, bias, shape[2])
        size = reference.packed_linear(x.abs(), packed.abs(), bias.abs(), shape[2])
        bound = (2 * shape[1] + 1) * 2.0**-24 * size
        error = (product(x, weight, bias).double() - exact).abs()
        assert (error <= bound + last * (exact.abs() + bound)).all(), shape


# --- same row, same bits --------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_do_not_depend_on_the_other_rows(backend: Backend, dtype: torch.dtype) -> None:
    x, weight, bias = make((70, 301, 70), dtype, exact=False)
    packed = ops.pack_weight(weight)
    together = ops.packed_linear(x, packed, bias, 70)
    for rows in [1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 16, 17, 31, 32, 33, 64]:
        assert_same_bits(ops.packed_linear(x[:rows], packed, bias, 70), together[:rows])
        assert_same_bits(ops.packed_linear(x[-rows:], packed, bias, 70), together[-rows:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_strides_change_no_bit(backend: Backend, dtype: torch.dtype) -> None:
    x, weight, bias = make((9, 577, 301), dtype, exact=False)
    packed = ops.pack_weight(weight)
    expected = ops.packed_linear(x, packed, bias, 301)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert_same_bits(ops.pack_weight(weight), packed)
            assert_same_bits(ops.packed_linear(x, packed, bias, 301), expected)
    finally:
        torch.set_num_threads(threads)
    apart = off_grid(bias[:, None])[:, 0]
    assert_same_bits(ops.packed_linear(off_grid(x), packed, apart, 301), expected)


def test_what_is_not_finite_stays_with_its_row_and_output(backend: Backend) -> None:
    for dtype in DTYPES:
        x, weight, bias = make((12, 35, 40), dtype, exact=True)
        x[3, 34], weight[7, 2] = torch.nan, torch.inf
        wide = x.double() @ weight.double().t() + bias.double()
        assert_same_bits(product(x, weight, bias).isnan(), wide.isnan())
        finite = wide.isfinite()
        assert_same_bits(product(x, weight, bias)[finite], wide[finite].to(dtype))


# --- faults ---------------------------------------------------------------------------------------
X, W = torch.zeros(3, 4), torch.zeros(40, 4)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"pack_weight: weight: expected shape \(O, I\), found \[4\]",
         lambda: ops.pack_weight(W[0])),
        ("pack_weight: weight: expected float32 or bfloat16, found Double",
         lambda: ops.pack_weight(W.double())),
        (r"packed_linear: x: expected shape \(T, I\), found \[4\]",
         lambda: ops.packed_linear(X[0], ops.pack_weight(W))),
        ("packed_linear: x: expected float32 or bfloat16, found Half",
         lambda: ops.packed_linear(X.half(), ops.pack_weight(W))),
        ("packed_linear: packed: expected the dtype of x, BFloat16, found Float",
         lambda: ops.packed_linear(X.bfloat16(), ops.pack_weight(W))),
        (r"packed: expected pack_weight of a weight \(40, 3\), shape \[2, 3, 32\], found \[2, 4",
         lambda: ops.packed_linear(X[:, :3], ops.pack_weight(W), None, 40)),
        (r"pack_weight of a weight \(40, 4\), shape \[2, 2, 32, 2\], found \[2, 2, 64",
         lambda: ops.packed_linear(X.bfloat16(), ops.pack_weight(W[:, :3].bfloat16()), None, 40)),
        (r"pack_weight of a weight \(40, 3\), shape \[2, 2, 64\], found \[2, 2, 32",
         lambda: ops.packed_linear(X[:, :3].bfloat16(), ops.pack_weight(W.bfloat16()), None, 40)),
        (r"packed: expected pack_weight of a weight \(65, 4\)",
         lambda: ops.packed_linear(X, ops.pack_weight(W), None, 65)),
        ("packed_linear: packed: expected contiguous numbers",
         lambda: ops.packed_linear(X, ops.pack_weight(W).transpose(0, 1).contiguous().transpose(
             0, 1), None, 40)),
        (r"packed_linear: bias: expected shape \(O,\) = \[40\], found \[64\]",
         lambda: ops.packed_linear(X, ops.pack_weight(W), torch.zeros(64), 40)),
        ("packed_linear: out_features: expected at least 0, found -1",
         lambda: ops.packed_linear(X, ops.pack_weight(W), None, -1)),
    ],
    ids=range(12),
)  # fmt: skip
def test_refusals_name_the_argument(
    backend: Backend, message: str, call: Callable[[], Tensor]
) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_gradients_are_refused(backend: Backend) -> None:
    with pytest.raises(RuntimeError, match="packed_linear has no backward"):
        ops.packed_linear(X.clone().requires_grad_(), ops.pack_weight(W), None, 40)


def test_the_contract_of_an_op_holds(backend: Backend) -> None:
    library = getattr(torch.ops, backend.library)
    for dtype in DTYPES:
        x, weight, bias = make((5, 33, 40), dtype, exact=False)
        torch.library.opcheck(library.pack_weight.default, (weight,))
        args = x, ops.pack_weight(weight), bias, 40
        torch.library.opcheck(library.packed_linear.default, args)
