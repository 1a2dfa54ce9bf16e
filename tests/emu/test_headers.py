"""The emulator on a machine without a CUDA toolkit, with only the headers of NVIDIA's wheels.

The small kernels of this folder are compiled with these headers if they are installed. All other
kernels include the headers through the same device header.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from scripts import ROOT, module_of

HEADERS = ("cuda_bf16.h", "nv/target")


@pytest.mark.slow
@pytest.mark.emulated
def test_emulator_builds_with_the_headers_of_the_wheels_alone(build_folder: Path) -> None:
    setup = module_of(ROOT / "setup.py", "lora_ext_setup")
    wheels = [folder.resolve() for folder in setup.nvidia_wheels("*/include")]
    if not all(any(folder.rglob(header) for folder in wheels) for header in HEADERS):
        pytest.skip("pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl")
    ninja = shutil.which("ninja")
    assert ninja
    listing = [ninja, "-C", str(build_folder), "-t", "deps"]
    done = subprocess.run(listing, capture_output=True, text=True, check=True)
    used = {line.strip() for line in done.stdout.splitlines() if line.strip().endswith(HEADERS)}
    cuda = {(build_folder / name).resolve() for name in used}  # ccache prints relative paths
    assert len(cuda) == 2
    assert all(any(name.is_relative_to(wheel) for wheel in wheels) for name in cuda), cuda
