"""Rejected arguments of a pool, and failures that leave it unchanged."""

import copy
import itertools

import pytest
import torch
from pool_support import (
    Base,
    FailingCopies,
    assert_holds,
    assert_same,
    assert_slot_holds,
    config,
    fill,
    load,
    make,
    snapshot,
    state,
)

from lora_ext.pool import AdapterPool, _memory, _transfer


@pytest.mark.parametrize("name", ["", "__base__", None, 3])
def test_reserved_and_invalid_names_are_refused(name):
    with pytest.raises(ValueError, match="name"):
        make().load(name, (config(), state(0)))


def _crowded():
    """Return a pool whose two slots are used. Loading ``new`` evicts an adapter, and adds a module
    and a bias."""
    pool = make(max_slots=2, pages=3)
    load(pool, "x", 0, rank=16)
    load(pool, "y", 1, rank=8)
    return pool


ACTIONS = {
    "load": lambda pool: load(pool, "new", 2, rank=16, targets=("up", "head"), lora_bias=True),
    "load dora": lambda pool: load(pool, "new", 2, rank=16, targets=("up", "head"), use_dora=True),
    "update": lambda pool: pool.update("x", state(3, 16)),
    "update to dora": lambda pool: pool.update(
        "x", (config(16, use_dora=True), state(3, 16, dora=True))
    ),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_failed_copy_at_any_point_leaves_the_pool_unchanged(action, monkeypatch):
    for at in itertools.count(1):
        pool = _crowded()
        before = snapshot(pool)
        with monkeypatch.context() as patch:
            fails = FailingCopies(at)
            patch.setattr(_transfer, "copy_", fails)
            try:
                ACTIONS[action](pool)
            except RuntimeError as error:
                assert "the copy failed" in str(error)
            else:
                assert at > fails.count > 10, "expected a failure of every copy"
                break
        assert_same(before, snapshot(pool))
        ACTIONS[action](pool)


@pytest.mark.parametrize("action", ACTIONS)
def test_permanently_failing_device_loses_no_adapter(action, monkeypatch):
    pool = _crowded()
    with monkeypatch.context() as patch:
        patch.setattr(_transfer, "copy_", FailingCopies(3, for_good=True))
        with pytest.raises(RuntimeError, match="the copy failed"):
            ACTIONS[action](pool)
    assert sorted(pool.names) == ["x", "y"]
    for name, seed, rank in (("x", 0, 16), ("y", 1, 8)):
        assert_holds(pool, name, state(seed, rank), 8 / rank)


def test_failed_restore_keeps_the_adapter_and_releases_the_pins(monkeypatch):
    pool = fill(make(max_slots=2), range(3))
    with monkeypatch.context() as patch:
        patch.setattr(_transfer, "copy_", FailingCopies(2))
        with pytest.raises(RuntimeError, match="the copy failed"):
            pool.acquire(["x2", "x0"])
    assert pool.stats()["pins"] == 0
    with pool.acquire(["x2", "x0"]) as slots:
        assert_slot_holds(pool, slots[0], state(2), 2.0)
        assert_slot_holds(pool, slots[1], state(0), 2.0)


def test_out_of_memory_for_a_new_module_leaves_the_pool_unchanged(monkeypatch):
    pool = _crowded()
    before = snapshot(pool)

    def refuse(*_, **__):
        raise OSError("out of memory")

    monkeypatch.setattr(_memory.mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match=r"3 pages of 'head' \([\d.]+ KiB\).*smaller pages="):
        load(pool, "new", 2, targets=("head",))
    monkeypatch.undo()
    assert_same(before, snapshot(pool))


def test_negative_cache_sizes_and_missing_devices_are_refused():
    with pytest.raises(ValueError, match=r"host_cache_bytes: expected .*, found -1"):
        AdapterPool(Base(), host_cache_bytes=-1)
    with pytest.raises(ValueError, match=r"host_cache_bytes: expected .*, found True"):
        AdapterPool(Base(), host_cache_bytes=True)
    pool = AdapterPool(Base(), host_cache_bytes=7)
    for wrong in (-1, True, 1.5, None):
        with pytest.raises(ValueError, match=f"host_cache_bytes: expected .*, found {wrong}"):
            pool.host_cache_bytes = wrong  # pyright: ignore[reportAttributeAccessIssue]
    assert pool.host_cache_bytes == 7
    with pytest.raises((RuntimeError, AssertionError), match=r"(?i)device|cuda"):
        AdapterPool(Base(), device="cuda:77")


def test_copying_a_pool_raises():
    with pytest.raises(TypeError, match="AdapterPool: a pool cannot be copied, pickled or"):
        copy.deepcopy(AdapterPool(Base()))


@pytest.mark.parametrize(
    ("layer", "target"),
    [
        (torch.nn.MultiheadAttention(8, 2), "out_proj"),
        (torch.nn.TransformerEncoderLayer(8, 2, 16), "linear1"),
    ],
)
def test_layers_whose_weights_are_read_outside_forward_are_refused(layer, target):
    model = torch.nn.ModuleDict({"layer": layer, "after": torch.nn.Linear(8, 8)})
    raw = config(targets=(f"layer.{target}",))
    width = getattr(layer, target).out_features
    tensors = {
        f"layer.{target}.lora_A.weight": torch.zeros(4, 8),
        f"layer.{target}.lora_B.weight": torch.zeros(width, 4),
    }
    with pytest.raises(NotImplementedError, match=target):
        AdapterPool(model, max_slots=2, max_rank=8).load("a", (raw, tensors))


@pytest.mark.parametrize(
    "sizes",
    [
        {"max_slots": 2.0},
        {"max_rank": "8"},
        {"pages": 1.5},
        {"max_slots": True},
        {"max_bytes": True},
    ],
)
def test_non_integer_sizes_are_refused_by_name(sizes):
    name, value = next(iter(sizes.items()))
    message = f"AdapterPool: {name}: expected an integer, found {value!r}"
    with pytest.raises(TypeError, match=message):
        make(**{"max_slots": 2, "max_rank": 8, **sizes})
