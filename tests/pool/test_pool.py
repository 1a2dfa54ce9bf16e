"""Slots, pins, eviction and the host cache of a pool."""

import threading
import time

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
    make,
    read_slot,
    snapshot,
    state,
)

from lora_ext.pool import AdapterPool, PoolFullError, UnknownAdapterError, _transfer
from lora_ext.pool._pages import in_words


def test_nbytes_counts_allocated_pages():
    pool = make(pages=5)
    assert pool.nbytes() == 0
    load(pool, "x", 0)
    assert pool.nbytes() == 5 * 8 * ((12 + 20) + (20 + 12)) * 4
    held = [t for s in pool.modules.values() for t in (s.a_pages, s.b_pages) if t is not None]
    assert pool.nbytes() == sum(t.nbytes for t in held)
    load(pool, "y", 1, rank=16)
    assert pool.nbytes() == 5 * 8 * 64 * 4, "expected further adapters to use allocated pages"


def test_limit_bytes_is_known_before_memory_is_allocated():
    pool = make(pages=5, targets=["up", "down"])
    expected = 5 * 8 * ((12 + 20) + (20 + 12)) * 4
    assert pool.limit_bytes == expected and pool.nbytes() == pool.reserved_bytes == 0
    assert repr(pool) == (
        "AdapterPool(max_slots=3, max_rank=16, pages=5; 2 modules: up to 10.0 KiB of pages, "
        "0 bytes so far; 0 adapters)"
    )
    load(pool, "x", 0, targets=("up",))
    assert pool.nbytes() == expected // 2 and "5.0 KiB so far; 1 adapter)" in repr(pool)
    load(pool, "y", 0)
    assert pool.nbytes() == pool.limit_bytes == expected
    half = make(pages=5, targets=["up", "down"], dtype=torch.float16)
    assert half.limit_bytes == expected // 2


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (20 * 2**30, "20.0 GiB"),
        (3000 * 2**30, "2.9 TiB"),
    ],
)
def test_sizes_are_printed_in_binary_units(count, words):
    assert in_words(int(count)) == words


def test_addresses_are_stable_and_base_rows_get_no_slot():
    pool = make()
    load(pool, "x", 0)
    slab = pool.modules["up"]
    parts = ("a_pages", "b_pages", "page_table", "ranks", "scale")
    tensors = [getattr(slab, part) for part in parts]
    for seed in range(1, 8):
        load(pool, f"x{seed}", seed, rank=1 + seed, targets=("up", "head"))
    assert all(getattr(slab, part) is t for part, t in zip(parts, tensors, strict=True))
    with pool.acquire([None, "x7", "__base__"]) as slots:
        assert slots[0] == slots[2] == -1 and slots[1] >= 0


def test_an_unknown_name_raises_with_close_matches_and_pins_nothing():
    pool = make()
    load(pool, "french", 0)
    with pytest.raises(
        KeyError, match=r"adapter 'frensh' is not loaded; close matches: \['french'\]"
    ):
        pool.acquire(["french", "frensh"])
    assert pool.stats()["pins"] == 0
    with pytest.raises(TypeError, match="sequence of names"):
        pool.acquire("french")
    for call in (pool.unload, lambda n: pool.update(n, state(0))):
        with pytest.raises(UnknownAdapterError, match="'german'"):
            call("german")


def test_adapter_name_may_look_like_a_path():
    pool = make()
    load(pool, "../../etc/passwd\0", 0)
    assert "../../etc/passwd\0" in pool


def test_loading_a_name_twice_is_refused():
    pool = make()
    load(pool, "x", 0)
    before = snapshot(pool)
    with pytest.raises(ValueError, match=r"'x' is loaded already"):
        load(pool, "x", 1)
    assert_same(before, snapshot(pool))


def test_least_recently_used_adapter_is_evicted_and_restored_from_host():
    pool = make()
    for seed in range(3):
        load(pool, f"x{seed}", seed, rank=3 + seed, lora_bias=seed == 1)
    pool.acquire(["x0"]).pool.release([pool._residence.by_name["x0"].slot])
    load(pool, "x3", 3)
    assert pool.stats()["evictions"] == 1 and pool.stats()["cached"] == 1
    assert "x1" in pool and "x1" not in pool._residence.by_name, "expected eviction of x1"
    assert_holds(pool, "x1", state(1, 4, bias=True), 2.0)
    assert pool.stats()["cache_hits"] == 1


