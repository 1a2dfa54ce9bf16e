"""Pages of float8_e4m3fn in the LoRA ops: the same bits as widened pages, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from torch import Tensor

from lora_ext import ops, reference

E4M3 = torch.float8_e4m3fn
PAGES = 40


def finite_pages(*shape: int, seed: int) -> Tensor:
    """Return pages of random bytes, all values of the dtype except NaN."""
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    return torch.where(bits % 128 == 127, 0, bits).view(E4M3)


def case(rows: int, inputs: int, outputs: int, dtype: torch.dtype, ranks: list[int]) -> Any:
    """Return x, the pages, and the further arguments of an apply."""
    g = torch.Generator().manual_seed(rows + inputs)
    per_slot = -(-max(ranks) // 8)
    count = -(-torch.tensor(ranks) // 8)
    table = torch.full((len(ranks), per_slot), -1, dtype=torch.int32)
    free = torch.randperm(PAGES, generator=g).int()
    for s, n in enumerate(count.tolist()):
        table[s, :n], free = free[:n], free[n:]
    ids = torch.randint(-1, len(ranks), (rows,), generator=g)
    scale = 2.0 ** torch.randint(-22, -12, table.shape, generator=g)
    x = torch.randn(rows, inputs, generator=g).to(dtype)
    a = finite_pages(PAGES, 8, inputs, seed=1)
    b = finite_pages(PAGES, outputs, 8, seed=2)
    return x, a, b, (ids, scale, torch.tensor(ranks, dtype=torch.int32), table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "ranks"),
    [
        (1, 50, 70, [5]),
        (3, 1100, 1030, [16, 3, 0]),
        (9, 64, 48, [8, 24, 1]),
        (40, 2061, 33, [16, 7]),
        (300, 130, 200, [256, 12]),
        (20, 64, 48, [16, 8, 0]),
        (33, 560, 264, [64, 13, 3]),
        (70, 304, 136, [40, 256]),
    ],
)
def test_bits_are_those_of_widened_pages(
    backend: Backend,
    rows: int,
    inputs: int,
    outputs: int,
    ranks: list[int],
    dtype: torch.dtype,
) -> None:
    x, a, b, rest = case(rows, inputs, outputs, dtype, ranks)
    x, a, b, *rest = (t.to(backend.device) for t in (x, a, b, *rest))
    wide_a, wide_b = a.to(dtype), b.to(dtype)
    assert torch.equal(wide_a.float(), a.float()), "every value is a number of the dtype"
    assert torch.equal(ops.lora_apply(x, a, b, *rest), ops.lora_apply(x, wide_a, wide_b, *rest))
    v = ops.lora_shrink(x, a, *rest)
    assert torch.equal(v, ops.lora_shrink(x, wide_a, *rest))
    start = torch.randn(rows, outputs, generator=torch.Generator().manual_seed(3))
    y = [start.to(backend.device, dtype, copy=True) for _ in range(2)]
    ops.lora_expand_(y[0], v, b, rest[0], *rest[2:])
    ops.lora_expand_(y[1], v, wide_b, rest[0], *rest[2:])
    assert torch.equal(*y)
    many, one = torch.zeros_like(y[0]), torch.zeros_like(y[0])
    ids, scale, per_slot, table = rest
    ops.lora_apply_siblings_([many], x, [a], [b], ids, [scale], [per_slot], [table])
    ops.lora_apply_(one, x, a, b, *rest)
    assert torch.equal(many, one)


def test_equals_the_formula() -> None:
    x, a, b, rest = case(7, 40, 24, torch.float32, [16, 5])
    expected = reference.lora_apply(x.double(), a, b, *rest).float()
    torch.testing.assert_close(ops.lora_apply(x, a, b, *rest), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_is_widened_exactly(dtype: torch.dtype, flush: bool) -> None:
    # Output o is the value with the bits o, whether or not the processor flushes subnormals.
    values = torch.arange(256, dtype=torch.uint8).view(E4M3)
    b = torch.zeros(1, 256, 8).to(E4M3)
    b[0, :, 3] = values
    v = torch.zeros(1, 8)
    v[0, 3] = 1
    y, ids = torch.zeros(1, 256, dtype=dtype), torch.zeros(1, dtype=torch.long)
    ranks, table = torch.tensor([8], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    try:
        assert torch.set_flush_denormal(flush) or not flush
        ops.lora_expand_(y, v, b, ids, ranks, table)
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(y[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_input_gets_its_gradient() -> None:
    x, a, b, rest = case(6, 40, 24, torch.float32, [16, 5])
    grads = []
    for dtype in (E4M3, torch.float32):
        each = x.clone().requires_grad_()
        ops.lora_apply(each, a.to(dtype), b.to(dtype), *rest).square().sum().backward()
        grads.append(each.grad)
    assert grads[0] is not None and torch.equal(*grads)


def test_wrong_dtypes_layouts_and_ranks_are_refused() -> None:
    x, a, b, rest = case(4, 40, 24, torch.float32, [16, 5])
    wide_a, wide_b, (ids, _, ranks, _) = a.float(), b.float(), rest

    def refused(message: str, x: Tensor, a: Tensor, b: Tensor, *rest: Any) -> None:
        with pytest.raises(ValueError, match=message):
            ops.lora_apply(x, a, b, *rest)

    refused("b: expected the dtype of a, Float8_e4m3fn, found Float", x, a, wide_b, *rest)
    refused("b: expected the dtype of a, Float, found Float8_e4m3fn", x, wide_a, b, *rest)
    refused("x: expected float32, float16 or bfloat16 with pages", x.double(), a, b, *rest)
    refused(
        "a: expected the dtype of x, Float, found Float8_e5m2", x, a.to(torch.float8_e5m2), b, *rest
    )
    strided = b.transpose(1, 2).contiguous().transpose(1, 2)
    refused("b: expected contiguous pages, found strides", x, a, strided, *rest)
    large = torch.full((2, 33), -1, dtype=torch.int32)
    message = r"page_table.shape\[1\]: expected at most 32 pages of Float8_e4m3fn, found 33"
    refused(message, x, a, b, ids, None, ranks, large)
    bank = a[:2], b[:2].transpose(1, 2).reshape(2, 24, 8)
    refused("a: expected the dtype of x, Float, found Float8_e4m3fn", x, *bank, ids)


def test_training_refuses_float8_factors() -> None:
    x, weight, ids = torch.randn(3, 40), torch.randn(24, 40), torch.zeros(3, dtype=torch.long)
    a, b = finite_pages(1, 8, 40, seed=1), finite_pages(1, 24, 8, seed=2)
    with pytest.raises(ValueError, match="a: expected the dtype of x, Float, found Float8_e4m3fn"):
        ops.lora_linear(x, weight, None, a, b, ids)
