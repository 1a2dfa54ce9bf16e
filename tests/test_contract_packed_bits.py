"""Packed products of weights of 8 and 4 bits on twins and kernels: no row depends on another."""

from typing import Any

import pytest
import torch
from backends import Backend
from cases_packed_linear import (
    DTYPES,
    FORMATS,
    adapters,
    bits_bounds,
    bits_dtypes,
    bits_formula,
    bits_inputs,
    bits_product,
    make,
)
from contract import assert_same_bits, off_grid, with_threads

from lora_ext import ops, reference
from lora_ext.layers.base._packed_only import MAX_CUDA_ROWS

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize(("bits", "minimum"), FORMATS)
@pytest.mark.parametrize("int8", [False, True])
def test_bits_of_a_row_of_a_rounded_weight_depend_on_the_row_alone(
    backend: Backend, bits: int, minimum: bool, int8: bool
) -> None:
    if int8 and not backend.is_twin:
        pytest.skip("only the twin rounds rows to 8 bits")
    most, out = (70, 102) if backend.is_twin else (MAX_CUDA_ROWS, 150)
    how = {"bits": bits, "group": 64, "minimum": minimum}
    for dtype in bits_dtypes(backend):
        x, weight, bias = (t.to(backend.device) for t in make((most, 1024, out), dtype, False))
        packed = ops.pack_weight(weight, **how)
        together = ops.packed_linear(x, packed, bias, out, int8)
        few = [1, 2, 3, 4, 5, 8, 11, 12, 13, 16, 24, 25, 32, 33, 64]
        for rows in few if backend.is_twin else [1, 8, 9, 16, 17, 32, 33]:
            first, last = x[:rows], x[-rows:]
            assert_same_bits(ops.packed_linear(first, packed, bias, out, int8), together[:rows])
            assert_same_bits(ops.packed_linear(last, packed, bias, out, int8), together[-rows:])
        apart = off_grid(bias[:, None])[:, 0]
        for _ in with_threads(1, 2, 3) if backend.is_twin else [1]:
            assert_same_bits(ops.pack_weight(off_grid(weight), **how), packed)
            assert_same_bits(ops.packed_linear(off_grid(x), packed, apart, out, int8), together)
            assert_same_bits(ops.packed_linear(x[:1], packed, bias, out, int8), together[:1])


@pytest.mark.parametrize("form", [None, *FORMATS])
def test_product_and_update_by_one_op_have_the_bits_of_two(
    backend: Backend, form: tuple[int, bool] | None
) -> None:
    if form is None and backend.device != "cpu":
        pytest.skip("weights that are not rounded are packed only on the CPU")
    shape = 12, 192, 70
    how = {} if form is None else {"bits": form[0], "minimum": form[1]}
    for dtype in bits_dtypes(backend) if form else DTYPES:
        x, weight, bias = (t.to(backend.device) for t in make(shape, dtype, exact=False))
        packed, update = ops.pack_weight(weight, **how), adapters(shape, dtype, backend.device)
        a, b, ids, scale, *rest = update
        weights, mixed = torch.rand(12, 2).to(x.device), torch.stack([ids, ids.roll(1)], 1)
        mixture: tuple[Any, ...] = (a, b, mixed, scale, *rest[:3], weights, None)
        for given in (update, mixture):
            for each in (bias, None):
                product = packed, each, 70, False
                two = ops.packed_linear(x, *product)
                of_rows = None if given is update else weights
                ops.lora_apply_(two, x, *given[:7], weights=of_rows)
                for turned in (x, x.view(4, 3, 192), off_grid(x)):
                    found = ops.packed_lora_linear(turned, product, given)
                    assert_same_bits(found, two.view(*turned.shape[:-1], 70))


def test_codes_at_any_address_give_the_same_bits(backend: Backend) -> None:
    x, weight, _ = (t.to(backend.device) for t in make((3, 64, 40), torch.float32, exact=False))
    packed = ops.pack_weight(weight, bits=8)
    room = packed.new_empty(packed.numel() + 1)[1:].view_as(packed).copy_(packed)
    assert_same_bits(ops.packed_linear(x, room, None, 40), ops.packed_linear(x, packed, None, 40))


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-6, 1e-9, 0.0, 60000.0])
def test_rounded_weights_equal_the_formula_bit_for_bit(backend: Backend, scale: float) -> None:
    g = torch.Generator().manual_seed(3)
    for dtype in bits_dtypes(backend):
        # Adding 0 turns -0.0 into 0.0, because the sign of a minimum that is zero is not defined.
        weight = ((torch.rand(45, 128, generator=g) * 2 - 1) * scale).to(dtype) + 0.0
        for bits, minimum in FORMATS:
            for group in (32, 64, 128):
                expected = reference.pack_weight(weight, bits, group, minimum)
                found = ops.pack_weight(
                    weight.to(backend.device), bits=bits, group=group, minimum=minimum
                )
                assert_same_bits(found, expected)
                for wanted in bits_dtypes(backend):
                    back = ops.unpack_weight(found, 45, 128, dtype=wanted)
                    assert_same_bits(back, reference.unpack_weight(expected, 45, 128, dtype=wanted))


