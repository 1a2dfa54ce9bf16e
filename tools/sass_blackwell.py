"""Record and check the machine code for Blackwell, which wheels contain and CI does not compile.

    python tools/sass_gate.py --blackwell [--update] [wheel ...]

`kernels_blackwell.lock` has a section for each file of `csrc/cuda`: a digest of its text and its
headers, and for each kernel and architecture the registers, bytes of shared memory and stack,
instructions that spill, and instructions. The check compiles these files for `ARCHS` with CMake, in
`build/blackwell`, or reads the wheels that are named. It fails if a kernel has a stack or spills,
if a kernel of `kernels.lock` is missing, if numbers differ, or if the sources have changed since
the lock was written. `--update` compiles only files that have changed.

Compiling for Blackwell doubles the time of a build. CI therefore checks only that both locks list
the same kernels. It also reports, without failing, which sources have changed; the numbers of their
kernels are not known until a release checks its wheel.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import sass_gate
from sass_gate import ROOT, Kernel

LOCK = ROOT / "kernels_blackwell.lock"
ARCHS = ("sm_100f", "sm_120")
COMMAND = "python tools/sass_gate.py --blackwell"
# Bytes of stack of the kernels that may spill. Each spills a value that its loop does not change,
# and reads the 4 bytes (float16 expand: 12) back from L1 once per iteration. One block fewer per
# multiprocessor removes the spill, but also a quarter (expand, 146 registers) or half (packed
# products) of the loads in flight. The packed product of float32 with minima has one block already.
# Remove a kernel from this table when it no longer spills.
DECODE = ("__half", "__nv_bfloat16")
ALLOWED = {
    **{("sm_100f", f"lora_expand_kernel<{t}, true, 1, 4, 1, false>"): 8 for t in DECODE},
    ("sm_100f", "lora_expand_kernel<__nv_bfloat16, true, 4, 2, 1, false>"): 8,
    ("sm_100f", "lora_expand_kernel<__nv_bfloat16, true, 8, 1, 1, false>"): 8,
    **{("sm_120", f"packed_linear_kernel<{t}, 8, false, 1>"): 8 for t in DECODE},
    ("sm_120", "packed_linear_kernel<float, 4, true, 2>"): 8,
}
HEADER = f"{'arch':8}" + "".join(f"{h:>7}" for h in ("regs", "shared", "stack", "spills", "instr"))
# Matches a string or character literal, which is kept, or a comment.
COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\')|//[^\n]*|/\*.*?\*/', re.S)
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.M)
EMULATOR = "lx/emulated.h"  # included only under LX_EMULATE

Key = tuple[str, str]  # architecture and name of a kernel


@dataclass
class Section:
    """Digest and kernels of one source file."""

    digest: str
    rows: dict[Key, str] = field(default_factory=dict)


@dataclass
class Lock:
    """Contents of the lock file: the compiler's line and a section per source file."""

    compiler: str = ""
    sections: dict[str, Section] = field(default_factory=dict)

    @property
    def rows(self) -> dict[Key, str]:
        return {key: row for one in self.sections.values() for key, row in one.rows.items()}

    @classmethod
    def read(cls, path: Path) -> Lock:
        lock = cls()
        for line in path.read_text().splitlines() if path.exists() else []:
            words = line.split()
            if line.startswith("# csrc/"):
                lock.sections[words[1]] = Section(words[2])
            elif line.startswith("# nvcc"):
                lock.compiler = line
            elif words and words[0] in ARCHS:
                name = line[len(HEADER) :].strip()
                list(lock.sections.values())[-1].rows[words[0], name] = line
        return lock

    def write(self, path: Path) -> None:
        lines = [self.compiler, f"{HEADER}  kernel"]
        for source, section in sorted(self.sections.items()):
            lines += [f"# {source} {section.digest}"]
            lines += [row for _, row in sorted(section.rows.items(), key=lambda one: one[0][::-1])]
        path.write_text("\n".join(lines) + "\n")


