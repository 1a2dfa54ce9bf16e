"""Compare registers and stack of the kernels for Blackwell with `blackwell.lock`, without a GPU.

    python tools/blackwell_gate.py [--update]

The build in place and CI compile for sm_80 and sm_90a, whose machine code `sass_gate.py` checks.
Wheels also contain sm_100f and sm_120. Compiling these doubles the time of a build, so this gate
compiles only if the code in `csrc/cuda`, `csrc/device` or `csrc/include` differs from that of the
lock, apart from comments and spaces. A stack above zero means that registers spill.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sass_gate

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "blackwell.lock"
ARCHS = ("100f", "120")
FOLDERS = ("csrc/cuda", "csrc/device", "csrc/include")
FLAGS = ["-O3", "-DNDEBUG", "-std=c++20", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]
FLAGS += [f"-I{folder}" for folder in ("csrc", "csrc/include", "csrc/device")]


def digest(root: Path = ROOT) -> str:
    """Return a hash of the kernels' sources that ignores comments and the amount of space."""
    found = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file():
                code = re.sub(r"//.*", "", path.read_text())
                found.update(f"{path.relative_to(root)}\n{' '.join(code.split())}\n".encode())
    return found.hexdigest()[:16]


def rows(source: Path) -> list[str]:
    """Compile one file for each architecture, and return a line for each kernel."""
    cuobjdump, env = sass_gate.reader()
    launcher = [tool] if (tool := shutil.which("ccache")) else []
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in ARCHS:
            out = f"{folder}/{source.stem}.o"
            target = f"--generate-code=arch=compute_{arch},code=[sm_{arch}]"
            nvcc = [*launcher, os.environ.get("NVCC", "nvcc"), *FLAGS, target]
            command = [*nvcc, "-c", str(source.relative_to(ROOT)), "-o", out]
            if subprocess.run(command, cwd=ROOT).returncode:
                raise SystemExit(f"blackwell_gate: nvcc cannot compile {source.name} for {arch}")
            usage = subprocess.run([cuobjdump, "-res-usage", out], capture_output=True, env=env)
            lines += [
                f"sm_{arch:5}{kernel.registers:6}{kernel.stack + kernel.local:7}  {kernel.mangled}"
                for kernel in sass_gate.parse(usage.stdout.decode(), "")
            ]
    return lines


def table() -> list[str]:
    """Return the lock's lines after the first, sorted by kernel."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        lines = [line for each in pool.map(rows, sources) for line in each]
    text = subprocess.run(
        ["c++filt"], input="\n".join(lines), capture_output=True, text=True, check=True
    ).stdout
    named = []
    for line in text.splitlines():
        numbers, name = line[:21], sass_gate.short_name(line[21:])
        named.append((name, f"{numbers}{name}"))
    return [f"{'arch':8}{'regs':>6}{'stack':>7}  kernel", *(line for _, line in sorted(named))]


def main(arguments: list[str] | None = None) -> int:
    """Compare, or with `--update` rewrite, the lock; return 1 if it differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="compile, and rewrite the lock")
    update = parser.parse_args(arguments).update
    head = f"{sass_gate.compiler().partition(',')[0]}, sources {digest()}"
    recorded = LOCK.read_text().splitlines() if LOCK.exists() else [""]
    known, _, sources = recorded[0].partition(", sources ")
    if not update and sources == digest():
        print("the sources are those of blackwell.lock; nothing was compiled")
        return 0
    found = table()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{len(found) - 1} kernels, {used.ru_utime + used.ru_stime:.0f} s of processor time")
    if update:
        LOCK.write_text("\n".join([head, *found]) + "\n")
        return 0
    if known and known != head.partition(", sources ")[0]:
        print("blackwell.lock is from another nvcc; numbers are not compared.")
        return 0
    print("blackwell.lock differs; `python tools/blackwell_gate.py --update` records:")
    print(f"  - {recorded[0]}\n  + {head}")
    print("\n".join(f"  - {old}" for old in recorded[1:] if old not in found))
    print("\n".join(f"  + {new}" for new in found if new not in recorded))
    return int(recorded[1:] != found)


if __name__ == "__main__":
    sys.exit(main())
