"""Memory of a pool: its growth with the number of adapters, limits in bytes, and reported sizes."""

import itertools
import subprocess
import sys
import time

import pytest
import torch
from pool_support import (
    SIZES,
    Base,
    FailingCopies,
    assert_holds,
    assert_same,
    assert_slot_holds,
    fill,
    load,
    snapshot,
    state,
)

from lora_ext import ops
from lora_ext.pool import AdapterPool, PoolFullError, _transfer

PAGE = {name: 8 * (i + o) * 4 for name, (i, o) in SIZES.items()}  # bytes in float32
BOTH = PAGE["up"] + PAGE["down"]


def test_memory_grows_with_pages_in_use_at_stable_addresses():
    pool = AdapterPool(Base(), max_slots=64, max_rank=64)
    assert pool.limit_bytes == 512 * sum(
        8 * (s.in_features + s.out_features) * 4 for s in pool.index.modules.values()
    )
    assert pool.reserved_bytes == pool.nbytes() == 0
    load(pool, "x0", 0, 8)
    assert pool.nbytes() == 8 * BOTH, "expected eight pages of each module"
    slab = pool.modules["up"]
    address = slab.a_pages.data_ptr(), slab.b_pages.data_ptr()
    fill(pool, range(1, 9), 8)
    assert pool.nbytes() == 16 * BOTH
    load(pool, "wide", 9, rank=64, targets=("up",))
    assert pool.nbytes() == 16 * BOTH + 8 * PAGE["up"]
    assert address == (slab.a_pages.data_ptr(), slab.b_pages.data_ptr())
    for seed in range(9):
        assert_holds(pool, f"x{seed}", state(seed, 8), 1.0)


def test_trim_releases_memory_after_the_last_page_in_use():
    pool = fill(AdapterPool(Base(), max_slots=64, max_rank=64), range(20), 8)
    assert pool.nbytes() == 24 * BOTH
    assert pool.trim() == 4 * BOTH and pool.trim() == 0
    for seed in range(1, 20):
        pool.unload(f"x{seed}")
    assert pool.nbytes() == 20 * BOTH, "expected that unloading keeps the memory"
    assert pool.trim() == 19 * BOTH and pool.nbytes() == BOTH
    assert_holds(pool, "x0", state(0, 8), 1.0)
    load(pool, "x1", 1, 8)
    with pool.acquire(["x0", "x1"]) as slots:
        for seed, slot in enumerate(slots):
            assert_slot_holds(pool, slot, state(seed, 8), 1.0)
    pool.unload("x0")
    pool.unload("x1")
    pool.trim()
    assert pool.nbytes() == 0


def tables(pool):
    """Return the number of bytes of the tables of ``up`` and ``down``."""
    return 2 * pool.max_slots * (8 + 1 + 1) * 4


def limited(adapters, extra=0):
    """Return a pool with a byte limit for `adapters` adapters of rank 8, the tables, and ``extra``
    bytes."""
    probe = AdapterPool(Base(), max_slots=16, max_rank=64)
    return AdapterPool(
        Base(), max_slots=16, max_rank=64, max_bytes=adapters * BOTH + tables(probe) + extra
    )


def test_byte_limit_evicts_adapters_before_the_slots_are_full():
    pool = fill(limited(3), range(3), 8)
    numbers = pool.stats()
    assert numbers["reserved_bytes"] == numbers["limit_bytes"] == pool.max_bytes
    assert numbers["used_bytes"] == 3 * BOTH and numbers["evictions"] == 0
    with pool.acquire(["x0"]):
        pass
    load(pool, "x3", 3, 8)
    assert "x1" not in pool._residence.by_name and "x1" in pool, "expected the eviction of x1"
    assert pool.stats()["evictions"] == 1 and pool.reserved_bytes == pool.max_bytes
    for name in ("x0", "x2", "x3", "x1"):
        assert_holds(pool, name, state(int(name[1]), 8), 1.0)


