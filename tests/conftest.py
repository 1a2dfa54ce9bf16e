"""Backends: the ways in which one op is run, and what decides whether a way is open here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import settings

import lora_ext
from lora_ext import _loader
from lora_ext.ops import _registration
from lora_ext.ops import lora as lora_ops

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")


@dataclass(frozen=True)
class Backend:
    """One way of running every op. ``small`` backends get the small shapes only."""

    name: str
    device: str = "cpu"
    library: str = "lora_ext"
    isa: str = ""
    seed: int = 0
    small: bool = False

    @property
    def is_twin(self) -> bool:
        return self.library == "lora_ext" and self.device == "cpu"

    @property
    def module(self) -> ModuleType:
        """The compiled module whose ops this backend calls."""
        return _loader.load(self.library.removeprefix("lora_ext") or "_C")

    def dtypes(self) -> list[torch.dtype]:
        types = [torch.float32, torch.float16, torch.bfloat16]
        return [*types, torch.float64] if self.is_twin else types


def _isas() -> list[str]:
    best = lora_ext._C.cpu_isa()
    known = ["scalar", "avx2", "avx512", "avx512bf16"]
    return known[: known.index(best)] if best in known else []


BACKENDS = [
    Backend("cpu"),
    *(Backend(f"cpu-{isa}", isa=isa, small=True) for isa in _isas()),
    Backend("emu", library="lora_ext_emu"),
    Backend("emu-check", library="lora_ext_emu_check", seed=1, small=True),
    Backend("cuda", device="cuda"),
]


def closed(backend: Backend) -> str | None:
    """The reason why a backend cannot run here, or None."""
    if backend.device == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device"
        return None if lora_ext._C.has_kernels() else "this build has no CUDA kernels"
    if not backend.is_twin:
        try:
            _ = backend.module
        except ImportError:
            return (
                f"lora_ext.{backend.library.removeprefix('lora_ext')} is not built (LORA_EXT_EMU=1)"
            )
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="a skipped CUDA test is a failure")
    parser.addoption(
        "--require-emu", action="store_true", help="a skipped emulator test is a failure"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: runs on a GPU")
    config.addinivalue_line("markers", "emulated: runs CUDA kernels on the emulator")
    config.addinivalue_line("markers", "slow: needs a real model or more than ten seconds")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    marks = {"cuda": [pytest.mark.cuda], "emu": [pytest.mark.emulated]}
    metafunc.parametrize(
        "backend",
        [pytest.param(b, id=b.name, marks=marks.get(b.name.split("-")[0], [])) for b in BACKENDS],
        indirect=True,
    )


_registered = {"lora_ext"}


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Route ``lora_ext.ops`` to one backend for the length of a test."""
    chosen: Backend = request.param
    reason = closed(chosen)
    if reason:
        required = "--require-gpu" if chosen.device == "cuda" else "--require-emu"
        if request.config.getoption(required):
            pytest.fail(f"{required}: {reason}")
        pytest.skip(reason)
    if chosen.library not in _registered:
        _registration.register(chosen.library)
        _registered.add(chosen.library)
    if not chosen.is_twin and chosen.device == "cpu":
        seed = int(os.environ.get("LX_SEED", chosen.seed))
        chosen.module.set_seed(seed)
    lora_ext._C.set_cpu_isa(chosen.isa)
    monkeypatch.setattr(lora_ops, "_c", getattr(torch.ops, chosen.library))
    yield chosen
    lora_ext._C.set_cpu_isa("")
