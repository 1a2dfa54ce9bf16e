"""A machine without a CUDA toolkit: the emulated kernels, with headers from NVIDIA's wheels alone.

The real configuration of setup.py, but of its targets only ``_emu``, and of the twins, which have
tests of their own, only the scalar one: it takes a processor that CMake does not know.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lora_ext

ROOT = Path(__file__).resolve().parents[2]
WHEELS = "nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
OPTIONS = """
import json, setup, torch
toolkit = setup.find_toolkit(torch, setup.find_cxx())
assert toolkit is None, toolkit
print(json.dumps(setup.cmake_options(torch, setup.find_cxx(), toolkit, emulator=True)))
"""


def path_without_nvcc(folder: Path) -> str:
    """PATH, where a folder that holds nvcc gives way to one with links to all else in it."""
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
def test_the_emulator_builds_and_runs_without_nvcc(tmp_path: Path) -> None:
    wheels = importlib.util.find_spec("nvidia")
    bases = [Path(base) for base in (wheels.submodule_search_locations or [])] if wheels else []
    for header in ("cuda_bf16.h", "crt/host_defines.h", "nv/target"):
        if not any(f for base in bases for f in base.glob(f"**/{header}")):
            pytest.skip(f"no wheel here has {header}: pip install {WHEELS}")

    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    env |= {"LORA_EXT_CUDA": "0", "PATH": path_without_nvcc(tmp_path / "bin")}
    assert shutil.which("nvcc", path=env["PATH"]) is None
    options = json.loads(run(sys.executable, "-c", OPTIONS, env=env, cwd=ROOT))
    options |= {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "unknown"}

    # The build, and which headers it has read.
    cmake, build = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{env['PATH']}"), "b"
    assert cmake
    flags = [f"-D{key}={value}" for key, value in options.items()]
    run(cmake, "-S", str(ROOT), "-B", build, "-G", "Ninja", *flags, env=env, cwd=tmp_path)
    run(cmake, "--build", build, "-j2", "--target", "_emu", env=env, cwd=tmp_path)
    read = run(options["CMAKE_MAKE_PROGRAM"], "-t", "deps", env=env, cwd=tmp_path / build).split()
    headers = [name for name in read if name.endswith(("/cuda_bf16.h", "/nv/target"))]
    cuda = {(tmp_path / build / name).resolve() for name in headers}  # ccache may make it relative
    assert len(cuda) == 2
    assert all(any(name.is_relative_to(base.resolve()) for base in bases) for name in cuda), cuda

    # The package as it is, but with this build's kernels.
    package = tmp_path / "site" / "lora_ext"
    shutil.copytree(
        ROOT / "lora_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copy2(lora_ext._C.__file__, package)
    shutil.copy2(tmp_path / build / "modules" / f"_emu{options['LORA_EXT_MODULE_SUFFIX']}", package)
    env["PYTHONPATH"] = str(package.parent)
    where = run(
        sys.executable, "-c", "import lora_ext; print(lora_ext.__file__)", env=env, cwd=package
    )
    assert Path(where.strip()).parent == package
    # Launches of every kernel: decode and prefill, three types, against the reference.
    tests = [str(ROOT / "tests" / f) for f in ("kernels/test_lora_kernels.py", "test_contract.py")]
    chosen = "emu and not check and (float16_v or bit_for_bit and (T17 or T257))"
    pytest_run = [sys.executable, "-m", "pytest", "-q", "--require-emu", "-p", "no:cacheprovider"]
    out = run(*pytest_run, "-k", chosen, *tests, env=env, cwd=tmp_path)
    assert "skipped" not in out and int(out.split(" passed")[0].split()[-1]) >= 10, out
