"""Limits of the memory of a server's adapters, and the order in which they get it."""

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from served import (
    MANY,
    ask,
    by_generate,
    metric,
    needs_packages,
    pause,
    post,
    resume,
    said,
    save_model,
    serving,
    settle,
    streamed,
    text_of,
    until,
)

from lora_ext.pool import PoolFullError
from lora_ext.server import Settings
from lora_ext.serving import Engine, StoppedError
from lora_ext.serving._engine import Turns

pytestmark = needs_packages
WORDS, HOST = "w5 w6 w7", 40_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("bounded")
    save_model(found)
    return found


def engine_of(folder: Path, **how: Any) -> Engine:
    settings = {"device": "cpu", "max_rank": 32, "context": 128, "pack": "none", **how}
    engine = Settings(folder / "tiny", folder / "adapters", **settings).engine(lambda line: None)
    assert isinstance(engine, Engine)
    return engine


def room_of(folder: Path, count: int) -> int:
    """Return the bytes that the last ``count`` adapters need together."""
    engine = engine_of(folder)
    for name in MANY[-count:]:
        engine.folder.load(name)
    engine.pool.trim()
    return engine.pool.reserved_bytes


async def answer(engine: Engine, name: Any) -> str:
    prompt = [{"role": "user", "content": WORDS}]
    stream = await engine.begin(prompt, name, 8)
    return "".join([text async for text in stream.texts(engine.tokenizer)])


def test_memory_stays_below_the_limits_over_60_loads(folder: Path) -> None:
    limit = room_of(folder, 4)
    engine = engine_of(folder, max_loaded_bytes=limit, host_cache_bytes=HOST)
    plain = engine_of(folder)
    expected = {}
    for name in MANY:
        plain.folder.load(name)
        expected[name] = by_generate(SimpleNamespace(engine=plain), name, WORDS, 8)
    assert len({*expected.values()}) > 8

    async def run() -> None:
        for i in range(60):
            await asyncio.to_thread(engine.folder.load, f"b{i}", MANY[i % 16])
            found = engine.stats()
            assert found["pool_reserved_bytes"] <= found["pool_limit_bytes"] == limit
            assert found["pool_cache_bytes"] <= found["pool_cache_limit_bytes"] == HOST
        assert engine.stats()["pool_dropped"] > 40 and "b0" not in engine.pool
        for i in (0, 1, 2, 15, 17, 30, 59, 0):  # most of them are read from their folders again
            assert await answer(engine, f"b{i}") == expected[MANY[i % 16]]
            found = engine.stats()
            assert found["pool_reserved_bytes"] <= limit and found["pool_cache_bytes"] <= HOST
        assert engine.stats()["pool_loads"] >= 66

    with engine:
        asyncio.run(run())


def test_pinned_adapters_are_never_dropped(folder: Path) -> None:
    engine = engine_of(folder, max_loaded_bytes=room_of(folder, 3), host_cache_bytes=0)
    engine.folder.load("a15")
    with engine.pool.acquire(["a15"]) as lease:
        table = engine.pool.modules["model.layers.0.self_attn.q_proj"].page_table
        assert table is not None
        before = table[lease[0]].clone()
        for name in MANY[:15]:
            engine.folder.load(name)
            assert "a15" in engine.pool
        assert torch.equal(table[lease[0]], before) and engine.pool.stats()["dropped"] > 8
    for name in MANY[8:15]:
        engine.folder.load(name)
    assert "a15" not in engine.pool


def test_limit_below_one_adapter_is_an_error_with_both_numbers(folder: Path) -> None:
    needed = room_of(folder, 1)
    engine = engine_of(folder, max_loaded_bytes=needed - 1)
    engine.folder.load("a0")
    with (
        engine.pool.acquire(["a0"]),
        pytest.raises(PoolFullError, match=f"needs {needed} bytes .*max_bytes={needed - 1};") as e,
    ):
        engine.folder.load("a15")
    assert e.value.final and engine.pool.names == ["a0"]
    engine_of(folder, max_loaded_bytes=needed).folder.load("a15")


def test_server_shows_the_limits_and_rejects_an_adapter_above_them(
    folder: Path, tmp_path: Path
) -> None:
    limit = room_of(folder, 1) - 1
    limits = {"max_loaded_bytes": limit, "host_cache_bytes": HOST}
    with serving(tmp_path, max_rank=32, **limits) as server:
        assert metric(server, "pool_limit_bytes") == limit
        assert metric(server, "pool_cache_limit_bytes") == HOST
        assert ask(server, "a0").status_code == 200
        refused = ask(server, "a15")
        assert refused.status_code == 400 and f"max_bytes={limit};" in refused.text
        assert "Retry-After" not in refused.headers
        assert post(server, "load", "a15") == 400
        assert ask(server, "a0").status_code == 200


