"""The emulator on a machine without a CUDA toolkit, with only the headers of NVIDIA's wheels.

setup.py finds these headers. Only the emulator and the small kernels of tests/emu are compiled with
them: all kernels include the headers through one device header, and compiling every kernel again
would take minutes of CI time.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scripts import ROOT, load_script

EMULATOR = ROOT / "tests" / "emu"
WHEELS = "nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
OPTIONS = """
import json, setup, torch
toolkit = setup.find_toolkit(torch, setup.find_cxx())
assert toolkit is None, toolkit
print(json.dumps(setup.cmake_options(torch, setup.find_cxx(), toolkit, emulator=True)))
"""


def path_without_nvcc(folder: Path) -> str:
    """Return PATH, in which each folder that contains nvcc is replaced by a folder of links to its
    other files."""
    folders = []
    for number, place in enumerate(filter(None, os.environ["PATH"].split(os.pathsep))):
        if Path(place, "nvcc").exists():
            shadow = folder / str(number)
            shadow.mkdir(parents=True)
            for program in Path(place).iterdir():
                if program.name != "nvcc":
                    (shadow / program.name).symlink_to(program)
            place = str(shadow)
        folders.append(place)
    return os.pathsep.join(folders)


def run(*command: str, env: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.emulated
def test_emulator_builds_and_runs_without_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = importlib.util.find_spec("nvidia")
    bases = [Path(base) for base in (wheels.submodule_search_locations or [])] if wheels else []
    for header in ("cuda_bf16.h", "crt/host_defines.h", "nv/target"):
        if not any(f for base in bases for f in base.glob(f"**/{header}")):
            pytest.skip(f"no wheel here has {header}: pip install {WHEELS}")

    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    env |= {"LORA_EXT_CUDA": "0", "PATH": path_without_nvcc(tmp_path / "bin")}
    assert shutil.which("nvcc", path=env["PATH"]) is None
    options = json.loads(run(sys.executable, "-c", OPTIONS, env=env, cwd=ROOT))

    # Build, and read the list of included headers.
    cmake, build = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{env['PATH']}"), "b"
    assert cmake
    kept = ("CMAKE_MAKE_PROGRAM", "CMAKE_CXX_COMPILER", "LORA_EXT_CUDA_HEADERS")
    flags = [f"-D{key}={options[key]}" for key in kept]
    run(cmake, "-S", str(EMULATOR), "-B", build, "-G", "Ninja", *flags, env=env, cwd=tmp_path)
    run(cmake, "--build", build, "-j2", "--target", "emu_fast", env=env, cwd=tmp_path)
    read = run(options["CMAKE_MAKE_PROGRAM"], "-t", "deps", env=env, cwd=tmp_path / build).split()
    headers = [name for name in read if name.endswith(("/cuda_bf16.h", "/nv/target"))]
    cuda = {(tmp_path / build / name).resolve() for name in headers}  # ccache prints relative paths
    assert len(cuda) == 2
    assert all(any(name.is_relative_to(base.resolve()) for base in bases) for name in cuda), cuda

    # A matrix product of small integers uses tensor cores, asynchronous copies and barriers, and is
    # exact.
    emulator = load_script(monkeypatch, "tests/emu", "conftest").load(tmp_path / build, "fast")
    m, n, k = 33, 31, 40
    numbers = np.random.default_rng(0)
    x, w = (numbers.integers(-4, 5, (rows, k)).astype(np.float16) for rows in (m, n))
    y = np.full((m, n), np.nan, np.float32)
    emulator.run("matmul_f16", x, w, y, m, n, k)
    np.testing.assert_array_equal(y, x.astype(np.float32) @ w.T.astype(np.float32))
