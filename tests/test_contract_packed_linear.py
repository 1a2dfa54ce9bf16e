"""What products with packed weights promise beyond the laws of the table."""

from __future__ import annotations

import pytest
import torch
from backends import Backend
from cases_packed_linear import DTYPES, SHAPES, make, product
from contract import assert_same_bits, off_grid, with_threads

from lora_ext import ops, reference

pytestmark = pytest.mark.hosts


@pytest.fixture(autouse=True)
def on_the_cpu(backend: Backend) -> None:
    if backend.device != "cpu":
        pytest.skip("weights are packed on the CPU alone")


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_follows_the_formula(backend: Backend, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = make(shape, dtype, exact=False)[1]
        assert_same_bits(ops.pack_weight(weight), reference.pack_weight(weight))
        assert_same_bits(ops.pack_weight(off_grid(weight)), reference.pack_weight(weight))
        turned = weight.t().contiguous().t()
        assert_same_bits(ops.pack_weight(turned), reference.pack_weight(weight))


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
    for _ in with_threads(1, 2, 3, 7):
        assert_same_bits(ops.pack_weight(weight), packed)
        assert_same_bits(ops.packed_linear(x, packed, bias, 301), expected)
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


X, W = torch.zeros(3, 4), torch.zeros(40, 4)


def test_gradients_are_refused(backend: Backend) -> None:
    with pytest.raises(RuntimeError, match="packed_linear has no backward"):
        ops.packed_linear(X.clone().requires_grad_(), ops.pack_weight(W), None, 40)
