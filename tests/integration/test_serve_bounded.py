"""Limits of the memory of a server's adapters."""

import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from served import MANY, ask, by_generate, metric, needs_packages, post, save_model, serving

from lora_ext.pool import PoolFullError
from lora_ext.server import Settings
from lora_ext.serving import Engine

pytestmark = needs_packages
WORDS, HOST = "w5 w6 w7", 40_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("bounded")
    save_model(found)
    return found


def engine_of(folder: Path, **how: Any) -> Engine:
    settings = {"device": "cpu", "max_rank": 32, "context": 128, "pack": False, **how}
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


async def answer(engine: Engine, name: str | None) -> str:
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


def test_settings_name_the_flag_of_an_invalid_limit(folder: Path) -> None:
    cases: list[tuple[str, Any, str]] = [
        ("max_loaded_bytes", 0, "at least 1, found 0"),
        ("max_loaded_bytes", 1.5, "an integer, at least 1, found 1.5"),
        ("host_cache_bytes", -1, "at least 0, found -1"),
    ]
    for name, wrong, expected in cases:
        flag = f"--{name.replace('_', '-')}: expected {expected}"
        with pytest.raises(ValueError, match=flag):
            Settings(folder / "tiny", folder / "adapters", **{name: wrong}).check()


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
    run = subprocess.run(
        [sys.executable, "-c", HOST_COPIES], capture_output=True, text=True, check=True
    )
    grown, copies = map(int, run.stdout.split())
    assert copies > 2**28 and grown < 1.05 * copies
