"""On devices with 99 KiB of shared memory per block, tiles are smaller and results bitwise
equal."""

from collections.abc import Callable

import pytest
import torch
from backends import Backend
from contract import Outputs, same
from torch import Tensor

from lora_ext import ops

LARGE, SMALL = 227 * 1024, 99 * 1024  # bytes on sm_90, and on sm_86, sm_89 and sm_120


def under_both_limits(backend: Backend, run: Callable[[], Outputs]) -> tuple[Outputs, Outputs]:
    if backend.is_twin or backend.device == "cuda" or backend.small:
        pytest.skip("only the fast emulator has this limit and runs so many rows")
    large = run()
    backend.module.set_shared_memory(SMALL)
    try:
        return large, run()
    finally:
        backend.module.set_shared_memory(LARGE)


def factors(
    dtype: torch.dtype, rank: int, width: int, tokens: int = 4096, adapters: int = 2, out: int = 0
) -> list[Tensor]:
    """Return random x, a, b and dy."""
    g, out = torch.Generator().manual_seed(0), out or width
    sizes = (tokens, width), (adapters, rank, width), (adapters, out, rank), (tokens, out)
    return [torch.randn(size, generator=g).to(dtype) for size in sizes]


def some(tokens: int, every: int, slot: int) -> Tensor:
    ids = torch.full((tokens,), -1)
    ids[::every] = slot
    return ids


def step(x: Tensor, a: Tensor, b: Tensor, dy: Tensor, ids: Tensor) -> Outputs:
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    y = ops.lora_linear(leaves[0], None, None, *leaves[1:], ids)
    dx, da, db = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach(), "dx": dx, "da": da, "db": db}


@pytest.mark.parametrize("tokens", [8097, 20000])
def test_plan_is_sorted_in_smaller_tiles(backend: Backend, tokens: int) -> None:
    ids = torch.randint(-1, 70, (tokens,), generator=torch.Generator().manual_seed(0))
    same(*under_both_limits(backend, lambda: {"plan": ops.lora_plan(ids, 70)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_expand_processes_fewer_rows_of_a_large_rank(backend: Backend, dtype: torch.dtype) -> None:
    x, a, b, dy = factors(dtype, rank=256, width=32)
    ids = some(len(x), 40, slot=1)

    def run() -> Outputs:
        return {"y": ops.lora_apply_(torch.ones_like(dy), x, a, b, ids)}

    same(*under_both_limits(backend, run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_processes_fewer_rows_and_ranks(backend: Backend, dtype: torch.dtype) -> None:
    given = factors(dtype, rank=64, width=32, adapters=1)
    same(*under_both_limits(backend, lambda: step(*given, some(4096, 16, slot=0))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [114, 256])
def test_gradient_of_the_input_processes_ranks_in_stages(
    backend: Backend, rank: int, dtype: torch.dtype
) -> None:
    """Check an input of three bands of 256 bytes, the last one partial."""
    x, a, b, dy = factors(dtype, rank, 600 // dtype.itemsize, tokens=70, out=8)
    ids, ranks = torch.arange(70) % 3 - 1, torch.tensor([rank, 9], dtype=torch.int32)
    x.requires_grad_()

    def run() -> Outputs:
        y = ops.lora_linear(x, None, None, a, b, ids, None, ranks, 0.25, torch.tensor([5]))
        return {"dx": torch.autograd.grad(y, x, dy)[0]}

    same(*under_both_limits(backend, run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [20, 270, 4100])
def test_large_ranks_need_no_smaller_tiles(
    backend: Backend, tokens: int, dtype: torch.dtype
) -> None:
    given = factors(dtype, rank=300, width=24, tokens=tokens)
    ids = torch.full((tokens,), -1)
    ids[-20:] = torch.arange(20) % 2

    def run() -> Outputs:
        return step(*given, ids) | {"apply": ops.lora_apply(*given[:3], ids)}

    same(*under_both_limits(backend, run))


def test_window_too_large_for_a_warp_is_processed_by_the_block(backend: Backend) -> None:
    """Check 32 states and 400 positions, whose norms would need 100 KiB of shared memory per
    warp."""
    g = torch.Generator().manual_seed(0)
    leaf = torch.randn(1, 400, 32, 4, generator=g)
    prior, trans = torch.randn(1, 32, generator=g), torch.randn(1, 399, 32, 32, generator=g)
    uniforms = torch.rand(1, 400, 2, generator=g)

    def run() -> Outputs:
        tokens, conditional, _ = ops.circuit_sample("hmm", leaf, prior, trans, uniforms)
        return {"tokens": tokens, "conditional": conditional}

    large, small = under_both_limits(backend, run)
    assert torch.equal(large["tokens"], small["tokens"])
    torch.testing.assert_close(large["conditional"], small["conditional"])


def test_window_too_large_for_any_block_raises(backend: Backend) -> None:
    leaf = torch.zeros(1, 28, 1024, 1)
    message = r"circuit_argmax: leaf: expected .* 99328 bytes of shared"
    with pytest.raises(ValueError, match=message):
        under_both_limits(backend, lambda: {"value": ops.circuit_argmax("cp", leaf, None, None)[1]})
