"""Training kernels beyond the contract table: both ways to sum give one result; extreme float16."""

from __future__ import annotations

import pytest
import torch
from backends import Backend
from cases import Shape
from cases_train import bounds, formula, run, train_inputs
from contract import assert_same_bits, within

from lora_ext import ops


def gradients(
    backend: Backend, x: torch.Tensor, dy: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slot: int
) -> dict[str, torch.Tensor]:
    """da and db of the one adapter that has rows, and dx."""
    x, dy, a, b = (t.to(backend.device) for t in (x, dy, a, b))
    leaves = [t.requires_grad_() for t in (x, a, b)]
    ids = torch.full((len(x),), slot, device=backend.device)
    y = ops.lora_linear(leaves[0], None, None, *leaves[1:], ids)
    dx, da, db = torch.autograd.grad(y, leaves, dy)
    for gradient in (da, db):
        assert gradient[slot].abs().min() > 0
        assert gradient.count_nonzero() == gradient[slot].count_nonzero()
    return {"dx": dx, "da": da[slot], "db": db[slot]}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_for_an_adapter_and_blocks_for_its_ranges_agree(
    backend: Backend, dtype: torch.dtype
) -> None:
    """Room for partial sums depends on the size of the bank, and no bit of a gradient may."""
    if backend.is_twin or backend.small:
        pytest.skip("about kernels; a bank that large is for the fast emulator")
    g = torch.Generator().manual_seed(0)
    rows, width = 1100, 16  # ranges of 1024 rows
    x, dy = (torch.randn(rows, width, generator=g).to(dtype) for _ in range(2))
    a, b = torch.randn(1, 2, width, generator=g).to(dtype), torch.randn(1, width, 2, generator=g)
    alone = gradients(backend, x, dy, a, b.to(dtype), 0)
    slots, slot = 1 << 14, 12345
    large_a, large_b = torch.zeros(slots, 2, width), torch.zeros(slots, width, 2)
    large_a[slot], large_b[slot] = a[0], b[0]
    among_many = gradients(backend, x, dy, large_a.to(dtype), large_b.to(dtype), slot)
    for name, value in alone.items():
        assert_same_bits(among_many[name], value, f"{name}: ")


def test_v_does_not_depend_on_the_number_of_rows(backend: Backend) -> None:
    """Above 264 tiles of 128 rows a block walks through all features instead of a slice."""
    if backend.is_twin or backend.small:
        pytest.skip("about kernels; so many rows are for the fast emulator")
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 1100, generator=g).bfloat16().expand(34000, 1100).contiguous()
    a = torch.randn(1, 1, 1100, generator=g).bfloat16()
    b = torch.ones(1, 1, 1).bfloat16()
    ids = torch.zeros(len(x), dtype=torch.long)
    x, a, b, ids = (t.to(backend.device) for t in (x, a, b, ids))
    forward = getattr(torch.ops, backend.library).lora_linear_forward
    none = (None, None, 0.0, None, None)
    few, many = (forward(x[:n], None, None, a, b, ids[:n], *none)[1] for n in (20, len(x)))
    assert_same_bits(many, few[:1].expand_as(many).contiguous())


@pytest.mark.parametrize("size", [2.0**-20, 2.0**13], ids=["tiny v", "huge v"])
def test_float16_v_may_be_far_from_one(backend: Backend, size: float) -> None:
    """As plain float16 a tiny v would vanish from db, and a huge one overflow."""
    g = torch.Generator().manual_seed(2)
    tokens, wide, out, rank = 40, 64, 24, 8
    small = 2.0**6 if size < 1 else 2.0**-10
    x, dy = torch.randn(tokens, wide, generator=g), torch.randn(tokens, out, generator=g) * small
    a, b = torch.randn(1, rank, wide, generator=g), torch.randn(1, out, rank, generator=g)
    b = b * 2.0**-10
    x, dy, a, b = (t.half() for t in (x, dy, a, b))
    ids, scale = torch.zeros(tokens, dtype=torch.long), torch.tensor([size])
    leaf = b.to(backend.device).requires_grad_()
    rest = [t.to(backend.device) for t in (ids, scale)]
    y = ops.lora_linear(x.to(backend.device), None, None, a.to(backend.device), leaf, *rest)
    (db,) = torch.autograd.grad(y, leaf, dy.to(backend.device))
    v = size * (x.double() @ a[0].double().T)
    exact = dy.double().T @ v
    # One rounding (spacing 2^-24 among the subnormal), v and the sums in float32.
    allowed = 2.0**-11 * exact.abs() + 2.0**-25 + 2.0**-18 * (dy.double().abs().T @ v.abs())
    assert ((db[0].cpu().double() - exact).abs() <= allowed).all()


def test_float32_gradients_of_one_sign_are_not_rounded_all_one_way(backend: Backend) -> None:
    """A tensor core rounds its sum toward zero, which random signs would hide."""
    if backend.small:
        pytest.skip("so many rows are for the fast emulator")
    shape = Shape(2048, 16, 16, (24,), "identical")
    i = train_inputs(shape, torch.float32, base=False, device=backend.device)
    i |= {k: i[k].abs() for k in ("x", "a", "b", "dy")}
    exact = formula(i)
    within(run(i), exact, bounds(i, exact))
