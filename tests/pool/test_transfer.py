"""Order of copies and steps on a device, with fake streams that run work in any allowed order."""

import pytest
import torch
from fake_cuda import FakeCuda
from pool_support import Base, config, load, state

from lora_ext.pool import AdapterPool, _transfer
from lora_ext.pool._transfer import StreamTransfer

SEEDS = range(40)


@pytest.fixture
def cuda(request, monkeypatch):
    """Return a fake device that queues all copies of the pool."""
    world = FakeCuda(getattr(request, "param", 0))

    def copy_(destination, source):
        def work():
            destination.copy_(source)

        world.launch(work)

    monkeypatch.setattr(_transfer, "copy_", copy_)
    return world


@pytest.fixture
def pool(cuda):
    pool = AdapterPool(Base(), max_slots=2, max_rank=8)
    device = torch.device("cpu")
    pool._store.transfers[device] = StreamTransfer(device, cuda)
    for name, seed in (("a", 1), ("b", 2)):
        load(pool, name, seed)
    cuda.run()
    return pool


def step(cuda, pool, slot, seen):
    """Queue a step that reads a slot through the tables of the pool, like a kernel, and appends the
    values to ``seen``."""
    slab = pool.modules["up"]

    def work():
        page = int(slab.page_table[slot, 0])
        seen.append(slab.a_pages[page, :4].clone())

    cuda.launch(work)


def factor(seed):
    return state(seed)["base_model.model.up.lora_A.weight"]


@pytest.mark.parametrize("cuda", SEEDS, indirect=True)
def test_step_reads_the_adapter_that_the_slot_had_when_it_was_queued(cuda, pool):
    # The slot is reused as soon as the lease is released, and the step runs late.
    before, after = [], []
    with pool.acquire(["a"]) as slots:
        step(cuda, pool, slots[0], before)
    pool.unload("a")
    load(pool, "c", 3)
    with pool.acquire(["c"]) as slots:
        step(cuda, pool, slots[0], after)
    cuda.run()
    assert torch.equal(before[0], factor(1))
    assert torch.equal(after[0], factor(3))


@pytest.mark.parametrize("cuda", SEEDS, indirect=True)
def test_steps_on_other_streams_are_ordered_too(cuda, pool):
    before, after = [], []
    with cuda.stream(cuda.Stream()), pool.acquire(["b"]) as slots:
        step(cuda, pool, slots[0], before)
    pool.unload("b")
    with cuda.stream(cuda.Stream()):
        load(pool, "c", 3)
    with cuda.stream(cuda.Stream()), pool.acquire(["c"]) as slots:
        step(cuda, pool, slots[0], after)
    cuda.run()
    assert torch.equal(before[0], factor(2))
    assert torch.equal(after[0], factor(3))


@pytest.mark.parametrize("cuda", SEEDS, indirect=True)
def test_adapter_evicted_right_after_its_load_is_restored_intact(cuda, pool):
    # The copy to the host is queued before the copy to the device has finished.
    pool.unload("a")
    load(pool, "c", 3)
    load(pool, "d", 4)  # evicts b
    load(pool, "e", 5)  # evicts c
    assert "c" in pool._residence.cache
    seen = []
    with pool.acquire(["c"]) as slots:
        step(cuda, pool, slots[0], seen)
    cuda.run()
    assert torch.equal(seen[0], factor(3))


def test_host_waits_only_for_new_modules_and_the_first_bias(cuda, pool):
    cuda.waits = 0
    pool.unload("a")
    load(pool, "c", 3)
    assert cuda.waits == 0 and cuda.streams, "expected that load returns while copies are queued"
    assert any(stream.queue for stream in cuda.streams)
    pool.unload("b")
    # Open leases read the tables of a new module, so the host waits until these are copied.
    pool.load("h", (config(targets=("head",)), state(4, targets=("head",))))
    assert cuda.waits == 1
    pool.unload("c")
    pool.load("bias", (config(lora_bias=True), state(5, bias=True)))
    assert cuda.waits == 2, "expected a wait for the table of the first bias"


def test_a_pin_inside_a_capture_is_refused(cuda, pool):
    cuda.capturing = True
    with pytest.raises(RuntimeError, match=r"AdapterPool\.acquire: .* around the capture"):
        pool.acquire(["b"])
    cuda.capturing = False
    assert pool.stats()["pins"] == 0


def test_failed_copy_leaves_nothing_queued(cuda, pool, monkeypatch):
    # The memory of the failed load is released and must not be written later.
    queued, real = [], _transfer.copy_

    def copy_(destination, source):
        if len(queued) == 5:
            raise RuntimeError("the copy failed")
        queued.append(destination)
        real(destination, source)

    pool.unload("a")
    monkeypatch.setattr(_transfer, "copy_", copy_)
    with pytest.raises(RuntimeError, match="the copy failed"):
        pool.load("h", (config(targets=("head",)), state(4, targets=("head",))))
    assert len(queued) == 5 and not any(stream.queue for stream in cuda.streams)


@pytest.mark.parametrize("cuda", SEEDS, indirect=True)
def test_graph_reads_its_adapter_while_its_lease_is_open(cuda, pool):
    # Only the lease pins the adapter; replays neither pin nor release it.
    lease = pool.acquire(["a"])
    seen = []

    def replay():
        step(cuda, pool, lease[0], seen)

    replay()
    # Load other adapters. The graph's adapter is unloaded at seed 12 and loaded again at 14.
    for seed in range(10, 16):
        load(pool, f"x{seed}", seed)
        replay()
        if seed == 12:
            pool.unload("a")
        if seed == 14:
            load(pool, "a", 14)
            replay()
    pool.release(lease)  # The release is on the stream of the replays, which used the adapter last.
    load(pool, "y", 20)
    load(pool, "z", 21)
    cuda.run()
    assert len(seen) == 8 and all(torch.equal(each, factor(1)) for each in seen)
