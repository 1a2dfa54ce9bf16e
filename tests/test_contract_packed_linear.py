"""Packed products and pointwise functions on the CPU: no result depends on the other rows."""

import pytest
import torch
from backends import Backend
from cases_packed_linear import DTYPES, SHAPES, make, product
from cases_pointwise import FUNCTIONS, inputs
from contract import assert_same_bits, off_grid, with_threads

from lora_ext import ops, reference

pytestmark = pytest.mark.hosts


@pytest.fixture(autouse=True)
def on_the_cpu(backend: Backend) -> None:
    if backend.device != "cpu":
        pytest.skip("weights are packed only on the CPU")


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_equals_the_formula(backend: Backend, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = make(shape, dtype, exact=False)[1]
        assert_same_bits(ops.pack_weight(weight), reference.pack_weight(weight))
        assert_same_bits(ops.pack_weight(off_grid(weight)), reference.pack_weight(weight))
        turned = weight.t().contiguous().t()
        assert_same_bits(ops.pack_weight(turned), reference.pack_weight(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_row_do_not_depend_on_other_rows(backend: Backend, dtype: torch.dtype) -> None:
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


def test_non_finite_values_affect_only_their_row_and_output(backend: Backend) -> None:
    for dtype in DTYPES:
        x, weight, bias = make((12, 35, 40), dtype, exact=True)
        x[3, 34], weight[7, 2] = torch.nan, torch.inf
        wide = x.double() @ weight.double().t() + bias.double()
        assert_same_bits(product(x, weight, bias).isnan(), wide.isnan())
        finite = wide.isfinite()
        assert_same_bits(product(x, weight, bias)[finite], wide[finite].to(dtype))


X, W = torch.zeros(3, 4), torch.zeros(40, 4)


def test_inputs_that_require_gradients_raise(backend: Backend) -> None:
    with pytest.raises(RuntimeError, match="packed_linear has no backward"):
        ops.packed_linear(X.clone().requires_grad_(), ops.pack_weight(W), None, 40)
    with pytest.raises(RuntimeError, match="pointwise has no backward"):
        ops.pointwise(torch.zeros(3, requires_grad=True), "silu")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bits_of_a_result_do_not_depend_on_its_position_or_the_threads(
    backend: Backend, function: str
) -> None:
    for dtype in DTYPES:
        x = inputs((23, 8192), dtype, seed=3, spread=3.0)["x"].abs()
        expected = ops.pointwise(x, function)
        for _ in with_threads(1, 3, 6):
            assert_same_bits(ops.pointwise(x, function), expected)
            for width in (1, 33, 172, 1000):
                rows = x[:, :width]
                assert_same_bits(ops.pointwise(rows, function), expected[:, :width])
                alone = torch.stack([ops.pointwise(row, function) for row in rows])
                assert_same_bits(alone, expected[:, :width])


def test_output_has_the_strides_of_the_input_and_strides_change_no_bit(backend: Backend) -> None:
    x = inputs((12, 35), torch.float32)["x"]
    y = ops.pointwise(x, "silu")
    assert_same_bits(ops.pointwise(off_grid(x), "silu"), y)
    turned = ops.pointwise(x.t(), "silu")
    assert turned.stride() == x.t().stride()
    assert_same_bits(turned.t(), y)
    assert_same_bits(ops.pointwise(x[:1].expand(4, 35), "silu"), y[:1].expand(4, 35))


def test_non_finite_and_large_numbers_affect_only_their_position(
    backend: Backend,
) -> None:
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0**25, 0.0, 1e-40, -100.0, 90.0])
    for dtype in DTYPES:
        for function in FUNCTIONS:
            x = values.to(dtype)
            among = ops.pointwise(torch.cat([torch.ones(11, dtype=dtype), x]), function)[11:]
            assert_same_bits(ops.pointwise(x, function), among)
            assert among[0].isnan()
    assert ops.pointwise(values[1:4], "cos").isnan().all()
    assert ops.pointwise(values[1:3], "tanh").tolist() == [1.0, -1.0]
    assert ops.pointwise(values[1:3], "softplus").tolist() == [torch.inf, 0.0]
    assert ops.pointwise(values[1:3], "sigmoid").tolist() == [1.0, 0.0]


@pytest.mark.parametrize("function", ["sin", "gelu", "gelu_tanh", "silu", "tanh"])
def test_zero_keeps_its_sign_in_functions_that_map_zero_to_zero(
    backend: Backend, function: str
) -> None:
    for dtype in DTYPES:
        y = ops.pointwise(torch.tensor([0.0, -0.0], dtype=dtype), function)
        assert not y.any()
        assert y.signbit().tolist() == [False, True]