def test_error_at_the_byte_limit_names_limit_pins_and_remedy():
    pool = limited(2)
    load(pool, "x", 0, 8)
    load(pool, "y", 1, 8)
    lease = pool.acquire(["x", "y"])
    before = snapshot(pool)
    with pytest.raises(
        PoolFullError,
        match=rf"'z' needs 2\.0 KiB more than max_bytes leaves, .*pinned, by 2 adapters: "
        rf"\['x', 'y'\]\. With max_slots=16, pages=128 and max_bytes={pool.max_bytes}, "
        r"5\.2 KiB are reserved, 4\.0 KiB of it pinned; release leases",
    ):
        load(pool, "z", 2, 8)
    assert_same(before, snapshot(pool))
    pool.release(lease)
    with pytest.raises(PoolFullError, match="even if all other adapters are evicted"):
        load(AdapterPool(Base(), max_bytes=BOTH), "z", 2, 8)


def test_pages_freed_by_one_module_are_used_by_another_under_the_limit():
    pool = fill(limited(4), range(4), 8)
    for seed in range(1, 4):
        pool.unload(f"x{seed}")
    load(pool, "head", 9, rank=16, targets=("head",))
    assert pool.reserved_bytes <= pool.max_bytes and pool.stats()["evictions"] == 0
    with pool.acquire(["head", "x0"]) as slots:
        assert_slot_holds(pool, slots[0], state(9, 16, ("head",)), 0.5)
        assert_slot_holds(pool, slots[1], state(0, 8), 1.0)


def test_random_loads_under_a_limit_stay_under_it_and_keep_every_adapter():
    g = torch.Generator().manual_seed(0)
    pool, meaning = limited(5, extra=4096), {}
    choices = (("up", "down"), ("up",), ("down", "head"), ("up", "down", "head"))
    for step in range(120):
        name = f"x{int(torch.randint(12, (), generator=g))}"
        rank = int(torch.randint(1, 25, (), generator=g))
        targets = choices[int(torch.randint(4, (), generator=g))]
        if name in pool and step % 3 == 0:
            pool.unload(name)
            del meaning[name]
        elif name not in pool:
            load(pool, name, step, rank, targets=targets)
            meaning[name] = (state(step, rank, targets), 8 / rank)
        numbers = pool.stats()
        assert numbers["reserved_bytes"] <= pool.max_bytes
        held = [n for n in pool.names if n in pool._residence.by_name]
        pages = sum(numbers["adapters"][n]["bytes"] for n in held)
        assert pages == numbers["used_bytes"] <= numbers["page_bytes"]
    assert pool.stats()["evictions"] > 10, "expected evictions due to the limit"
    for name, (tensors, scale) in meaning.items():
        assert_holds(pool, name, tensors, scale)


def test_failed_copy_restores_memory_moved_to_another_module(monkeypatch):
    for at in itertools.count(1):
        pool = fill(limited(3), range(3), 8)
        before, refuses = snapshot(pool), FailingCopies(at)
        with monkeypatch.context() as patch:
            patch.setattr(_transfer, "copy_", refuses)
            try:
                load(pool, "new", 9, rank=16, targets=("up", "head"))
            except RuntimeError as error:
                assert "the copy failed" in str(error)
                assert_same(before, snapshot(pool))
            else:
                assert at > refuses.count > 10, "expected a failure of every copy"
                assert pool.stats()["evictions"] > 0
                break


def test_permanently_failing_device_under_a_limit_loses_no_adapter(monkeypatch):
    pool = fill(limited(3), range(3), 8)
    with monkeypatch.context() as patch:
        patch.setattr(_transfer, "copy_", FailingCopies(1, for_good=True))
        with pytest.raises(RuntimeError, match="the copy failed"):
            load(pool, "new", 9, 8, targets=("head",))
    assert pool.stats()["cached"] > 0 and pool.reserved_bytes <= pool.max_bytes
    for name in ("x0", "x1", "x2"):
        assert_holds(pool, name, state(int(name[1]), 8), 1.0)