def test_generation_grows_with_each_load_and_survives_an_eviction():
    pool = make(max_slots=1)
    load(pool, "x", 0)
    first = pool.generation("x")
    assert first is not None and pool.generation("nobody") is None
    pool.update("x", state(1, 4))
    second = pool.generation("x")
    load(pool, "y", 1)  # x moves to the host cache
    assert "x" not in pool._residence.by_name and pool.generation("x") == second
    pool.acquire(["x"]).__exit__()
    assert "x" in pool._residence.by_name and pool.generation("x") == second
    pool.unload("x")
    assert pool.generation("x") is None
    load(pool, "x", 0)
    config = pool._residence.config_of("x")
    pool.prefetch({"z": (config, state(2, 4))})
    numbers = [first, second, pool.generation("x"), pool.generation("z")]
    assert numbers == sorted(set(numbers))
    pool.acquire(["z"]).__exit__()
    assert pool.generation("z") == numbers[-1]


def test_evicted_adapter_without_host_cache_raises_unknown_adapter():
    pool = make(max_slots=1, host_cache_bytes=0)
    load(pool, "x", 0)
    load(pool, "y", 1)
    assert pool.names == ["y"]
    with pytest.raises(UnknownAdapterError, match="host_cache_bytes had no room"):
        pool.acquire(["x"])
    load(pool, "x", 0)
    pool.unload("x")
    with pytest.raises(UnknownAdapterError, match="'x' is not loaded; 0 are loaded"):
        pool.acquire(["x"])


def test_restoring_several_adapters_does_not_overflow_a_small_cache():
    one = sum(8 * (a + b) * 4 for a, b in ((12, 20), (20, 12)))
    pool = fill(make(max_slots=2, host_cache_bytes=2 * one), range(4))
    for _ in range(3):
        for pair in (("x0", "x1"), ("x2", "x3"), ("x1", "x2")):
            with pool.acquire(pair) as slots:
                for name, slot in zip(pair, slots, strict=True):
                    assert_slot_holds(pool, slot, state(int(name[1])), 2.0)
    assert sorted(pool.names) == ["x0", "x1", "x2", "x3"]
    assert pool.stats()["cache_bytes"] <= 2 * one


def test_prefetched_adapters_are_known_and_take_no_slot():
    pool = make(max_slots=1)
    sources = {f"x{seed}": (config(), state(seed)) for seed in range(3)}
    assert pool.prefetch(sources) == ["x0", "x1", "x2"]
    assert pool.stats()["slots_used"] == 0 and pool.nbytes() == 0
    assert_holds(pool, "x2", state(2), 2.0)
    before = snapshot(pool)
    with pytest.raises(ValueError, match="r: expected a positive integer"):
        pool.prefetch({"y": (config(), state(9)), "z": (config(0), state(8))})
    assert_same(before, snapshot(pool))
    pool.host_cache_bytes = 10
    with pytest.raises(ValueError, match="host_cache_bytes"):
        pool.prefetch({"y": (config(), state(9))})
    assert_same(before, snapshot(pool))


def test_error_of_a_fully_pinned_pool_names_pages_and_adapters():
    pool = make(pages=4)
    load(pool, "x", 0, rank=16)
    load(pool, "y", 1, rank=8)
    lease = pool.acquire(["x", "y"])
    before = snapshot(pool)
    with pytest.raises(
        PoolFullError, match=r"needs 2 pages of down \(1 can be freed\).*\['x', 'y'\]"
    ):
        load(pool, "z", 2, rank=16)
    assert_same(before, snapshot(pool))
    load(pool, "z", 2, rank=8)
    other = pool.acquire(["z"])
    with pytest.raises(PoolFullError, match="one of max_slots=3 slots"):
        load(pool, "w", 3)
    pool.release(lease)
    load(pool, "w", 3, rank=16)
    assert_slot_holds(pool, other[0], state(2, 8), 1.0)
    with pytest.raises(PoolFullError, match="needs 2 pages of up, but the pool has pages=1"):
        load(make(pages=1), "x", 0, rank=16)


