"""The plan and the segment ids, compared with their formulas."""

from __future__ import annotations

import pytest
import torch
from backends import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_ext import ops, reference

SIZES = [
    (0, 3), (1, 1), (5, 0), (16, 16), (17, 2), (32, 4), (33, 200), (256, 7), (257, 7), (1000, 64),
    (4095, 3), (4096, 5), (8192, 70), (8193, 4), (700, 5000),
]  # fmt: skip


def fields(plan: Tensor, tokens: int, adapters: int) -> dict[str, object]:
    """Return the fields of a plan, a vector described in ``lora_ext/lora.h``."""
    plan = plan.cpu()
    chunk_rows = 16 if tokens <= 256 else 64 if tokens < 4096 else 128
    most = tokens // chunk_rows + min(tokens, adapters)
    assert plan.numel() == 8 + 4 * most + tokens + adapters + 2
    count = int(plan[0])
    assert count <= most
    perm = 8 + 4 * most
    return {
        "num_chunks": count,
        "num_active": int(plan[1]),
        "identity": int(plan[2]),
        "bad_ids": int(plan[3]),
        "chunks": plan[8 : 8 + 4 * most].reshape(-1, 4)[:count, :3],
        "perm": plan[perm : perm + tokens],
        "slot_begin": plan[perm + tokens :],
    }


def assert_plan(plan: Tensor, ids: Tensor, adapters: int, num_valid: Tensor | None = None) -> None:
    expected = reference.lora_plan(ids, adapters, num_valid)
    for name, value in fields(plan, ids.numel(), adapters).items():
        wanted = expected[name]
        same = torch.equal(value, wanted) if isinstance(value, Tensor) else value == wanted
        assert same, f"{name}: expected {wanted}, found {value}"


@pytest.mark.parametrize(("tokens", "adapters"), SIZES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_plan_groups_rows_by_adapter(
    backend: Backend, tokens: int, adapters: int, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(tokens + adapters)
    for kind in ("random", "sorted", "none"):
        ids = (
            torch.randint(-1, adapters, (tokens,), generator=g) if adapters else -torch.ones(tokens)
        )
        if kind == "sorted":
            ids = torch.sort(ids.clamp(min=0 if adapters else -1)).values
        elif kind == "none":
            ids = torch.full((tokens,), -1)
        ids = ids.to(backend.device, dtype)
        assert_plan(ops.lora_plan(ids, adapters), ids, adapters)


@pytest.mark.parametrize(("tokens", "valid"), [(7, 3), (300, 0), (300, 299), (300, 300), (20, 999)])
def test_rows_past_num_valid_have_no_adapter(backend: Backend, tokens: int, valid: int) -> None:
    ids = (torch.arange(tokens) % 5 - 1).to(backend.device)
    num_valid = torch.tensor(valid, dtype=torch.int32, device=backend.device)
    assert_plan(ops.lora_plan(ids, 4, num_valid), ids, 4, num_valid)


def test_ids_out_of_range_are_counted_by_kernels_and_raise_in_twins(backend: Backend) -> None:
    ids = torch.tensor([0, 7, -2, 1, 2**31 - 1], device=backend.device)
    if backend.is_twin:
        with pytest.raises(
            ValueError, match=r"adapter_ids\[1\]: expected .* in \[-1, 2\), found 7"
        ):
            ops.lora_plan(ids, 2)
    else:
        plan = ops.lora_plan(ids, 2)
        assert int(plan[3]) == 3
        assert_plan(plan, ids, 2)


def test_debug_mode_raises_for_ids_that_kernels_only_count(backend: Backend) -> None:
    x, y, a, b = (
        torch.zeros(s, device=backend.device) for s in ((3, 8), (3, 8), (2, 8, 8), (2, 8, 8))
    )
    ids = torch.tensor([0, 5, -1], device=backend.device)
    backend.module.set_debug(True)
    try:
        with pytest.raises(
            ValueError, match=r"adapter_ids\[1\]: expected .* in \[-1, 2\), found 5"
        ):
            ops.lora_apply_(y, x, a, b, ids)
        with pytest.raises(ValueError, match=r"lora_plan: adapter_ids\[1\]: .*, found 5"):
            ops.lora_plan(ids, 2)
        for columns in (1, 2):
            at = rf"adapter_ids\[1, {columns - 1}\]: expected .* in \[-1, 2\), found 5"
            several = torch.stack([ids.clamp(max=1)] * (columns - 1) + [ids], 1)
            with pytest.raises(ValueError, match=at):
                ops.lora_apply_(y, x, a, b, several)
        ops.lora_apply_(y, x, a, b, ids.clamp(max=1))
    finally:
        backend.module.set_debug(False)


@settings(max_examples=60)
@given(
    ids=st.lists(st.integers(-1, 9), max_size=400),
    extra=st.integers(0, 5),
    valid=st.none() | st.integers(0, 500),
)
def test_plan_of_any_ids_equals_the_formula(ids: list[int], extra: int, valid: int | None) -> None:
    tensor = torch.tensor(ids, dtype=torch.long)
    num_valid = None if valid is None else torch.tensor(valid, dtype=torch.int32)
    adapters = 10 + extra
    assert_plan(ops.lora_plan(tensor, adapters, num_valid), tensor, adapters, num_valid)


@pytest.mark.parametrize(
    ("indptr", "adapters", "tokens"),
    [([0], [], 4), ([0, 3], [2], 3), ([1, 1, 4, 4, 9], [5, 0, -1, 3], 12), ([0, 0, 0], [1, 2], 0)],
)
def test_segment_ids_equal_the_formula(
    backend: Backend, indptr: list[int], adapters: list[int], tokens: int
) -> None:
    on_device = [
        torch.tensor(v, dtype=torch.int32, device=backend.device) for v in (indptr, adapters)
    ]
    got = ops.lora_segment_ids(*on_device, tokens)
    assert torch.equal(got.cpu(), reference.lora_segment_ids(*on_device, tokens).cpu())


def test_sgmv_and_bgmv_equal_lora_apply(backend: Backend) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-2, 3, s, generator=g).float() for s in ((9, 16), (9, 24)))
    a, b = (torch.randint(-2, 3, s, generator=g).float() for s in ((3, 8, 16), (3, 24, 8)))
    x, y, a, b = (t.to(backend.device) for t in (x, y, a, b))
    indptr = torch.tensor([1, 4, 6], dtype=torch.int32, device=backend.device)
    adapter = torch.tensor([2, 0], dtype=torch.int32, device=backend.device)
    ids = torch.tensor([-1, 2, 2, 2, 0, 0, -1, -1, -1], device=backend.device)
    expected = ops.lora_apply_(y.clone(), x, a, b, ids)
    assert torch.equal(ops.sgmv_(y.clone(), x, a, b, indptr, adapter), expected)
    assert torch.equal(ops.bgmv_(y.clone(), x, a, b, ids), expected)
    assert torch.equal(expected.cpu(), reference.lora_apply_(y, x, a, b, ids).cpu())
