"""Kernel instances that the emulator launches, as `kernels.lock` spells them.

The emulator has no interface for this yet. `recorded` replaces the first bytes of its function
``lx::emu::run``, and of ``run_resident``, by a jump to a callback. The callback reads the kernel's
address, which is the first word of the arguments, and continues in ``run_as``. It needs x86-64, the
module's symbols, and ``nm``.
"""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
_RUN = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_size_t)
_RUN_AS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_bool, *[ctypes.c_void_p] * 3, ctypes.c_size_t)
_PAGE, _READ_EXECUTE, _ALL = 4096, 5, 7


@cache
def _symbols(path: str) -> dict[int, str]:
    """Return the name of the function at each offset of a shared library."""
    listed = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
    lines = (line.split(" ", 2) for line in listed.splitlines())
    return {int(at, 16): name for at, kind, name in lines if at and kind in "tTwW"}


def lock_name(symbol: str) -> str:
    """Return the name of a kernel in ``kernels.lock``, without namespaces and parameters."""
    name = re.sub(r"^void ", "", symbol).replace("(anonymous namespace)::", "")
    name = name.replace("lora_ext::", "")
    cut = re.match(r"\w+(?:<(?:[^<>()]|\(\w+\))*>)?", name)
    assert cut, symbol
    return cut[0]


def locked() -> set[str]:
    """Return the kernel instances of ``kernels.lock``."""
    lines = (ROOT / "kernels.lock").read_text().splitlines()
    found = (re.search(r"\w+_kernel(?:<.*?>)?(?=\s)", line) for line in lines if line[:3] == "sm_")
    return {match[0] for match in found if match}


@contextmanager
def recorded(path: str) -> Iterator[list[str]]:
    """Enter a context that appends each launch of the emulator at ``path`` to the yielded list."""
    offsets = _symbols(path)
    at = {name.partition("(lx::emu::Launch")[0]: offset for offset, name in offsets.items()}
    maps = Path("/proc/self/maps").read_text().splitlines()
    base = min(int(line.split("-")[0], 16) for line in maps if line.endswith(path))
    as_name = next(n for n in offsets.values() if "run_as(" in n and "cold" not in n)
    run_as = _RUN_AS(base + next(o for o, n in offsets.items() if n == as_name))
    launches: list[str] = []

    def hook(resident: bool) -> ctypes._FuncPointer:
        def run(launch: int, body: int, arguments: int, size: int) -> int:
            kernel = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[0]
            launches.append(lock_name(offsets[kernel - base]))
            return run_as(resident, launch, body, arguments, size)

        return _RUN(run)

    mprotect = ctypes.CDLL(None).mprotect
    hooks = {}
    for name, resident in (("lx::emu::run", False), ("lx::emu::run_resident", True)):
        address = base + at[name]
        page = ctypes.c_void_p(address & -_PAGE)
        assert mprotect(page, 2 * _PAGE, _ALL) == 0
        hooks[address] = hook(resident), ctypes.string_at(address, 12)
        target = ctypes.cast(hooks[address][0], ctypes.c_void_p).value
        jump = b"\x48\xb8" + target.to_bytes(8, "little") + b"\xff\xe0"  # mov rax, target; jmp rax
        ctypes.memmove(address, jump, 12)
    try:
        yield launches
    finally:
        for address, (_, before) in hooks.items():
            ctypes.memmove(address, before, 12)


def lacking() -> str | None:
    """Return why launches cannot be recorded on this machine, or None."""
    if platform.machine() != "x86_64":
        return f"recorded() needs x86_64, found {platform.machine()}"
    return None if shutil.which("nm") else "nm is not on PATH"