def test_loads_into_a_full_pool_wait_on_the_host(folder: Path, tmp_path: Path) -> None:
    """Check new and loaded names while a request pins the only adapter for which there is room."""
    with serving(tmp_path, max_rank=32, max_loaded_bytes=room_of(folder, 1)) as server:

        def load(name: str, path: str) -> int:
            body = {"lora_name": name, "lora_path": path}
            found = server.client.post("/v1/load_lora_adapter", json=body)
            assert found.status_code == 200, found.text
            return found.json()["adapter_generation"]

        expected = {name: text_of(ask(server, name)) for name in ("a14", "a15")}
        first = load("mine", "a15")
        with ThreadPoolExecutor(4) as clients:
            pause(server)
            running = clients.submit(streamed, server, "mine", max_tokens=30)
            until(lambda: server.engine.pool.stats()["pins"] == 1)
            new = [load("other", "a14"), load("mine", "a14")]
            assert first < new[0] < new[1]
            for name, generation in zip(("other", "mine"), new, strict=True):
                # The requested generation was replaced, so the request fails without waiting.
                gone = ask(server, name, adapter_generation=first)
                assert gone.status_code == 409 and f"expected {generation}" in gone.text
            waiting = [
                clients.submit(ask, server, name, adapter_generation=generation)
                for name, generation in zip(("other", "mine"), new, strict=True)
            ]
            until(lambda: len(server.engine._turns.names) == 2)
            resume(server)
            assert {text_of(each.result()) for each in waiting} == {expected["a14"]}
            assert said(running.result()).startswith(expected["a15"])
        assert text_of(ask(server, "a15")) == expected["a15"]
        settle(server)


@pytest.mark.parametrize("host_cache_bytes", [0, 1 << 20])
def test_mixtures_wait_for_room_and_are_refused_if_there_is_never_any(
    folder: Path, host_cache_bytes: int
) -> None:
    def engine(count: int) -> Engine:
        room = room_of(folder, count) + 20_000  # the tables of mixtures are larger
        return engine_of(folder, max_loaded_bytes=room, host_cache_bytes=host_cache_bytes)

    async def refused() -> None:
        with pytest.raises(PoolFullError) as error:
            await answer(small, both)
        assert error.value.final and "'a14'" in str(error.value)
        await answer(small, "a14")

    async def run() -> None:
        expected = await answer(large, both)
        assert expected != await answer(large, "a14")
        running = await large.begin(WORDS, "a15", 100)
        waiting = asyncio.create_task(answer(large, both))
        while not large._turns._waiting:
            await asyncio.sleep(0.01)
        running.cancel()
        assert await asyncio.wait_for(waiting, 60) == expected

    both, small, large = {"a13": 0.5, "a14": 0.5}, engine(1), engine(2)
    with small:
        asyncio.run(refused())
    with large:
        asyncio.run(run())


def test_load_without_room_on_device_or_host_is_refused(folder: Path) -> None:
    engine = engine_of(folder, max_loaded_bytes=room_of(folder, 1), host_cache_bytes=0)
    engine.folder.load("a15")
    with engine.pool.acquire(["a15"]):
        for name in ("a14", "a15"):
            with pytest.raises(PoolFullError) as error:
                engine.folder.load(name)
            assert not error.value.final
    engine.folder.load("a14")


def test_float8_adapters_answer_over_http(tmp_path: Path) -> None:
    with serving(tmp_path, max_rank=32, lora_dtype="float8_e4m3fn") as server:
        for name in ("a0", "a15"):
            assert text_of(ask(server, name)) == by_generate(server, name, WORDS, 8)
        pages = server.engine.pool.modules["model.layers.0.self_attn.q_proj"].a_pages
        assert pages.dtype == torch.float8_e4m3fn


def test_settings_name_the_flag_of_an_invalid_limit(folder: Path) -> None:
    cases: list[tuple[str, Any, str]] = [
        ("max_loaded_bytes", 0, "at least 1, found 0"),
        ("max_loaded_bytes", 1.5, "an integer, at least 1, found 1.5"),
        ("host_cache_bytes", -1, "at least 0, found -1"),
        ("max_wait_s", -1.0, "a number from 0, found -1.0"),
        ("lora_dtype", "float8", "one of .*'auto', 'float8_e4m3fn'.*, found 'float8'"),
        ("lora_dtype", "float8_e4m3fn", "auto with --exact, found 'float8_e4m3fn'"),
    ]
    for name, wrong, expected in cases:
        flag = f"--{name.replace('_', '-')}: expected {expected}"
        with pytest.raises(ValueError, match=flag):
            own = {"exact": "--exact" in expected, name: wrong}
            Settings(folder / "tiny", folder / "adapters", **own).check()