def test_update_leaves_the_pinned_version_unchanged():
    pool = make()
    load(pool, "x", 0)
    old = pool.acquire(["x"])
    pool.update("x", state(1))
    new = pool.acquire(["x"])
    assert old[0] != new[0]
    assert_slot_holds(pool, old[0], state(0), 2.0)
    assert_slot_holds(pool, new[0], state(1), 2.0)
    assert pool.stats()["slots_used"] == 2
    pool.release(old)
    assert pool.stats()["slots_used"] == 1
    pool.release(new)
    pool.update("x", (config(9, lora_alpha=3), state(2, 9)))
    assert_holds(pool, "x", state(2, 9), 3 / 9)


def test_update_works_in_a_pool_of_one_slot_and_on_an_evicted_adapter():
    pool = make(max_slots=1)
    load(pool, "x", 0)
    pool.update("x", state(1))
    assert pool.stats()["evictions"] == 0 and pool.stats()["cached"] == 0
    load(pool, "y", 2)
    pool.update("x", state(3))
    assert_holds(pool, "x", state(3), 2.0)
    assert sorted(pool.names) == ["x", "y"] and pool.stats()["cached"] == 1


def test_unloading_a_pinned_adapter_frees_its_pages_at_the_last_release():
    pool = make()
    load(pool, "x", 0)
    lease = pool.acquire(["x", "x"])
    pool.unload("x")
    assert "x" not in pool and pool.stats()["slots_used"] == 1
    load(pool, "x", 1)
    assert_slot_holds(pool, lease[0], state(0), 2.0)
    pool.release(lease)
    assert pool.stats()["slots_used"] == 1
    pool.unload("x")
    assert pool.stats()["pages_free"] == pool.stats()["pages_total"]


def test_pin_released_by_garbage_collection_during_a_load_frees_its_pages(monkeypatch):
    # The garbage collector may close a generator, which exits its `with` block, at any time.
    pool = make()
    load(pool, "x", 0)
    lease = pool.acquire(["x"])
    pool.unload("x")
    copy_ = _transfer.copy_

    def collects(*tensors):
        if not lease.released:
            pool.release(lease)
        copy_(*tensors)

    monkeypatch.setattr(_transfer, "copy_", collects)
    load(pool, "y", 1)
    assert lease.released
    assert_holds(pool, "y", state(1), 2.0)
    pool.unload("y")
    stats = pool.stats()
    assert stats["pages_free"] == stats["pages_total"] and stats["pins"] == stats["slots_used"] == 0


def test_a_pin_cannot_be_released_twice():
    pool = make()
    load(pool, "x", 0)
    lease = pool.acquire(["x", None])
    slots = list(lease)
    pool.release(lease)
    for twice in (lease, slots, [7], [-2]):
        with pytest.raises(ValueError, match=r"AdapterPool\.release"):
            pool.release(twice)
    with pool.acquire(["x"]) as inner, pytest.raises(ValueError, match="2 pins, found 1"):
        pool.release([inner[0], inner[0]])
    assert pool.stats()["pins"] == 0


def test_adapters_use_noncontiguous_pages():
    pool = fill(make(max_slots=8, pages=8, max_rank=32), range(8), 8)
    for seed in (1, 3, 4, 6):
        pool.unload(f"x{seed}")
    load(pool, "wide", 9, rank=31)
    with pool.acquire(["wide", "x0", "x7"]) as slots:
        table = pool.modules["up"].page_table[slots[0]].tolist()
        assert sorted(table) != list(range(min(table), min(table) + 4)), "not contiguous"
        assert_slot_holds(pool, slots[0], state(9, 31), 8 / 31)
        assert_slot_holds(pool, slots[1], state(0, 8), 1.0)
        assert_slot_holds(pool, slots[2], state(7, 8), 1.0)
    assert pool.stats()["evictions"] == 0


