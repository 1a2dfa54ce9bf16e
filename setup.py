"""Packaging: find torch and nvcc, compile with CMake and ninja, and copy the modules in place.

Environment: LORA_EXT_CUDA=0|1 (default: 1 if torch is a CUDA build, which needs nvcc; 0 for a CPU
build of torch, which cannot run the kernels), TORCH_CUDA_ARCH_LIST, MAX_JOBS, CUDA_HOME, CXX,
CUDAHOSTCXX, LORA_EXT_EMU=1|fast (both test-only emulator modules, or only the fast one; in-place
builds only), LORA_EXT_SANITIZE=1 (AddressSanitizer and UndefinedBehaviorSanitizer; preload their
libraries to load the module: `make asan`), LORA_EXT_WERROR=1 (a warning of a compiler is an error).
The build downloads nothing and uses neither git nor a GPU.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_MIN, CUDA_MIN, CMAKE_MIN = (2, 11), (12, 8), (3, 24)
NVCC_WHEELS = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime")
NVCC_WHEELS += ("nvidia-cuda-cccl",)
EMULATED = ("cuda_bf16.h", "crt/host_defines.h", "nv/target")  # headers that the emulator needs
EMULATORS = {"": [], "fast": ["_emu"], "1": ["_emu", "_emu_check"]}  # modules by LORA_EXT_EMU
DEFAULT_ARCHS = "8.0;9.0a;9.0-virtual"  # the last is PTX, which the driver compiles for other GPUs
BLACKWELL_ARCHS, BLACKWELL_CUDA = "10.0f;12.0", (12, 9)


def fail(sentence: str) -> NoReturn:
    raise SystemExit(f"lora_ext: {sentence}")


def version_of(text: str) -> tuple[int, int]:
    match = re.search(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# --- tools of this machine ----------------------------------------------------------------------
def find_torch():
    try:
        import torch
    except ImportError:
        fail(
            f"torch is not installed for {sys.executable}; run `pip install torch`, then "
            "`pip install --no-build-isolation .` so that the build sees it."
        )
    if version_of(torch.__version__) < TORCH_MIN:
        fail(
            f"torch {torch.__version__} is too old; run "
            f"`pip install 'torch>={TORCH_MIN[0]}.{TORCH_MIN[1]}'`."
        )
    return torch


def find_tool(name: str) -> str:
    """Return the program that pip installed next to this Python, or else the one on PATH."""
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.exists() else shutil.which(name)
    if not path:
        fail(f"{name} is not on PATH; run `pip install cmake ninja`.")
    return path


def find_cmake() -> str:
    cmake = find_tool("cmake")
    found = version_of(output_of(cmake, "--version"))
    if found < CMAKE_MIN:
        fail(
            f"{cmake} is version {found[0]}.{found[1]}, 3.24 is needed; run "
            "`pip install --upgrade cmake`."
        )
    return cmake


def find_cxx() -> str:
    cxx = os.environ.get("CXX", "g++")
    if not shutil.which(cxx):
        fail(f"no C++ compiler `{cxx}`; install g++ 11 or newer (`apt install g++`), or set CXX.")
    return cxx


def find_python_include() -> str:
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        fail(
            f"Python.h is not in {include}; install the headers of this Python "
            f"(`apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev`)."
        )
    return include


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    home: Path
    version: tuple[int, int]


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for home in filter(None, homes):
        nvcc = Path(home, "bin", "nvcc")
        if not nvcc.exists():
            fail(f"CUDA_HOME is {home}, but there is no {nvcc}; correct CUDA_HOME or unset it.")
        return str(nvcc)
    default = Path("/usr/local/cuda/bin/nvcc")
    beside = sorted(folder.parent / "bin/nvcc" for folder in nvidia_wheels("cu*/include"))
    others = [str(nvcc) for nvcc in (default, *beside) if nvcc.exists()]
    return shutil.which("nvcc") or (others[0] if others else None)


def nvidia_wheels(pattern: str) -> list[Path]:
    """Return matching folders of NVIDIA's PyPI wheels among this Python's packages."""
    spec = importlib.util.find_spec("nvidia")
    bases = (spec.submodule_search_locations or []) if spec else []
    return [path for base in bases for path in Path(base).glob(pattern)]


def nvcc_remedy(torch_cuda: str) -> str:
    """Return how to install nvcc for a CUDA version; NVIDIA's wheels are complete from 13 on."""
    major, minor = version_of(torch_cuda)
    if major < 13:
        return f"install CUDA's toolkit of version {major} and set CUDA_HOME"
    return f"run `pip install {' '.join(f'{name}=={major}.{minor}.*' for name in NVCC_WHEELS)}`"


