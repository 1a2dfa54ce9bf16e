"""Build the package for a CUDA build of torch and import it, without a GPU.

No other check compiles the CUDA build with the headers and libraries of a CUDA torch. This one
downloads about 5 GB into a temporary environment, which is removed afterwards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from install_extras import PROJECT, lowest

ROOT = Path(__file__).resolve().parents[1]
# The oldest torch that pyproject.toml allows; the wheel of 2.11 is built for CUDA 13.0.
TORCH = next(pin for pin in lowest(PROJECT["dependencies"]) if pin.startswith("torch=="))

PROBE = """
import torch, lora_ext
from lora_ext import _loader
info = _loader.build_info()
assert torch.version.cuda, torch.__version__
assert info["torch"] == torch.__version__ and info["torch_cuda"] == torch.version.cuda, info
assert info["cuda"], info
assert "site-packages" in lora_ext.__file__, lora_ext.__file__
for name in ("lora_plan", "lora_apply_"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lora_ext::{name}", "CUDA"), name
print("imported beside torch", torch.__version__)
"""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="lora_ext_cuda_torch_") as folder:
        python = str(Path(folder, "venv/bin/python"))

        def step(*command: str, **env: str) -> None:
            print("$", *command, flush=True)
            subprocess.run(command, check=True, cwd=folder, env={**os.environ, **env})

        step(sys.executable, "-m", "venv", "venv")
        pip = [python, "-m", "pip", "install", "-q", "--no-cache-dir", "--no-compile"]
        step(*pip, TORCH, "numpy", "safetensors", "setuptools>=77", "cmake", "ninja")
        step(
            sys.executable,
            "-m",
            "build",
            "-q",
            "--sdist",
            "--no-isolation",
            "-o",
            folder,
            str(ROOT),
        )
        sdist = str(next(Path(folder).glob("lora_ext-*.tar.gz")))
        # Kernels do not include torch's headers, so a compiler cache has their objects from the
        # ordinary build. Without a cache, a single architecture is enough here.
        archs = {} if shutil.which("ccache") else {"TORCH_CUDA_ARCH_LIST": "9.0a"}
        build = ["--no-build-isolation", "--no-deps", sdist]
        step(*pip, *build, LORA_EXT_CUDA="1", **archs)
        step(python, "-c", PROBE)
        step(python, "-m", "lora_ext.doctor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