def order_of(max_wait_s: float, late: float) -> list[str]:
    """Return the order in which five requests get room in a pool with room for one at a time.

    The first one keeps its room until time ``late``, when the last two arrive.
    """
    turns, clock, full = Turns(max_wait_s), SimpleNamespace(now=0.0), {"a"}
    order: list[str] = []
    turns._clock = lambda: clock.now

    async def request(name: str | None, tag: str) -> None:
        with turns.take(name) as turn:
            while True:
                await turns.wait(turn)
                freed = turns.freed
                if name is None or name in full or not full:
                    full.update([name] if name else [])
                    order.append(tag)
                    return
                await turns.room(turn, freed)

    async def run() -> None:
        async def begin(*requests: tuple[str | None, str]) -> list[asyncio.Task[None]]:
            tasks = [asyncio.create_task(request(*each)) for each in requests]
            for _ in range(10):
                await asyncio.sleep(0)
            return tasks

        tasks = await begin(("b", "b1"), ("c", "c1"), ("b", "b2"))
        clock.now = late
        tasks += await begin(("a", "a1"), (None, "base"))
        for _ in range(4):
            full.clear()
            turns.free()
            tasks += await begin()
        await asyncio.wait_for(asyncio.gather(*tasks), 10)

    asyncio.run(run())
    return order


def test_later_requests_overtake_only_until_the_limit() -> None:
    assert order_of(3.0, late=2.9) == ["a1", "base", "b1", "b2", "c1"]
    assert order_of(3.0, late=3.0) == ["base", "b1", "c1", "b2", "a1"]


@pytest.mark.parametrize("max_wait_s", [3.0, 1e9])
def test_stream_of_other_requests_starves_no_adapter(folder: Path, max_wait_s: float) -> None:
    limits = {"max_loaded_bytes": room_of(folder, 2), "max_wait_s": max_wait_s, "context": 2000}
    engine, clock = engine_of(folder, **limits), SimpleNamespace(now=0.0)
    engine._turns._clock = lambda: clock.now
    prompt, order = [{"role": "user", "content": WORDS}], []

    async def begin(name: str, tag: str) -> Any:
        stream = await engine.begin(prompt, name, 1900)
        order.append(tag)
        return stream

    async def run() -> None:
        running = [await begin("a14", "first"), await begin("a15", "first")]
        hungry = asyncio.create_task(begin("a13", "hungry"))
        while not engine._turns._waiting:
            await asyncio.sleep(0.01)
        for i in range(4):  # Each request of a14 and a15 begins before the one before it ends.
            running += [await begin(each, f"{each} {i}") for each in ("a14", "a15")]
            for stream in running[:2]:
                stream.cancel()
            del running[:2]
        assert "hungry" not in order and not hungry.done()
        clock.now = 3.0
        later = [asyncio.create_task(begin(each, "later")) for each in ("a14", "a15")]
        for _ in range(50):
            await asyncio.sleep(0.01)
        assert ("later" in order) == (max_wait_s > 3)
        for stream in running:
            stream.cancel()
        for task in (*later, hungry) if "later" in order else (hungry, *later):
            (await task).cancel()
        assert (order.index("hungry") < order.index("later")) == (max_wait_s == 3)

    with engine:
        asyncio.run(asyncio.wait_for(run(), 60))
    assert engine._turns._waiting == [] and engine.pool.stats()["pins"] == 0


def test_waiting_request_ends_when_the_server_stops(folder: Path) -> None:
    engine = engine_of(folder, max_loaded_bytes=room_of(folder, 1), context=2000)
    prompt = [{"role": "user", "content": WORDS}]

    async def run() -> None:
        await engine.begin(prompt, "a15", 1900)
        waiting = asyncio.create_task(engine.begin(prompt, "a14", 8))
        while not engine._turns._waiting:
            await asyncio.sleep(0.01)
        assert engine.requests == 2
        engine.interrupt()
        with pytest.raises(StoppedError):
            await asyncio.wait_for(waiting, 20)

    with engine:
        asyncio.run(run())


HOST_COPIES = """
import torch
from torch import nn
from lora_ext import AdapterPool


def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096


model = nn.ModuleDict({str(n): nn.Linear(576, 576 + 64 * n, device="meta") for n in range(32)})
pool = AdapterPool(model, max_slots=2, device="cpu", dtype=torch.float32)
config = {"peft_type": "LORA", "r": 16, "lora_alpha": 8, "target_modules": "all-linear"}
tensors = {}
for n in model:
    tensors[f"{n}.lora_A.weight"] = torch.zeros(16, 576)
    tensors[f"{n}.lora_B.weight"] = torch.zeros(576 + 64 * int(n), 16)
for i in range(80):
    pool.load(str(i), (config, tensors))
    if i == 9:
        start, before = held(), pool.stats()["cache_bytes"]
print(held() - start, pool.stats()["cache_bytes"] - before)
"""


@pytest.mark.slow
def test_copies_of_evicted_adapters_leave_no_gaps_in_memory() -> None:
    command = [sys.executable, "-c", HOST_COPIES]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, copies = map(int, run.stdout.split())
    assert copies > 2**28 and grown < 1.05 * copies