# --- sources --------------------------------------------------------------------------------------
def sources(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.glob("csrc/cuda/*.cu"))


def headers(path: Path, root: Path, found: dict[Path, None]) -> dict[Path, None]:
    """Add a file and the headers of this repository that it includes to ``found``; return it."""
    if path not in found:
        found[path] = None
        for name in INCLUDE.findall(path.read_text()):
            folders = [path.parent, *(root / f for f in ("csrc", "csrc/include", "csrc/device"))]
            header = next((f / name for f in folders if (f / name).exists()), None)
            if header and name != EMULATOR:
                headers(header, root, found)
    return found


def digest(source: str, root: Path) -> str:
    """Return a hash of a file and its headers, which comments and white space do not change."""
    text = hashlib.sha256()
    for path in headers(root / source, root, {}):
        code = COMMENT.sub(lambda match: match[1] or " ", path.read_text())
        text.update(" ".join(code.split()).encode())
    return text.hexdigest()[:16]


def changed(lock: Lock, root: Path) -> list[str]:
    """Return the files that are new, were removed, or differ from those of the lock."""
    now = {source: digest(source, root) for source in sources(root)}
    then = {source: section.digest for source, section in lock.sections.items()}
    return sorted(s for s in {*now, *then} if now.get(s) != then.get(s))


