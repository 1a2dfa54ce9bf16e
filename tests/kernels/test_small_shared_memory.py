"""Devices whose blocks have 99 KiB of shared memory get smaller tiles, and the same bits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backends import Backend
from contract import assert_same_bits

from lora_ext import ops

LARGE, SMALL = 227 * 1024, 99 * 1024  # sm_90; sm_86, sm_89 and sm_120


@contextmanager
def shared_memory(backend: Backend, size: int) -> Iterator[None]:
    backend.module.set_shared_memory(size)
    try:
        yield
    finally:
        backend.module.set_shared_memory(LARGE)


def under_both_limits(
    backend: Backend, run: Callable[[], dict[str, torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    if backend.is_twin or backend.device == "cuda" or backend.small:
        pytest.skip("the limit is a setting of the emulator; so many rows are for the fast one")
    large = run()
    with shared_memory(backend, SMALL):
        return large, run()


def assert_equal(large: dict[str, torch.Tensor], small: dict[str, torch.Tensor]) -> None:
    for name, value in large.items():
        assert_same_bits(small[name], value, f"{name}: ")


@pytest.mark.parametrize("tokens", [8097, 20000])
def test_a_plan_is_sorted_in_smaller_tiles(backend: Backend, tokens: int) -> None:
    ids = torch.randint(-1, 70, (tokens,), generator=torch.Generator().manual_seed(0))
    assert_equal(*under_both_limits(backend, lambda: {"plan": ops.lora_plan(ids, 70)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_expand_takes_fewer_rows_of_a_large_rank(backend: Backend, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    tokens, rank, width = 4096, 256, 32
    x = torch.randn(tokens, width, generator=g).to(dtype)
    a = torch.randn(2, rank, width, generator=g).to(dtype)
    b = torch.randn(2, width, rank, generator=g).to(dtype)
    ids = torch.full((tokens,), -1)
    ids[::40] = 1
    assert_equal(
        *under_both_limits(
            backend,
            lambda: {"y": ops.lora_apply_(torch.ones(tokens, width).to(dtype), x, a, b, ids)},
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_takes_fewer_rows_and_ranks(backend: Backend, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    tokens, rank, width = 4096, 64, 32
    x, dy = (torch.randn(tokens, width, generator=g).to(dtype) for _ in range(2))
    a = torch.randn(1, rank, width, generator=g).to(dtype)
    b = torch.randn(1, width, rank, generator=g).to(dtype)
    ids = torch.full((tokens,), -1)
    ids[::16] = 0

    def run() -> dict[str, torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        y = ops.lora_linear(leaves[0], None, None, *leaves[1:], ids)
        dx, da, db = torch.autograd.grad(y, leaves, dy)
        return {"y": y.detach(), "dx": dx, "da": da, "db": db}

    assert_equal(*under_both_limits(backend, run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [114, 256])
def test_the_gradient_of_the_input_takes_the_ranks_in_stages(
    backend: Backend, rank: int, dtype: torch.dtype
) -> None:
    """Bands of 256 bytes: three of them, the last one short."""
    g = torch.Generator().manual_seed(0)
    tokens, width = 70, 600 // dtype.itemsize
    x = torch.randn(tokens, width, generator=g).to(dtype).requires_grad_()
    dy = torch.randn(tokens, 8, generator=g).to(dtype)
    a = torch.randn(2, rank, width, generator=g).to(dtype)
    b = torch.randn(2, 8, rank, generator=g).to(dtype)
    ids = torch.arange(tokens) % 3 - 1
    ranks = torch.tensor([rank, 9], dtype=torch.int32)
    seed = torch.tensor([5])

    def run() -> dict[str, torch.Tensor]:
        y = ops.lora_linear(x, None, None, a, b, ids, None, ranks, 0.25, seed)
        return {"dx": torch.autograd.grad(y, x, dy)[0]}

    assert_equal(*under_both_limits(backend, run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [20, 270, 4100])
def test_large_ranks_need_no_smaller_tiles(
    backend: Backend, tokens: int, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(0)
    rank, width = 300, 24
    x, dy = (torch.randn(tokens, width, generator=g).to(dtype) for _ in range(2))
    a = torch.randn(2, rank, width, generator=g).to(dtype)
    b = torch.randn(2, width, rank, generator=g).to(dtype)
    ids = torch.full((tokens,), -1)
    ids[-20:] = torch.arange(20) % 2

    def run() -> dict[str, torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        y = ops.lora_linear(leaves[0], None, None, *leaves[1:], ids)
        dx, da, db = torch.autograd.grad(y, leaves, dy)
        applied = ops.lora_apply(x, a, b, ids)
        return {"apply": applied, "y": y.detach(), "dx": dx, "da": da, "db": db}

    assert_equal(*under_both_limits(backend, run))


def test_a_window_that_no_longer_fits_a_warp_is_walked_by_the_block(backend: Backend) -> None:
    """32 states at 400 positions: 100 KiB of norms where a warp walks."""
    g = torch.Generator().manual_seed(0)
    leaf = torch.randn(1, 400, 32, 4, generator=g)
    prior, trans = torch.randn(1, 32, generator=g), torch.randn(1, 399, 32, 32, generator=g)
    uniforms = torch.rand(1, 400, 2, generator=g)

    def run() -> dict[str, torch.Tensor]:
        tokens, conditional, _ = ops.circuit_sample("hmm", leaf, prior, trans, uniforms)
        return {"tokens": tokens, "conditional": conditional}

    large, small = under_both_limits(backend, run)
    assert torch.equal(large["tokens"], small["tokens"])
    torch.testing.assert_close(large["conditional"], small["conditional"])


def test_a_window_too_large_for_any_block_is_named(backend: Backend) -> None:
    leaf = torch.zeros(1, 28, 1024, 1)

    def run() -> dict[str, torch.Tensor]:
        return dict(
            zip(("tokens", "value"), ops.circuit_argmax("cp", leaf, None, None), strict=True)
        )

    with pytest.raises(
        ValueError, match=r"circuit_argmax: leaf: expected .* 99328 bytes of shared"
    ):
        under_both_limits(backend, run)