def test_4_bits_keep_multiples_of_a_seventh(backend: Backend) -> None:
    codes = torch.randint(-7, 8, (40, 128), generator=torch.Generator().manual_seed(4)).float()
    codes[:, ::32] = torch.tensor([7.0, -7.0]).repeat(20)[:, None]
    for weight, bound in ((codes, 0.0), (codes * 0.375, 0.0), (codes.sign() * 0.0625, 2**-11)):
        packed = ops.pack_weight(weight.to(backend.device), bits=4, group=32)
        assert_same_bits(packed, reference.pack_weight(weight, 4, 32, False))
        back = ops.unpack_weight(packed, 40, 128).cpu()
        assert ((back - weight).abs() <= bound * weight.abs()).all()


def test_rows_that_are_not_finite_affect_only_their_outputs(backend: Backend) -> None:
    for bits, minimum in FORMATS:
        for int8 in (False, True) if backend.is_twin else (False,):
            x = torch.randn(5, 64, device=backend.device)
            weight = torch.randn(40, 64, device=backend.device)
            packed = ops.pack_weight(weight, bits=bits, minimum=minimum)
            expected = ops.packed_linear(x, packed, None, 40, int8)
            x[3, 7] = torch.nan
            found = ops.packed_linear(x, packed, None, 40, int8)
            assert found[3].isnan().all()
            assert_same_bits(found[[0, 1, 2, 4]], expected[[0, 1, 2, 4]])


def test_inputs_of_any_magnitude_stay_within_the_bounds(backend: Backend) -> None:
    """Groups of zeros, subnormal numbers and large numbers, the largest number below a power of
    two, and magnitudes that differ within a group."""
    sizes = [0.0, 1e-42, 1e-30, 1e30, 1 - 2**-24, -(1 - 2**-24), 2.0**20, -(2.0**-126)]
    for form in FORMATS:
        i = bits_inputs((16, 128, 40), torch.float32, device=backend.device, form=form)
        for t, size in enumerate(sizes):
            i["x"][t, ::2] = size
            i["x"][8 + t, 3] = size
        exact = bits_formula(i)
        error = (bits_product(i)["y"].cpu().double() - exact["y"]).abs()
        # Subnormal numbers may count as zero.
        assert (error <= bits_bounds(i, exact)["y"] + 128 * 2.0**-118).all()


def test_kernels_raise_for_what_only_the_twin_computes(backend: Backend) -> None:
    if backend.is_twin:
        pytest.skip("this test runs only on kernels")
    x = torch.zeros(MAX_CUDA_ROWS + 1, 64, device=backend.device)
    packed = ops.pack_weight(torch.zeros(40, 64, device=backend.device), bits=8)
    text = r"packed_linear: x: expected at most 64 rows on CUDA; .*unpack_weight.*torchao.*found 65"
    with pytest.raises(ValueError, match=text):
        ops.packed_linear(x, packed, None, 40)
    text = "expected float32, float16 or bfloat16 on this device"
    with pytest.raises(ValueError, match=text):
        ops.packed_linear(x[:3].double(), packed, None, 40)
    with pytest.raises(ValueError, match=text):
        ops.pack_weight(x.double(), bits=8)
    if backend.device == "cpu":
        return  # All tensors of an emulator are on the CPU.
    with pytest.raises(ValueError, match="int8: expected False on CUDA, found True"):
        ops.packed_linear(x[:3], packed, None, 40, int8=True)
    with pytest.raises(ValueError, match=r"packed: expected a tensor on cuda.*found cpu"):
        ops.packed_linear(x[:3], packed.cpu(), None, 40)
    with pytest.raises(ValueError, match="packed: expected a tensor on cpu, found cuda"):
        ops.packed_linear(x[:3].cpu(), packed, None, 40)
    with pytest.raises(ValueError, match="weight: expected a tensor on the CPU"):
        ops.pack_weight(x)


def test_fake_kernels_take_float16_beside_weights_of_8_and_4_bits() -> None:
    weight = torch.empty(40, 64, dtype=torch.float16, device="meta")
    packed = ops.pack_weight(weight, bits=8, group=32)
    assert packed.shape == (2, 2, 32 * 32 + 64) and packed.dtype == torch.uint8
    assert ops.pack_weight(weight, bits=4).shape == (2, 1, 2, 32 * 16 + 32)
    assert ops.unpack_weight(packed, 40, 64, dtype=torch.float16).dtype == torch.float16
    y = ops.packed_linear(weight[:3], packed, None, 40)
    assert y.shape == (3, 40) and y.dtype == torch.float16
