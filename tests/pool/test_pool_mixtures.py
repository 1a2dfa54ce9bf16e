"""Mixtures in a pool: slots without pages, pins, tables, limits, and invalid mixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pool_support import SIZES, config, fill, load, make, state

from lora_ext.pool import AdapterPool, PoolFullError, UnknownAdapterError

AB = {"x0": 0.5, "x1": 2.0}


def factors(pool: AdapterPool, slot: int, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale of each rank of a slot, from the tables, and the slot's weighted update."""
    slab: Any = pool.modules[module]
    pages = [page for page in slab.page_table[slot].tolist() if page >= 0]
    assert slab.ranks[slot] == 8 * len(pages)
    a, b = slab.a_pages[pages].flatten(0, 1), slab.b_pages[pages].permute(1, 0, 2).flatten(1)
    scale = slab.page_scale[slot, : len(pages)].repeat_interleave(8)
    weights = torch.tensor([0.5, 2.0, -3.0])[slab.groups[slot, : len(pages)].long()]
    return scale, b @ (scale[:, None] * weights.repeat_interleave(8)[:, None] * a)


@pytest.mark.parametrize("ranks", [(4, 8), (4, 4), (11, 1)])
def test_mixture_has_the_pages_of_its_adapters(ranks: tuple[int, int]) -> None:
    pool = make(max_slots=4, max_rank=32)
    for i, rank in enumerate(ranks):
        load(pool, f"x{i}", i, rank)
    load(pool, "x2", 2, 8, targets=("down",))
    pages = pool.stats()["pages_free"]
    with pool.acquire([{"x1": 2.0, "x0": 0.5, "x2": -3}]) as (slot,):
        for module in ("up", "down"):
            expected = torch.zeros(SIZES[module][::-1])
            for i, (rank, weight) in enumerate(zip((*ranks, 8), (0.5, 2.0, -3.0), strict=True)):
                if i == 2 and module == "up":
                    continue
                own = state(i, rank, ("up", "down") if i < 2 else ("down",))
                stem = f"base_model.model.{module}.lora_"
                update = own[stem + "B.weight"] @ own[stem + "A.weight"]
                expected += weight * 8 / rank * update
            torch.testing.assert_close(factors(pool, slot, module)[1], expected)
    assert pool.stats()["pages_free"] == pages
    with pool.acquire(["x0"]) as (slot,):  # a plain adapter has its scale on each page, column 0
        slab: Any = pool.modules["up"]
        assert slab.page_scale[slot].tolist()[:1] == [slab.scale[slot]]
        assert slab.groups[slot].sum() == 0


def test_equal_sets_share_a_slot_and_weights_do_not_matter() -> None:
    pool = fill(make(max_slots=5), (0, 1, 2))
    entries: list[Any] = [AB, {"x1": 1, "x0": -7}, {"x0": 1, "x1": 1, "x2": 0}, ("x0", 0.5), "x0"]
    with pool.acquire([*entries, {"x0": 1, "x2": 1}, None, ("x1", 0)]) as slots:
        assert slots[0] == slots[1] == slots[2] != slots[3] == slots[4]
        assert len({*slots}) == 4 and slots[6] == slots[7] == -1
        stats = pool.stats()
        assert (stats["slots_used"], stats["slots_pinned"]) == (5, 5)
        assert {name: each["pins"] for name, each in stats["adapters"].items()} == {
            "x0": 6,
            "x1": 3,
            "x2": 1,
        }
        assert sorted(pool.names) == ["x0", "x1", "x2"]
    assert pool.stats()["pins"] == 0


