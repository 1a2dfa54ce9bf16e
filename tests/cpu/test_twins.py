"""C++ tests of the CPU twins; --sanitizers adds the address and undefined-behaviour sanitizers.

The tests link the twins of the in-place build. With sanitizers, or without such a build, twins are
compiled at -O1, for scalars and 64-byte vectors only: all at -O3 would take a quarter of an hour.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lora_ext

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ISAS = {  # as in csrc/cpu/CMakeLists.txt
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
BUILT = ROOT / f"build/cmake-{sys.implementation.cache_tag}/csrc/cpu/liblx_twins.a"
SANITIZE = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=all".split()
FLAGS = ["-std=c++20", "-O1", "-I", str(ROOT / "csrc/include"), "-fno-math-errno", "-Wno-psabi"]


@pytest.mark.parametrize("family", ["lora", "circuit", "circuit_decode", "circuit_sum"])
def test_twins_pass_cpp_tests(tmp_path: Path, family: str, request: pytest.FixtureRequest) -> None:
    sanitize = SANITIZE if request.config.getoption("--sanitizers") else []
    flags = [*FLAGS, *sanitize]
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    isa, has_wide = ROOT / f"csrc/cpu/{family}_isa.cpp", platform.machine() == "x86_64"
    library = [str(BUILT)] if BUILT.exists() and not sanitize else []
    wide = "avx512" if library and lora_ext._C.cpu_isa().startswith("avx512") else "avx2_wide"
    tests = [f"tests/cpu/{family}_twin_test.cpp"]
    if family == "lora":
        tests += ["tests/cpu/lora_plan_test.cpp"] + ["csrc/cpu/lora_plan.cpp"] * (not library)
    flags += ["-DLX_ALL_TWINS"] * bool(library)
    units = [(ROOT / test, [f"-DLX_WIDE_TABLE={wide}"] if has_wide else []) for test in tests]
    if not library:
        units.append((isa, ["-DLX_ISA=scalar"]))
    if has_wide and wide == "avx2_wide":
        units.append((isa, [*ISAS["avx2"], "-DLX_ISA=avx2_wide", "-DLX_VEC_BYTES=64"]))

    def run(*command: str) -> str:
        done = subprocess.run([compiler, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return command[-1]

    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(run, *flags, *extra, "-c", str(source), "-o", str(tmp_path / f"{i}.o"))
            for i, (source, extra) in enumerate(units)
        ]
        objects = [job.result() for job in jobs]
    program = run(*sanitize, *objects, *library, "-o", str(tmp_path / "twins"))
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("isa", ISAS)
def test_errors_of_exp_and_log_stay_within_their_bounds(tmp_path: Path, isa: str) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    known = [*ISAS, "avx512bf16"]
    if known.index(isa) > known.index(lora_ext._C.cpu_isa()):
        pytest.skip(f"this processor does not support {isa}")
    program = tmp_path / "vec_math"
    flags = "-std=c++20 -O2 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}", f"-DLX_ISA={isa}"]
    source = str(ROOT / "tests/cpu/vec_math_test.cpp")
    command = [compiler, *flags.split(), *includes, *ISAS[isa], source, "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
