"""LoRA kernels in cases that the table of ops lacks: plans of several tiles, extreme float16
values, long sums."""

import pytest
import torch
from backends import Backend
from cases import Shape
from cases_train import bounds, formula, run, train_inputs
from contract import assert_same_bits, within

from lora_ext import ops, reference


def fields(plan: torch.Tensor, tokens: int, slots: int) -> dict[str, torch.Tensor | int]:
    rows = 16 if tokens <= 256 else 64 if tokens < 4096 else 128
    chunks = 8
    perm = chunks + 4 * (tokens // rows + min(tokens, slots))
    begin = perm + tokens
    return {
        "num_chunks": int(plan[0]),
        "num_active": int(plan[1]),
        "identity": int(plan[2]),
        "bad_ids": int(plan[3]),
        "chunks": plan[chunks : chunks + 4 * int(plan[0])].reshape(-1, 4)[:, :3],
        "perm": plan[perm:begin],
        "slot_begin": plan[begin : begin + slots + 2],
    }


@pytest.mark.parametrize(
    ("tokens", "slots"),
    [(0, 3), (1, 0), (31, 1), (257, 40), (1000, 1100), (5000, 33), (8193, 70), (20000, 1030)],
)
@pytest.mark.parametrize("valid", [None, 7], ids=["all", "7 valid"])
def test_plan_equals_the_reference(
    backend: Backend, tokens: int, slots: int, valid: int | None
) -> None:
    if backend.is_twin or (backend.small and tokens > 1000):
        pytest.skip("twins have another test; the checking emulator runs only small plans")
    g = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-3, slots + 2, (tokens,), generator=g)  # Some ids are out of range.
    num_valid = None if valid is None else torch.tensor([valid], dtype=torch.int32)
    for typed in (ids, ids.int()):
        got = ops.lora_plan(
            typed.to(backend.device),
            slots,
            None if num_valid is None else num_valid.to(backend.device),
        ).cpu()
        expected = reference.lora_plan(ids, slots, num_valid)
        for name, value in fields(got, tokens, slots).items():
            assert torch.equal(
                torch.as_tensor(value),
                torch.as_tensor(expected[name]).to(torch.as_tensor(value).dtype),
            ), name


@pytest.mark.parametrize("size", [2.0**-20, 2.0**13], ids=["tiny v", "huge v"])
@pytest.mark.parametrize("rank", [8, 264])
def test_float16_v_may_be_far_from_one(backend: Backend, rank: int, size: float) -> None:
    """Check values of v for which the sum of two float16 numbers would lose the smaller one, or
    overflow.

    For large ranks, v is a tf32 operand, which has the exponent range of float32.
    """
    g = torch.Generator().manual_seed(0)
    x, a = torch.randn(20, 64, generator=g).half(), torch.randn(1, rank, 64, generator=g).half()
    b = (torch.randn(1, 40, rank, generator=g) * (2.0**6 if size < 1 else 2.0**-10)).half()
    ids, scale = torch.zeros(20, dtype=torch.long), torch.tensor([size])
    y = torch.zeros(20, 40, dtype=torch.float16)
    got = ops.lora_apply_(*(t.to(backend.device) for t in (y, x, a, b, ids, scale))).cpu()
    v = reference.lora_shrink(x.double(), a.double(), ids, scale)
    exact = v @ b[0].double().T
    # Errors of the final rounding (subnormal spacing 2^-24), of v as the sum of two float16
    # numbers, and of float32 sums.
    allowed = 2.0**-11 * exact.abs() + 2.0**-25 + 2.0**-18 * (v.abs() @ b[0].double().abs().T)
    assert ((got.double() - exact).abs() <= allowed).all()


def test_float32_sums_of_one_sign_are_not_rounded_in_one_direction(backend: Backend) -> None:
    """Check sums of terms of one sign, for which rounding toward zero, as on tensor cores, adds up.

    Rows without an adapter add so many tiles that kernels do not split the sum. They take no time.
    """
    if backend.small:
        pytest.skip("too many rows for this backend")
    g = torch.Generator().manual_seed(0)
    rows, features, rank = 34000, 4096, 8
    x = torch.rand(1, features, generator=g).expand(rows, -1)
    a = torch.rand(1, rank, features, generator=g)
    ids = torch.full((rows,), -1)
    ids[::4000] = 0
    got = ops.lora_shrink(*(t.to(backend.device) for t in (x, a, ids))).cpu()
    exact = x[0].double() @ a[0].double().T
    error = (got[ids == 0].double() - exact).abs()
    allowed = (16 + features**0.5 / 2) * 2.0**-24 * exact  # as in cases.v_bound
    assert (error <= allowed).all(), f"error {(error / exact).max() * 2**24:.0f} units of 2^-24"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_apply_that_sums_splits_of_v_equals_shrink_and_expand_bitwise(
    backend: Backend, dtype: torch.dtype
) -> None:
    """Check sizes for which apply first adds the partial sums of v, in place."""
    if backend.small:
        pytest.skip("too many rows for this backend")
    g = torch.Generator().manual_seed(0)
    rows, features, out, rank = 8192, 2048, 2056, 64
    x = torch.randn(1, features, generator=g).to(dtype).expand(rows, -1)
    a = torch.randn(2, rank, features, generator=g).to(dtype)
    b, scale = torch.randn(2, out, rank, generator=g).to(dtype), torch.tensor([0.3, -1.7])
    ids = torch.full((rows,), -1)
    ids[::1000] = torch.arange(9) % 2
    x, a, b, ids, scale = (t.to(backend.device) for t in (x, a, b, ids, scale))
    got = ops.lora_apply_(x.new_ones(rows, out), x, a, b, ids, scale)
    v = ops.lora_shrink(x, a, ids, scale)
    assert_same_bits(got, ops.lora_expand_(x.new_ones(rows, out), v, b, ids))


