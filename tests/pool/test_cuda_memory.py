"""Growing CUDA memory of a pool, tested with a fake driver compiled against ``cuda.h``. The
compiler checks structures and signatures, and the processor's memory protection checks every
access."""

import ctypes
import gc
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from pool_support import (
    Base,
    assert_holds,
    assert_same,
    assert_slot_holds,
    config,
    fill,
    load,
    snapshot,
    state,
)

import lora_ext
from lora_ext.pool import AdapterPool, _memory, _pages
from lora_ext.rows import _past

SOURCE = Path(__file__).with_name("stand_in_cuda.cpp")
WHEELS = Path(torch.__file__).parents[1]
DEVICE = 3


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), *WHEELS.glob("nvidia/*")]
    include = next(
        (p for p in (Path(h, "include") for h in homes) if (p / "cuda.h").exists()), None
    )
    if include is None or not shutil.which("g++"):
        pytest.skip("needs g++, and cuda.h in CUDA_HOME or NVIDIA's wheels")
    made = tmp_path_factory.mktemp("stand_in") / "libcuda.so"
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-shared", "-fPIC", "-isystem", include]
    subprocess.run([*command, SOURCE, "-o", made], check=True)
    return ctypes.CDLL(str(made))


@pytest.fixture
def driver(library, monkeypatch):
    """Return the fake driver, from which every pool on the CPU allocates its memory."""
    driver = _memory.Driver(library)

    def tensor(self):
        room = (ctypes.c_ubyte * self._size).from_address(self.address)
        room.keeps = self
        return torch.frombuffer(room, dtype=torch.uint8)

    monkeypatch.setattr(_memory.Reservation, "tensor", tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(
        _pages,
        "memory_on",
        lambda _, *sizes: _memory.CudaMemory(sizes[0], DEVICE, driver, sizes[1]),
    )
    library.stand_in_limit.argtypes = (ctypes.c_size_t,)
    library.stand_in_taken.restype = ctypes.c_size_t
    library.stand_in_limit(2**40)
    yield driver
    gc.collect()
    _memory.give_back()


def test_driver_loads_only_if_the_device_has_virtual_memory(library, monkeypatch):
    _memory.Driver.load.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert _memory.Driver.load(DEVICE) is not None
    assert _memory.Driver.load(2) is None, "expected None for a device without virtual memory"
    _memory.Driver.load.cache_clear()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="cuMemRelease returned CUresult 1"):
        _memory.Driver(library)("cuMemRelease", 99)


def test_pool_grows_in_pieces_at_one_address(driver, library):
    pool = AdapterPool(Base(), max_slots=64, max_rank=64)
    assert library.stand_in_taken() == 0
    load(pool, "x0", 0, 8)
    slab = pool.modules["up"]
    address = slab.a_pages.data_ptr()
    assert pool.nbytes() == library.stand_in_taken() == 2 * 8192  # 8 KiB (8 pages) per module
    fill(pool, range(1, 20), 8)
    assert pool.nbytes() == library.stand_in_taken() == 2 * 24 * 1024
    for seed in range(20):
        assert_holds(pool, f"x{seed}", state(seed, 8), 1.0)
    for seed in range(2, 20):
        pool.unload(f"x{seed}")
    assert pool.trim() == 2 * 20 * 1024
    assert pool.nbytes() == library.stand_in_taken() == 2 * 4096
    load(pool, "wide", 30, rank=64)
    for name, seed, rank in (("x1", 1, 8), ("wide", 30, 64)):
        assert_holds(pool, name, state(seed, rank), 8 / rank)
    assert address == slab.a_pages.data_ptr()


@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn])
def test_calls_do_not_read_unmapped_pages(driver, backend, dtype, monkeypatch):
    monkeypatch.setattr(_past, "record", lambda block: None)  # It keeps blocks, and so the pool.
    model = Base().requires_grad_(False)
    pool = AdapterPool(model, max_slots=4, max_rank=64, dtype=dtype)
    names, g = ("up", "embed"), torch.Generator().manual_seed(0)
    tensors = state(0, 64, ("up",))
    for factor, shape in (("A", (64, 7)), ("B", (12, 64))):
        tensors[f"base_model.model.embed.lora_embedding_{factor}"] = torch.randn(shape, generator=g)
    source = config(64, names), tensors
    pool.load("a", source), pool.load("b", source), pool.unload("a"), pool.unload("b")
    pool.load("c", source), pool.load("d", source)  # d has slot 0, and pages after those of c
    x, tokens = torch.randn(300, 12, requires_grad=True, generator=g), torch.arange(300) % 7

    def outputs(name):
        with lora_ext.adapters([name, None] * 150):
            y = model.up(x)
            return y.detach(), *torch.autograd.grad(y.sum(), x), model.embed(tokens)

    lora_ext.attach(model, pool)
    expected = outputs("c")
    pool.unload("d"), pool.trim()
    assert all(map(torch.equal, outputs("c"), expected))
    lora_ext.detach(model)
    assert _memory.CudaMemory(1 << 20, DEVICE, driver, 5000).backed == 8192, "first page unmapped"


