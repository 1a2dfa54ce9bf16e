"""Backends on which every op is run, and the reasons why one cannot run on this machine."""

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

import lora_ext
from lora_ext import _loader, ops

# Modules that call compiled ops through their attribute ``_c``. They are discovered, not listed:
# if a list missed a module, its ops would run on the CPU twins in the tests of every backend.
_MODULES = (
    importlib.import_module(m.name) for m in pkgutil.iter_modules(ops.__path__, "lora_ext.ops.")
)
OP_MODULES = [m for m in _MODULES if hasattr(m, "_c")]


@dataclass(frozen=True)
class Backend:
    """Device and library that run every op. Backends with ``small`` run only small shapes."""

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
        """Compiled module with the ops of this backend."""
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


def marks_of(backend: Backend) -> list[Any]:
    marks = {"cuda": [pytest.mark.cuda], "emu": [pytest.mark.emulated]}
    return marks.get(backend.name.split("-")[0], [])


def closed(backend: Backend) -> str | None:
    """Return the reason why ``backend`` cannot run on this machine, or None if it can."""
    if backend.device == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device"
        return None if lora_ext._C.has_kernels() else "this build has no CUDA kernels"
    if not backend.is_twin:
        try:
            _ = backend.module
        except ImportError:
            module = backend.library.removeprefix("lora_ext")
            return f"lora_ext.{module} is not built (LORA_EXT_EMU=1)"
    return None