def test_two_successive_calls_may_add_to_one_y(backend: Backend) -> None:
    """Check the order of shrink and expand. Expand reads y before it waits for its shrink.

    If the second shrink also started before the first expand has finished, the second expand could
    read y while the first one writes it. The emulator would report this.
    """
    g = torch.Generator().manual_seed(0)
    x, a = torch.randn(3, 64, generator=g), torch.randn(1, 8, 64, generator=g)
    b, ids = torch.randn(1, 16, 8, generator=g), torch.zeros(3, dtype=torch.long)
    y = torch.zeros(3, 16, device=backend.device)
    once = ops.lora_apply(*(t.to(backend.device) for t in (x, a, b, ids)))
    for _ in range(2):
        ops.lora_apply_(y, *(t.to(backend.device) for t in (x, a, b, ids)))
    torch.testing.assert_close(y, 2 * once, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [64, 72, 1096], ids=str)
def test_padding_of_missing_rows_and_ranks_changes_nothing(
    backend: Backend, dtype: torch.dtype, features: int
) -> None:
    """Check that kernels do not use the values of the existing rows that they read in place of
    missing ones.

    The first row of each adapter in x is NaN, and so are a and b beyond its rank.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, features, generator=g).to(dtype)
    a = torch.randn(2, 24, features, generator=g).to(dtype)
    b = torch.randn(2, 40, 24, generator=g).to(dtype)
    ranks, ids = torch.tensor([5, 19], dtype=torch.int32), torch.tensor([0, 0, 1, 1, 1])

    def run(garbage: float) -> torch.Tensor:
        rows, left, right = x.clone(), a.clone(), b.clone()
        rows[0], rows[2] = garbage, garbage
        for slot, rank in enumerate(ranks.tolist()):
            left[slot, rank:], right[slot, :, rank:] = garbage, garbage
        arguments = (t.to(backend.device) for t in (rows, left, right, ids))
        return ops.lora_apply(*arguments, ranks=ranks.to(backend.device)).cpu()

    clean, dirty = run(0.0), run(float("nan"))
    assert dirty[[0, 2]].isnan().all()
    assert_same_bits(dirty[[1, 3, 4]], clean[[1, 3, 4]])


def gradients(
    backend: Backend, x: torch.Tensor, dy: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slot: int
) -> dict[str, torch.Tensor]:
    """Return dx, and da and db of the adapter ``slot``, to which all rows belong."""
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
def test_one_block_per_adapter_and_blocks_per_range_agree(
    backend: Backend, dtype: torch.dtype
) -> None:
    """Check that the size of the buffer for partial sums, set by the bank, changes no bit."""
    if backend.is_twin or backend.small:
        pytest.skip("only for kernels; the bank is too large for the checking emulator")
    g = torch.Generator().manual_seed(0)
    rows, width = 1100, 16  # two ranges of up to 1024 rows
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
    """Check more than 264 tiles of 128 rows, for which each block iterates over all features."""
    if backend.is_twin or backend.small:
        pytest.skip("only for kernels; too many rows for the checking emulator")
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
def test_float16_v_of_training_may_be_far_from_one(backend: Backend, size: float) -> None:
    """Check values of v that would underflow or overflow in plain float16."""
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
    # Errors of the final rounding (subnormal spacing 2^-24), of v, and of float32 sums.
    allowed = 2.0**-11 * exact.abs() + 2.0**-25 + 2.0**-18 * (dy.double().abs().T @ v.abs())
    assert ((db[0].cpu().double() - exact).abs() <= allowed).all()


def test_float32_gradients_of_one_sign_are_not_rounded_in_one_direction(backend: Backend) -> None:
    """Check sums of terms of one sign, for which rounding toward zero, as on tensor cores, adds
    up."""
    if backend.small:
        pytest.skip("too many rows for this backend")
    shape = Shape(2048, 16, 16, (24,), "identical")
    i = train_inputs(shape, torch.float32, base=False, device=backend.device)
    i |= {k: i[k].abs() for k in ("x", "a", "b", "dy")}
    exact = formula(i)
    within(run(i), exact, bounds(i, exact))


def test_more_outputs_than_a_grid_has_blocks_raise(backend: Backend) -> None:
    if backend.is_twin:
        pytest.skip("this test runs only on kernels")
    x = torch.zeros(1, 8, dtype=torch.bfloat16, device=backend.device)
    b = x.new_zeros(1, 65535 * 256 + 1, 1)
    ids = torch.zeros(1, dtype=torch.long, device=backend.device)
    with pytest.raises(ValueError, match="b: expected at most 16776960 outputs on a device, found"):
        ops.lora_linear(x, None, None, x[None], b, ids)