def test_load_without_device_memory_leaves_the_pool_unchanged(driver, library):
    pool = fill(AdapterPool(Base(), max_slots=64, max_rank=64), range(8), 8)
    library.stand_in_limit(library.stand_in_taken() + 4096)
    before, taken = snapshot(pool), library.stand_in_taken()
    with pytest.raises(MemoryError, match=r"room for 16\.0 KiB of pages in addition.*CUresult 2"):
        load(pool, "y", 9, 8)
    with pytest.raises(MemoryError, match="512 pages of 'head'"):
        library.stand_in_limit(taken)
        load(pool, "y", 9, 8, targets=("head",))
    gc.collect()
    _memory.give_back()
    assert library.stand_in_taken() == taken
    assert_same(before, snapshot(pool))


def test_memory_moves_between_modules_under_a_limit(driver, library):
    tables = 2 * 16 * (8 + 2) * 4
    pool = AdapterPool(Base(), max_slots=16, max_rank=64, max_bytes=2 * 4 * 4096 + tables)
    fill(pool, range(16), 8)
    assert pool.nbytes() == library.stand_in_taken() == 2 * 4 * 4096
    load(pool, "head", 20, 8, targets=("head",))
    assert library.stand_in_taken() + pool.stats()["table_bytes"] <= pool.max_bytes
    assert pool.stats()["evictions"] > 0
    with pool.acquire(["head", "x15", "x0"]) as slots:
        assert_slot_holds(pool, slots[0], state(20, 8, ("head",)), 1.0)
        assert_slot_holds(pool, slots[1], state(15, 8), 1.0)
        assert_slot_holds(pool, slots[2], state(0, 8), 1.0)


def test_memory_is_released_after_its_last_tensor(driver, library):
    _memory.give_back()
    reserved = library.stand_in_reserved()
    pool = AdapterPool(Base(), max_slots=4, max_rank=8)
    load(pool, "x", 0, 8)
    kept = pool.modules["up"].a_pages
    expected = state(0, 8)["base_model.model.up.lora_A.weight"]
    del pool
    gc.collect()
    _memory.give_back()
    assert torch.equal(kept[0], expected), "found released pages that are still referenced"
    del kept
    gc.collect()
    _memory.give_back()
    assert library.stand_in_taken() == 0 and library.stand_in_reserved() == reserved


@pytest.fixture
def waits(monkeypatch):
    """Return a list that receives the devices that are synchronized."""
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", calls.append)
    return calls


def drop_a_pool(max_slots=4):
    pool = AdapterPool(Base(), max_slots=max_slots, max_rank=8)
    load(pool, "x", 0, 8)
    del pool
    gc.collect()


@pytest.mark.slow
def test_finalizer_neither_waits_for_the_device_nor_calls_the_driver(driver, library, waits):
    # A finalizer may run during a CUDA graph capture, or while queued work waits for a later
    # launch.
    drop_a_pool()
    assert waits == []
    assert library.stand_in_taken() == 2 * 4096
    other = AdapterPool(Base(), max_slots=4, max_rank=8)
    load(other, "y", 1)
    assert waits == [DEVICE] * 2, "expected one wait per module before its memory is released"
    assert library.stand_in_taken() == 2 * 4096, "expected only the memory of the new pool"
    drop_a_pool()
    other.trim()
    assert library.stand_in_taken() == 2 * 4096


def test_release_that_fails_is_retried_later(driver, library, monkeypatch):
    drop_a_pool()

    def fail(device):
        raise RuntimeError("the device has failed")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", fail)
        with pytest.raises(RuntimeError, match="the device has failed"):
            _memory.give_back()
    assert library.stand_in_taken() == 2 * 4096
    _memory.give_back()
    assert library.stand_in_taken() == 0


def test_memory_of_deleted_pools_is_reused_when_the_device_is_full(driver, library):
    pool = fill(AdapterPool(Base(), max_slots=64, max_rank=8), range(4), 8)
    drop_a_pool(max_slots=8)
    library.stand_in_limit(library.stand_in_taken())
    fill(pool, range(4, 9), 8)  # Both modules need a page that is not yet mapped.
    assert library.stand_in_taken() == pool.nbytes()


def test_forked_process_does_not_release_the_memory_of_its_parent(
    driver, library, waits, monkeypatch
):
    drop_a_pool()
    mine, parent = list(_memory._left), os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: parent + 1)
        _memory.give_back()
    assert waits == [] and library.stand_in_taken() == 2 * 4096
    _memory._left.extend(mine)  # A fork copies this list.
    _memory.give_back()
    assert waits == [DEVICE] * 2 and library.stand_in_taken() == 0