@pytest.mark.parametrize("change", ["update", "unload", "evict"])
def test_mixture_is_published_again_after_its_adapter_changes(change: str) -> None:
    pool = fill(make(max_slots=3), (0, 1))
    with pool.acquire([AB]) as (slot,):
        before = factors(pool, slot, "up")[1]
        if change == "evict":
            with pytest.raises(PoolFullError, match=r"pinned, by 2 adapters: \['x0', 'x1'\]"):
                load(pool, "x2", 2)
        elif change == "unload":
            pool.unload("x1")
            with pytest.raises(UnknownAdapterError, match="'x1' is not loaded"):
                pool.acquire([AB])
        else:
            with pytest.raises(PoolFullError):  # the old version keeps its slot while it is pinned
                pool.update("x1", (config(), state(9)))
        assert torch.equal(factors(pool, slot, "up")[1], before)
    if change == "evict":
        for i in (2, 3, 4):
            load(pool, f"x{i}", i)
        assert pool.stats()["slots_used"] == 3 and pool.stats()["evictions"] == 2
    elif change == "update":
        pool.update("x1", (config(), state(9)))
    else:
        assert pool.stats()["slots_used"] == 1
        load(pool, "x1", 9)
    with pool.acquire([AB, AB]) as slots:
        assert slots[0] == slots[1]
        after = factors(pool, slots[0], "up")[1]
    assert torch.equal(after, before) == (change == "evict")


def test_pinned_mixture_keeps_an_updated_adapter() -> None:
    pool = fill(make(max_slots=5), (0, 1))
    with pool.acquire([AB]) as old:
        before = factors(pool, old[0], "up")[1]
        pool.update("x0", (config(), state(7)))
        assert torch.equal(factors(pool, old[0], "up")[1], before)
        with pool.acquire([AB]) as new:
            assert new[0] != old[0] and not torch.equal(factors(pool, new[0], "up")[1], before)
        assert pool.stats()["slots_used"] == 5
    assert pool.stats()["slots_used"] == 3  # x0, x1 and the new mixture


def test_lease_of_a_mixture_can_be_renewed_until_an_adapter_leaves() -> None:
    pool = fill(make(max_slots=3), (0, 1))
    with pool.acquire([AB]) as lease:
        pass
    lease.renew()
    assert pool.stats()["slots_pinned"] == 3
    lease.__exit__()
    assert pool.stats()["slots_pinned"] == 0
    pool.unload("x0")
    with pytest.raises(RuntimeError, match="unloaded, updated or evicted"):
        lease.renew()
    load(pool, "y", 3)
    assert pool.stats()["slots_used"] == 2


def test_mixture_is_evicted_before_its_adapters() -> None:
    pool = fill(make(max_slots=3), (0, 1))
    pool.acquire([AB]).__exit__()
    load(pool, "x2", 2)
    stats = pool.stats()
    assert (stats["evictions"], stats["slots_used"], stats["cached"]) == (0, 3, 0)
    with pytest.raises(PoolFullError, match=r"needs one of max_slots=3 slots"):
        pool.acquire(["x2", AB])
    assert pool.stats()["pins"] == 0
    with pool.acquire([AB]):  # x2 is evicted
        assert pool.stats()["cached"] == 1


def test_mixture_of_too_many_pages_says_how_many() -> None:
    pool = fill(make(max_slots=4, max_rank=16), (0, 1, 2))
    message = (
        r"acquire: names: expected a mixture of at most 2 pages per module \(max_rank=16\), found "
        r"\['x0', 'x1', 'x2'\], which needs 3 in 'up'"
    )
    with pytest.raises(ValueError, match=message):
        pool.acquire([None, {"x0": 1, "x1": 1, "x2": 1}])
    assert pool.stats()["pins"] == 0 and pool.stats()["slots_used"] == 3


@pytest.mark.parametrize("given", ["x0", {"x0": 1}, [("x0", True)], [{"x0": "1"}], [3], [("a",)]])
def test_acquire_rejects_what_is_no_list_of_entries(given: Any) -> None:
    pool = fill(make(), (0,))
    with pytest.raises((TypeError, ValueError), match=r"AdapterPool\.acquire: names: "):
        pool.acquire(given)
    assert pool.stats()["pins"] == 0


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"use_dora": True}, "DoRA at 'up'"),
        ({"alora_invocation_tokens": [3, 4]}, "aLoRA adapter"),
        ({"modules_to_save": ["head"]}, "modules_to_save at 'head'"),
    ],
)
def test_mixtures_refuse_by_name(fields: dict[str, Any], found: str) -> None:
    pool = fill(make(max_slots=4), (0,))
    tensors = state(1, dora="use_dora" in fields)
    if "modules_to_save" in fields:
        tensors |= {f"base_model.model.head.{k}": v for k, v in head().items()}
    pool.load("odd", (config(**fields), tensors))
    with pytest.raises(NotImplementedError, match=f"names: 'odd': .*{found}"):
        pool.acquire(["x0", {"x0": 1, "odd": 0.5}])
    if "alora_invocation_tokens" in fields:  # An activated adapter alone may have a weight.
        pool.acquire([("odd", 0.5)]).__exit__()
    else:
        with pytest.raises(NotImplementedError, match=f"names: 'odd': .*{found}"):
            pool.acquire([("odd", 0.5)])
    assert pool.stats()["pins"] == 0
    pool.acquire(["odd", ("odd", 1), {"odd": 1, "x0": 0}]).__exit__()