def test_magnitudes_are_evicted_to_the_host_and_restored():
    pool = make(max_slots=2)
    load(pool, "x", 0)
    tables = pool.stats()["table_bytes"]
    load(pool, "d", 1, use_dora=True)
    slab = pool.modules["up"]
    assert pool.stats()["table_bytes"] == tables + 2 * (20 + 12) * 4
    address = slab.after.data_ptr()
    with pool.acquire(["d"]) as slots:
        assert_slot_holds(pool, slots[0], state(1, dora=True), 2.0)
        first = slab.scaled[slots[0]]
        load(pool, "y", 2)
        load(pool, "z", 3, targets=("head",))
        assert slab.scaled == {slots[0]: first}, "expected that other loads keep the version"
    size = pool._residence.cache["x"].nbytes
    for seed, name in ((4, "p"), (5, "q")):
        load(pool, name, seed)
    assert slab.scaled == {} and not slab.after.any()
    assert pool._residence.cache["d"].nbytes == size + (20 + 12) * 4
    with pool.acquire(["d"]) as slots:
        assert_slot_holds(pool, slots[0], state(1, dora=True), 2.0)
        assert slab.scaled[slots[0]].version > first.version
        assert slab.after.data_ptr() == address
    pool.update("d", state(6, dora=True))
    assert_holds(pool, "d", state(6, dora=True), 2.0)
    before = snapshot(pool)
    with pytest.raises(ValueError, match="magnitude_vector"):
        pool.update("d", state(7))
    assert_same(before, snapshot(pool))
    pool.update("d", (config(), state(7)))
    assert_holds(pool, "d", state(7), 2.0)


@pytest.mark.slow
def test_pinned_slots_do_not_change_while_another_thread_loads_and_unloads():
    pool = make(max_slots=6, pages=12)
    for seed in range(4):
        load(pool, f"x{seed}", seed, rank=1 + 4 * seed)
    stop, errors = threading.Event(), []

    def read(number):
        g = torch.Generator().manual_seed(number)
        try:
            while not stop.is_set():
                pick = [f"x{int(i)}" for i in torch.randint(4, (2,), generator=g)]
                try:
                    with pool.acquire(pick) as slots:
                        for name, slot in zip(pick, slots, strict=True):
                            first = read_slot(pool, slot)
                            mark = first["up"][0][0, 0].item()
                            rank = first["up"][0].shape[0]
                            seed = {1: 0, 5: 1, 9: 2, 13: 3}[rank]
                            assert name == f"x{seed}"
                            versions = [state(seed + 10 * v, rank) for v in range(3)]
                            key = "base_model.model.up.lora_A.weight"
                            own = next(v for v in versions if v[key][0, 0].item() == mark)
                            assert_slot_holds(pool, slot, own, 8 / rank)
                except PoolFullError:
                    pass
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in readers:
        thread.start()
    end = time.monotonic() + 3
    step = 0
    try:
        while time.monotonic() < end and not errors:
            step += 1
            try:
                load(pool, f"other{step}", 100 + step, rank=1 + step % 16)
                pool.update(f"x{step % 4}", state(step % 4 + 10 * (step % 3), 1 + 4 * (step % 4)))
                pool.unload(f"other{step}")
            except (PoolFullError, UnknownAdapterError):
                pass
    finally:
        stop.set()
        for thread in readers:
            thread.join()
    assert not errors, errors[0]
    assert step > 5 and pool.stats()["pins"] == 0
    for name in [n for n in pool.names if n.startswith("other")]:
        pool.unload(name)


def test_acquire_and_release_are_fast():
    pool = fill(make(), range(3))
    names = ["x0", None, "x2", "x1"]
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            pool.release(pool.acquire(names))
        best = min(best, (time.perf_counter() - start) / 100)
    assert best < 20e-6, "expected acquire and release to take about 10 us each"


def test_pool_loaded_in_inference_mode_is_updated_outside_it():
    pool = AdapterPool(Base(), max_slots=2, max_rank=8)
    with torch.inference_mode():
        pool.load("a", (config(), state(1)))
    pool.update("a", (config(), state(2)))
    assert not pool.modules["up"].a_pages.is_inference()
