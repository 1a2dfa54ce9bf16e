"""The emulator with only the headers of NVIDIA's wheels, as on a machine without a CUDA toolkit."""

import shutil
import subprocess
from pathlib import Path

import pytest
from scripts import ROOT, module_of


@pytest.mark.slow
@pytest.mark.emulated
def test_emulator_builds_with_the_headers_of_the_wheels_alone(build_folder: Path) -> None:
    wheels = module_of(ROOT / "setup.py", "lora_ext_setup").nvidia_wheels("*/include")
    ends = ("/cuda_bf16.h", "/nv/target")
    if not all(any(folder.rglob(end[1:]) for folder in wheels) for end in ends):
        pytest.skip("needs the wheels nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl")
    listing = [shutil.which("ninja") or "ninja", "-C", str(build_folder), "-t", "deps"]
    read = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    cuda = {(build_folder / name).resolve() for name in read if name.endswith(ends)}
    assert len(cuda) == 2
    assert all(any(name.is_relative_to(wheel.resolve()) for wheel in wheels) for name in cuda), cuda