def head() -> dict[str, torch.Tensor]:
    return {"weight": torch.ones(5, 12), "bias": torch.ones(5)}


def test_tables_of_mixtures_are_allocated_for_the_first_one() -> None:
    pool = fill(make(max_slots=4), (0, 1))
    before = pool.stats()["table_bytes"]
    pool.acquire(["x0", "x1"]).__exit__()
    assert pool.modules["up"].page_scale is None and pool.stats()["table_bytes"] == before
    pool.acquire([("x0", 0.5)]).__exit__()
    assert pool.modules["up"].page_scale is None and pool.modules["up"].mixed == 1
    pool.acquire([AB]).__exit__()
    assert pool.modules["up"].mixed == 2
    more = 2 * 4 * 2 * 8 + 4 * 64 * 4  # tables of two modules, four slots, two pages; and members
    assert pool.stats()["table_bytes"] == before + more
    load(pool, "x2", 2, targets=("head",))
    with pool.acquire(["x2"]) as (slot,):
        slab: Any = pool.modules["head"]
        assert slab.page_scale[slot, 0] == slab.scale[slot] == 2


@pytest.mark.parametrize("pinned", [False, True])
def test_tables_of_mixtures_are_prepared_in_a_full_pool(pinned: bool) -> None:
    pool = make(max_slots=2, host_cache_bytes=0)
    for i in (0, 1):
        load(pool, f"x{i}", i)
    lease = pool.acquire(["x0", "x1"] if pinned else [])
    own = [factors_of_one(pool, slot) for slot in lease]
    pool.prepare_mixtures(2)
    stats = pool.stats()
    assert pool.names == ["x0", "x1"] and (stats["evictions"], stats["slots_used"]) == (0, 2)
    assert all(map(torch.equal, own, [factors_of_one(pool, slot) for slot in lease]))
    lease.__exit__()
    with pool.acquire(["x0", "x1"]) as slots:
        slab: Any = pool.modules["up"]
        assert slab.page_scale[list(slots), 0].tolist() == slab.scale[list(slots)].tolist()


def factors_of_one(pool: AdapterPool, slot: int) -> torch.Tensor:
    slab: Any = pool.modules["up"]
    page = int(slab.page_table[slot, 0])
    return slab.scale[slot] * slab.b_pages[page] @ slab.a_pages[page]


def test_unknown_name_with_weight_0_is_refused() -> None:
    pool = fill(make(), (0,))
    for entry in ({"x0": 1, "y": 0}, ("y", 0), {"y": 0.0}):
        with pytest.raises(UnknownAdapterError, match=r"acquire: names: adapter 'y' is not load"):
            pool.acquire(["x0", entry])
    assert pool.stats()["pins"] == 0


def test_failed_copy_leaves_the_pool_without_the_mixture(monkeypatch: Any) -> None:
    pool = fill(make(max_slots=3), (0, 1, 2))
    device = next(iter(pool._store.transfers))

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("the copy failed")

    with monkeypatch.context() as patch:
        patch.setattr(pool._store.transfers[device], "run", fails)
        with pytest.raises(RuntimeError, match="the copy failed"):
            pool.acquire([AB])
    assert pool.stats()["pins"] == 0 and {"x0", "x1", "x2"} == {*pool.names}
    with pool.acquire([AB]) as (slot,):
        assert factors(pool, slot, "up")[1].isfinite().all()
