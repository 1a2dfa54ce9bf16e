"""Build the small kernels of this folder for the emulator, and load them with ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scripts import module_of

HERE = Path(__file__).resolve().parent


def headers() -> str:
    """Return the header folders of NVIDIA's wheels, or "", for which CMake searches a toolkit."""
    setup = module_of(HERE.parents[1] / "setup.py", "lora_ext_setup")
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(setup, "find_nvcc", lambda: None)
        return ";".join(setup.find_cuda_headers())
    return ""


def build(*targets: str) -> Path:
    """Build the targets with CMake and return the build folder, which later runs reuse."""
    folder = HERE.parents[1] / "build" / "emu-tests"
    folder.mkdir(parents=True, exist_ok=True)
    # The CMake cache contains the path of ninja in an environment that may no longer exist.
    ninja = shutil.which("ninja")
    options = [f"-DLORA_EXT_CUDA_HEADERS={headers()}"]
    options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Only one pytest-xdist worker builds at a time.
        for command in (
            ["cmake", "-S", str(HERE), "-B", str(folder), *options],
            ["cmake", "--build", str(folder), "-j2", *targets],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.fail(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return folder


@pytest.fixture(scope="session")
def build_folder() -> Path:
    return build()


@pytest.fixture(scope="session")
def sanitized_kernels() -> Path:
    return build("--target", "kernels_under_asan")


@pytest.fixture(scope="session")
def build_with_mistakes() -> Callable[[dict[str, dict[str, str]]], dict[tuple[str, str], Emulator]]:
    """Return a function that builds the libraries of ``overlap``, once without and once with each
    mistake.

    A mistake replaces texts of the kernel with which its name begins, ``shrink`` or ``expand``."""

    def plant(mistakes: dict[str, dict[str, str]]) -> dict[tuple[str, str], Emulator]:
        folder = HERE.parents[1] / "build" / "emu-tests" / "planted"
        folder.mkdir(parents=True, exist_ok=True)
        for name, replaced in mistakes.items():
            stem = "shrink_decode" if name.startswith("shrink") else "expand"
            text = (HERE.parents[1] / f"csrc/cuda/lora_{stem}.cu").read_text()
            for old, new in replaced.items():
                assert text.count(old) == 1, f"lora_{stem}.cu: expected once: {old}"
                text = text.replace(old, new)
            path = folder / f"{name}.cu"
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
        built = build("--target", "overlapping_kernels")
        return {
            (name, flavour): load(built, f"{name}_{flavour}" if name else flavour, "overlap")
            for name in ("", *mistakes)
            for flavour in ("fast", "check")
        }

    return plant


@dataclass
class Emulator:
    """One flavour of the library. ``reports`` contains the errors that the emulator found in the
    last call."""

    library: ctypes.CDLL
    reports: list[str]

    def call(self, function: str, *args: object, seed: int = 0, cp_async: int = 0) -> int:
        self.library.emu_configure(ctypes.c_uint64(seed), cp_async, 20)
        converted = [
            ctypes.c_void_p(a.ctypes.data)
            if isinstance(a, np.ndarray)
            else ctypes.c_int64(a)
            if isinstance(a, int)
            else a
            for a in args
        ]
        status = getattr(self.library, function)(*converted)
        text = ctypes.create_string_buffer(1 << 16)
        self.library.emu_take_reports(text, ctypes.c_int64(len(text)))
        self.reports[:] = text.value.decode().splitlines()
        return status

    def run(self, function: str, *args: object, seed: int = 0, cp_async: int = 0) -> None:
        """Call a function and check that the emulator reports no error."""
        status = self.call(function, *args, seed=seed, cp_async=cp_async)
        assert (status, self.reports) == (0, [])


def load(folder: Path, flavour: str, library: str = "emu") -> Emulator:
    return Emulator(ctypes.CDLL(str(folder / f"lib{library}_{flavour}.so")), [])


@pytest.fixture(scope="session")
def fast(build_folder: Path) -> Emulator:
    return load(build_folder, "fast")


@pytest.fixture(scope="session")
def check(build_folder: Path) -> Emulator:
    return load(build_folder, "check")


@pytest.fixture(scope="session", params=["fast", "check"])
def emulator(request: pytest.FixtureRequest, build_folder: Path) -> Emulator:
    return load(build_folder, request.param)