def home_of(nvcc: str) -> Path:
    """Return a toolkit's folder. nvcc may be a link or a script; a dry run prints the folder."""
    dry = subprocess.run([nvcc, "-dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"#\$ TOP=(\S+)", dry)
    return (Path(top[1]) if top else Path(nvcc).resolve().parents[1]).resolve()


def find_toolkit(torch, cxx: str) -> Toolkit | None:
    """Return the CUDA toolkit to build with, or None for a CPU build."""
    wish = os.environ.get("LORA_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        fail(f"LORA_EXT_CUDA is {wish!r}; set it to 0 or 1, or unset it.")
    if wish == "0" or (wish == "" and not torch.version.cuda):
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        if wish == "1":
            fail(
                "LORA_EXT_CUDA=1, but there is no nvcc; install the CUDA toolkit and set "
                "CUDA_HOME, or set LORA_EXT_CUDA=0 for a CPU build."
            )
        fail(
            f"torch is built for CUDA {torch.version.cuda}, but there is no nvcc; "
            f"{nvcc_remedy(torch.version.cuda)}, or set LORA_EXT_CUDA=0 for a build that runs "
            "only on the CPU."
        )
    release = output_of(nvcc, "--version").partition("release")[2]
    toolkit = Toolkit(nvcc, home_of(nvcc), version_of(release))
    check_toolkit(toolkit, torch.version.cuda, cxx)
    return toolkit


def check_toolkit(toolkit: Toolkit, torch_cuda: str | None, cxx: str) -> None:
    name = f"nvcc {toolkit.version[0]}.{toolkit.version[1]}"
    if toolkit.version < CUDA_MIN:
        fail(
            f"{name} is too old; install CUDA {CUDA_MIN[0]}.{CUDA_MIN[1]} or newer and set "
            "CUDA_HOME, or set LORA_EXT_CUDA=0."
        )
    if torch_cuda and version_of(torch_cuda)[0] != toolkit.version[0]:
        fail(
            f"torch is built for CUDA {torch_cuda}, but {name} was found; set CUDA_HOME to a CUDA "
            f"{version_of(torch_cuda)[0]} toolkit, install a torch for CUDA {toolkit.version[0]}, "
            "or set LORA_EXT_CUDA=0."
        )
    for header in ("cuda_runtime.h", "crt/host_config.h"):
        if not (toolkit.home / "include" / header).exists():
            fail(
                f"{header} is not in {toolkit.home}/include; install the whole CUDA toolkit, "
                "or set LORA_EXT_CUDA=0."
            )
    limit = re.search(r"__GNUC__ > (\d+)", (toolkit.home / "include/crt/host_config.h").read_text())
    host = os.environ.get("CUDAHOSTCXX", cxx)
    if limit and "clang" not in host and shutil.which(host):
        major = int(output_of(host, "-dumpversion").split(".")[0])
        if major > int(limit[1]):
            fail(
                f"{name} accepts gcc up to {limit[1]}, {host} is {major}; install g++-{limit[1]} "
                f"and set CUDAHOSTCXX=g++-{limit[1]}."
            )


def find_cuda_headers() -> list[str]:
    """Return folders with cuda_bf16.h and nv/target: the toolkit's, else NVIDIA's wheels'.

    They are the same in builds with and without kernels, which then share the emulator's objects.
    """
    nvcc = find_nvcc()
    missing = ""
    for folders in ([home_of(nvcc) / "include"] if nvcc else [], nvidia_wheels("*/include")):
        folders = [*folders, *(f / "cccl" for f in folders)]
        missing = next((h for h in EMULATED if not any((f / h).exists() for f in folders)), "")
        if not missing:
            return [str(f) for f in folders if f.exists()]
    fail(
        f"the emulator needs {missing}; run `pip install nvidia-cuda-runtime "
        "nvidia-cuda-crt nvidia-cuda-cccl`, or install the CUDA toolkit."
    )


def architectures(arch_list: str) -> list[str]:
    """Translate torch's ``8.0;9.0a+PTX`` to CMake's ``80-real;90a-real;90a-virtual``.

    ``9.0-virtual``, which torch does not accept, is ``90-virtual``: PTX without machine code.
    """
    names: list[str] = []
    for item in re.split(r"[;,\s]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX|-virtual)?", item)
        if not match:
            fail(f"TORCH_CUDA_ARCH_LIST has {item!r}; write architectures as in '8.0;9.0a+PTX'.")
        kinds = {None: ["real"], "+PTX": ["real", "virtual"], "-virtual": ["virtual"]}[match[3]]
        names += [f"{match[1]}{match[2]}-{kind}" for kind in kinds]
    return names


def default_architectures(cuda: tuple[int, int]) -> list[str]:
    """Return the architectures of wheels and `pip install`, for the version of nvcc."""
    names = architectures(DEFAULT_ARCHS)
    return (
        [*names[:-1], *architectures(BLACKWELL_ARCHS), names[-1]]
        if cuda >= BLACKWELL_CUDA
        else names
    )


def jobs() -> int:
    """Return MAX_JOBS, or the number of jobs that cores and memory allow.

    A file with torch headers takes up to 3 GiB.
    """
    wish = os.environ.get("MAX_JOBS")
    if wish:
        if not wish.isdigit() or int(wish) < 1:
            fail(f"MAX_JOBS is {wish!r}; set it to a positive number, or unset it.")
        return int(wish)
    free = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, int(free[1]) // (3 << 20) if free else 1))


def sanitized() -> bool:
    return os.environ.get("LORA_EXT_SANITIZE") == "1"


def cmake_options(torch, cxx: str, toolkit: Toolkit | None, emulator: str) -> dict[str, str]:
    """Return the options of CMakeLists.txt for this machine."""
    from torch.utils.cpp_extension import include_paths

    options = {
        "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        "CMAKE_CXX_COMPILER": cxx,
        "LORA_EXT_CUDA": "ON" if toolkit else "OFF",
        "LORA_EXT_EMU": "ON" if emulator else "OFF",
        "LORA_EXT_EMU_CHECK": "ON" if emulator == "1" else "OFF",
        "LORA_EXT_SANITIZE": "ON" if sanitized() else "OFF",
        "CMAKE_COMPILE_WARNING_AS_ERROR": os.environ.get("LORA_EXT_WERROR", "0"),
        "LORA_EXT_TORCH_INCLUDE": ";".join(include_paths()),
        "LORA_EXT_TORCH_LIB": str(Path(torch.__file__).parent / "lib"),
        "LORA_EXT_PYTHON_INCLUDE": find_python_include(),
        "LORA_EXT_MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        "LORA_EXT_CUDA_HEADERS": ";".join(find_cuda_headers()) if emulator else "",
    }
    if toolkit:
        wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        default = default_architectures(toolkit.version)
        archs = architectures(wish) if wish.strip() else default
        options["CMAKE_CUDA_COMPILER"] = toolkit.nvcc
        options["CMAKE_CUDA_HOST_COMPILER"] = os.environ.get("CUDAHOSTCXX", cxx)
        options["LORA_EXT_ARCHITECTURES"] = ";".join(archs)
    return options


# --- progress -----------------------------------------------------------------------------------
STEP = re.compile(r"\[(\d+)/(\d+)\] (.*)")


class Progress:
    """Progress of ninja: a bar on the terminal, and one line per file in captured output.

    pip captures the output of a build, so the bar is also written to the terminal directly.
    """

    def __init__(self, out: TextIO, terminal: TextIO | None, clock=time.monotonic):
        self.out, self.clock, self.begun = out, clock, clock()
        self.kept = not out.isatty()
        self.terminal = terminal if self.kept else out

    def took(self) -> str:
        seconds = round(self.clock() - self.begun)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def say(self, sentence: str) -> None:
        """Print a line to the output and the terminal."""
        if self.kept:
            print(f"lora_ext: {sentence}", file=self.out, flush=True)
        if self.terminal:
            print(f"\r\x1b[Klora_ext: {sentence}", file=self.terminal, flush=True)

    def follow(self, lines: Iterable[str]) -> None:
        for line in lines:
            step = STEP.match(line)
            if step is None:  # output of the compiler
                print(line, end="", file=self.out, flush=True)
                continue
            done, all_files = int(step[1]), int(step[2])
            file = step[3].split()[-1].rpartition("/")[2].removesuffix(".o") if step[3] else ""
            if self.kept:
                print(f"[{done}/{all_files} {self.took()}] {step[3]}", file=self.out, flush=True)
            if self.terminal:
                bar = ("#" * (24 * done // all_files)).ljust(24, ".")
                text = f"lora_ext [{bar}] {done}/{all_files} files {self.took()} {file[:30]}"
                print(f"\r\x1b[K{text}", end="", file=self.terminal, flush=True)


def terminal() -> TextIO | None:
    try:
        return open("/dev/tty", "w")
    except OSError:  # no terminal, as in a service or a container
        return None


# --- the build ----------------------------------------------------------------------------------
class CMakeBuild(build_ext):
    """CMake build of all modules, kept under build/ so that the next one is incremental."""

    def run(self) -> None:
        inplace = bool(self.inplace or self.editable_mode)
        emulator = os.environ.get("LORA_EXT_EMU", "") if inplace else ""
        emulator = emulator.strip("0")
        if emulator not in EMULATORS:
            fail(f"LORA_EXT_EMU: expected 0, 1 or fast, found {emulator!r}.")
        package = ROOT / "lora_ext" if inplace else Path(self.build_lib).resolve() / "lora_ext"
        package.mkdir(parents=True, exist_ok=True)
        modules, info = self.compile(emulator)
        for module in modules:
            target = package / module.name
            target.unlink(missing_ok=True)  # processes that have mapped the old file keep it
            shutil.copy2(module, target)
        lines = ["# Written by setup.py: the inputs of this build."]
        lines += [f"{key} = {value!r}" for key, value in info.items()]
        (package / "_build_info.py").write_text("\n".join(lines) + "\n")
        stubs = runpy.run_path(str(ROOT / "tools/stubs.py"))["stubs"]
        (package / "_C.pyi").write_text(stubs())

    def compile(self, emulator: str) -> tuple[list[Path], dict[str, object]]:
        torch = find_torch()
        cxx, cmake = find_cxx(), find_cmake()
        toolkit = find_toolkit(torch, cxx)
        options = cmake_options(torch, cxx, toolkit, emulator)
        archs = options["LORA_EXT_ARCHITECTURES"].split(";") if toolkit else []
        suffix = options["LORA_EXT_MODULE_SUFFIX"]
        name = f"cmake-{sys.implementation.cache_tag}{'-asan' if sanitized() else ''}"
        folder = ROOT / "build" / name
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        configure += [f"-D{key}={value}" for key, value in options.items()]
        build = [cmake, "--build", str(folder), "-j", str(jobs())] + (
            ["-v"] if self.verbose > 1 else []
        )
        progress = Progress(sys.stdout, terminal())
        kernels = f"kernels for {', '.join(archs)}" if toolkit else "no CUDA kernels"
        progress.say(
            f"building for torch {torch.__version__} with {kernels}, {jobs()} files at a time; "
            "without a compiler cache this takes minutes"
        )
        # With ccache, a build in another folder reuses the objects of this one.
        env = {"CCACHE_BASEDIR": str(ROOT), "CCACHE_NOHASHDIR": "1", **os.environ}
        if toolkit and (toolkit.home / "lib/libcudart_static.a").exists():
            # NVIDIA's wheels have their libraries in lib, but nvcc looks in lib64.
            paths = [str(toolkit.home / "lib"), env.get("LIBRARY_PATH", "")]
            env["LIBRARY_PATH"] = ":".join(filter(None, paths))
        for command in (configure, build):
            with subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as running:
                progress.follow(running.stdout or ())
            if running.returncode:
                progress.say(f"stopped after {progress.took()} minutes")
                fail(
                    f"`{' '.join(command[:3])} ...` failed; its output above names the file "
                    "and the line."
                )
        progress.say(f"built in {progress.took()} minutes")
        info = {
            "lora_ext": self.distribution.get_version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "cuda": ".".join(map(str, toolkit.version)) if toolkit else None,
            "architectures": archs,
            "compiler": output_of(cxx, "--version").splitlines()[0],
            "emulator": bool(emulator),
            "built": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        names = ["_C", *EMULATORS[emulator]]
        modules = [folder / "modules" / f"{name}{suffix}" for name in names]
        return modules, info

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in lists them


if __name__ == "__main__":
    setup(ext_modules=[Extension("lora_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