def test_stats_contain_an_entry_per_adapter():
    start = time.time()
    pool = AdapterPool(Base(), max_slots=2, max_rank=16)
    load(pool, "a", 0, rank=4)
    load(pool, "b", 1, rank=16, use_dora=True)
    with pool.acquire(["a", "a", None]) as slots:
        line = pool.stats()["adapters"]["a"]
        used = line.pop("last_use")
        assert line == {"rank": 4, "bytes": BOTH, "pins": 2, "slot": slots[0]}
    assert start <= pool.stats()["adapters"]["b"]["last_use"] <= used <= time.time()
    load(pool, "c", 2, 8)
    lines = pool.stats()["adapters"]
    assert list(lines) == ["a", "c", "b"]
    assert lines["b"] == {
        "rank": 16, "bytes": 2 * BOTH + 4 * (20 + 12), "pins": 0, "last_use": None, "slot": None,
    }  # fmt: skip
    lease = pool.acquire(["a"])
    pool.unload("a")
    assert "a" not in pool.stats()["adapters"] and pool.stats()["used_bytes"] == 2 * BOTH
    pool.release(lease)


@pytest.mark.parametrize("value", [0, -5])
def test_limit_below_one_byte_is_refused(value):
    with pytest.raises(ValueError, match=f"max_bytes: expected at least 1, found {value}"):
        AdapterPool(Base(), max_bytes=value)
    with pytest.raises(TypeError, match="max_bytes: expected an integer, found '1 GiB'"):
        AdapterPool(Base(), max_bytes="1 GiB")


WHAT_A_PROCESS_HOLDS = """
import torch
from torch import nn
from lora_ext import AdapterPool


def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096


model = nn.ModuleDict({str(n): nn.Linear(2048, 2048, device="meta") for n in range(32)})
start = held()
pool = AdapterPool(model, device="cpu", dtype=torch.bfloat16)
assert pool.limit_bytes == 32 * 512 * 8 * 4096 * 2 == 2**30
empty = held() - start
config = {"peft_type": "LORA", "r": 16, "lora_alpha": 8, "target_modules": "all-linear"}
tensors = {}
for n in model:
    tensors[f"{n}.lora_A.weight"] = torch.zeros(16, 2048, dtype=torch.bfloat16)
    tensors[f"{n}.lora_B.weight"] = torch.zeros(2048, 16, dtype=torch.bfloat16)
start = held()
pool.load("x", (config, tensors))
print(empty, held() - start, pool.nbytes())
"""


@pytest.mark.slow
def test_resident_memory_of_the_process_grows_only_with_loaded_adapters():
    # The limit of the pool is 1 GiB; an adapter of rank 16 needs 4 MiB.
    run = subprocess.run(
        [sys.executable, "-c", WHAT_A_PROCESS_HOLDS], capture_output=True, text=True, check=True
    )
    empty, loaded, reserved = map(int, run.stdout.split())
    assert empty < 2**22 and reserved == 32 * 8 * 8 * 4096 * 2 == 2**24
    assert loaded < reserved + 2**25, "expected memory of the pages and of one loaded file"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_pages_are_bitwise_equal_to_contiguous_pages(backend, dtype):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(5, 20, generator=g).to(dtype)
    apart = torch.randn(4, 8 * (20 + 12), generator=g).to(dtype)
    a = apart[:, : 8 * 20].unflatten(1, (8, 20))
    b = apart[:, 8 * 20 :].unflatten(1, (12, 8))
    ids = torch.tensor([0, 1, -1, 1, 0])
    ranks, scale = torch.tensor([9, 16], dtype=torch.int32), torch.tensor([0.5, 2.0])
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    both = [
        ops.lora_apply(x, each[0], each[1], ids, scale, ranks, table)
        for each in ((a, b), (a.contiguous(), b.contiguous()))
    ]
    assert not a.is_contiguous() and torch.equal(*both) and both[0].abs().max() > 0
