"""What only a GPU can tell: `make gpu OUT=folder`; installs nothing, under 9 minutes.

Builds in place with CUDA on, then runs the CUDA tests, the wrappers' micro-kernels, the four tools
of compute-sanitizer on small shapes, and the benchmarks. Every leg has a time limit and a log in
the folder; one that fails does not stop the others, and the exit status tells whether all passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from legs import ROOT, Leg, run

PY = sys.executable
REMEDY = "set PYTHON to one with a CUDA torch."
# Few shapes of one law; every kernel launches, and the sanitizer is slow.
SMALL = "random_values and (lora-T3- or lora-T70- or train-T17-)"
LAWS = "tests/test_contract.py"


def gpu() -> tuple[str, str]:
    """Name and compute capability of the first card, or one sentence and the end."""
    try:
        import torch
    except ImportError:
        raise SystemExit(f"make gpu: {PY} has no torch; {REMEDY}") from None
    if not torch.version.cuda:
        raise SystemExit(f"make gpu: torch {torch.__version__} of {PY} is a CPU build; {REMEDY}")
    if not torch.cuda.is_available():
        raise SystemExit("make gpu: torch finds no GPU here; `nvidia-smi` should list one.")
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}{'a' if major >= 9 else ''}"


def sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


def legs(arch: str, out: Path) -> list[Leg]:
    pytest = [PY, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--require-gpu"]
    build_env = {
        "LORA_EXT_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", arch),
    }
    steps = [
        Leg("build", [PY, "setup.py", "build_ext", "--inplace"], 200, env=build_env),
        Leg("doctor", [PY, "-m", "lora_ext.doctor"], 60, after="build"),
        Leg("cuda tests", [*pytest, "-m", "cuda", "tests"], 120, after="build"),
    ]
    if (ROOT / "tools/wrapper_goldens.py").exists():
        steps.append(Leg("wrappers", [PY, "tools/wrapper_goldens.py"], 60))
    tool = sanitizer()
    for check in ("memcheck", "racecheck", "initcheck", "synccheck"):
        if tool is None:
            steps.append(Leg(f"sanitizer {check}", _missing_sanitizer, 1, after="build"))
            continue
        # Torch's caching allocator would hide an access past the end of a tensor in its block.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [tool, f"--tool={check}", "--error-exitcode=9", "--kernel-regex=kns=lora_ext"]
        small = [*pytest, "-x", "-m", "cuda", "-k", SMALL, LAWS]
        steps.append(Leg(f"sanitizer {check}", [*command, *small], 45, env=env, after="build"))
    bench = [PY, "benchmarks/bench_lora.py", "--device", "cuda", "--out", str(out)]
    if (ROOT / "benchmarks/bench_lora.py").exists():
        steps.append(Leg("benchmarks", bench, 180, after="build"))
    return steps


def _missing_sanitizer() -> str:
    raise FileNotFoundError("compute-sanitizer is not on PATH, and not under CUDA_HOME")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out", help="folder for logs and results"
    )
    args = parser.parse_args()
    name, arch = gpu()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    ).stdout
    (out / "machine.txt").write_text(f"{name}\n{driver}{' '.join(sys.argv)}\n")
    print(f"{name}, architecture {arch}, logs in {out}")
    os.environ["PYTHONPATH"] = str(ROOT)
    return 1 if run(legs(arch, out), out) else 0


if __name__ == "__main__":
    sys.exit(main())