# --- machine code ---------------------------------------------------------------------------------
def compiled(wanted: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Compile source files for Blackwell, and yield each with its object."""
    folder, beside = ROOT / "build/blackwell", str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"}
    env = {"CCACHE_BASEDIR": str(ROOT), "CCACHE_NOHASHDIR": "1", **env}
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc")) or "/usr/local/cuda/bin/nvcc"
    real = ";".join(arch.replace("sm_", "") + "-real" for arch in ARCHS)
    options = ["-DLORA_EXT_CUDA=ON", f"-DLORA_EXT_ARCHITECTURES={real}"]
    options += [f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    objects = {one: f"CMakeFiles/lx_kernels.dir/{one}.o" for one in wanted}
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options],
        ["cmake", "--build", folder, "-j", str(os.cpu_count()), "--target", *objects.values()],
    ):
        if subprocess.run(command, env=env, stdout=sys.stderr).returncode:
            raise SystemExit(f"sass_gate: `{' '.join(map(str, command[:3]))} ...` failed.")
    for source, name in objects.items():
        yield source, folder / name


def kernels_of(path: Path) -> list[Kernel]:
    """Return the kernels for Blackwell in an object or in the module of a wheel."""
    if path.suffix != ".whl":
        return [kernel for kernel in sass_gate.read([path]) if kernel.arch in ARCHS]
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as wheel:
        name = next(one for one in wheel.namelist() if re.fullmatch(r"lora_ext/_C\..*so", one))
        return sass_gate.read([Path(wheel.extract(name, folder))], ARCHS)


def spills(kernel: Kernel) -> int:
    return kernel.count(r"(LDL|STL)\b")


def row(kernel: Kernel) -> str:
    numbers = [kernel.registers, kernel.shared, kernel.stack + kernel.local]
    numbers += [spills(kernel), len(kernel.code)]
    return f"{kernel.arch:8}" + "".join(f"{n:7}" for n in numbers) + f"  {kernel.name}"


def judge(kernel: Kernel) -> list[str]:
    """Return the faults of one kernel. The rules of ``kernels.toml`` are for other processors."""
    wrong = []
    allowed = ALLOWED.get((kernel.arch, kernel.name), 0)
    if kernel.stack + kernel.local > allowed:
        wrong.append(f"uses {kernel.stack} bytes of stack and {kernel.local} of local memory")
    if allowed and not kernel.stack + kernel.local:
        wrong.append("no longer spills: remove it from ALLOWED in tools/sass_blackwell.py")
    if (count := spills(kernel)) and not allowed:
        wrong.append(f"{count} LDL/STL: registers spill, or an array is indexed at run time")
    if kernel.guarded_exp:
        wrong.append(f"{kernel.guarded_exp} exponentials test for denormals (max. 0)")
    return [f"{kernel.arch} {kernel.name}: {reason}" for reason in wrong]


# --- checks ---------------------------------------------------------------------------------------
def uncovered(names: Iterable[str], found: Iterable[Key], where: str) -> list[str]:
    """Return differences between the kernels of ``kernels.lock`` and those found for Blackwell."""
    wanted, have = {(arch, name) for arch in ARCHS for name in names}, set(found)
    return [
        *(f"{where} has no {name} for {arch}" for arch, name in sorted(wanted - have)),
        *(f"kernels.lock has no {name}, {where} has" for _, name in sorted(have - wanted)),
    ]


def locked_names(path: Path) -> set[str]:
    """Return the kernels that ``kernels.lock`` lists."""
    row = re.compile(r"^sm_\w+ +(?:\d+ +)+(\S.*?)  inflight ", re.M)
    return set(row.findall(path.read_text()))


def covered(names: Iterable[str], path: Path, root: Path) -> tuple[list[str], int]:
    """Check the lock without compiling: return its faults and the number of changed sources."""
    lock = Lock.read(path)
    old = changed(lock, root)
    if old:
        print(f"{path.name} was written before these files changed, whose machine code for")
        print(f"Blackwell is not known (`{COMMAND} --update` compiles them): {', '.join(old)}")
    wrong = uncovered(names, lock.rows, path.name)
    return [*wrong, *([f"`{COMMAND} --update` compiles for Blackwell"] if wrong else [])], len(old)


def compare(lock: Lock, found: Mapping[Key, str], compiler: str) -> list[str]:
    """Return the differences between the lock and the rows of machine code."""
    if lock.compiler != compiler:
        print(f"{LOCK.name} was written with another nvcc; numbers are not compared.")
        return []
    wrong = [row for key, row in found.items() if lock.rows.get(key) != row]
    return [f"{LOCK.name} differs; found {row}" for row in wrong]


def main(paths: list[Path], update: bool) -> int:
    lock, compiler = Lock.read(LOCK), sass_gate.compiler(COMMAND)
    old = changed(lock, ROOT)
    now = sources(ROOT)
    if update and lock.compiler == compiler:
        wanted = [source for source in old if source in now]
    else:
        wanted = now
    inputs = [(path.name, path) for path in paths] or (list(compiled(wanted)) if wanted else [])
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Most of the time is spent in cuobjdump.
        read = dict(zip(inputs, pool.map(lambda one: kernels_of(one[1]), inputs), strict=True))
    kernels = [kernel for found in read.values() for kernel in found]
    wrong = [fault for kernel in kernels for fault in judge(kernel)]
    rows = {(kernel.arch, kernel.name): row(kernel) for kernel in kernels}
    if update:
        kept = {s: one for s, one in lock.sections.items() if s in now and s not in wanted}
        for (source, _), found in read.items():
            section = Section(digest(source, ROOT), {(k.arch, k.name): row(k) for k in found})
            kept[source] = section
        Lock(compiler, kept).write(LOCK)
        wrong += uncovered(locked_names(sass_gate.LOCK), Lock.read(LOCK).rows, LOCK.name)
    else:
        wrong += [f"{source} has changed since {LOCK.name} was written" for source in old]
        wrong += uncovered(
            locked_names(sass_gate.LOCK), rows, paths[0].name if paths else "the build"
        )
        wrong += compare(lock, rows, compiler)
    print("\n".join([f"{HEADER}  kernel", *sorted(rows.values())]))
    print("".join(f"FAIL {fault}\n" for fault in wrong), end="")
    print(f"{len(kernels)} kernels for Blackwell, {len(wrong)} failures")
    return 1 if wrong else 0
