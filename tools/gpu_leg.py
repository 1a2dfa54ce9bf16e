"""Run the checks that need a GPU, in calls of at most nine minutes: `make gpu CALL=1 OUT=folder`.

0. Build the kernels in place; without a compiler, use the existing modules. Then load them all,
   which compiles PTX on a GPU that is newer than the build. This does not count against the nine
   minutes: a build takes ten on two cores.
1. Build and load as in 0, unless this is done. Then run: the wrappers' micro-kernels; `lora-ext
   gpu-report`, which compares every kernel with its formula and times every launcher; the
   measurement of what the estimates assume (tools/gpu_probe.cu); a captured step in the shape of
   an 8B model; memcheck and racecheck.
2. Run all CUDA tests, and the other tools of compute-sanitizer.
3. Run the benchmarks.

Nothing is installed. Every leg has a time limit and a log in the folder. A failed leg does not stop
the others; the exit status is 1 if one failed.
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
REMEDY = "set PYTHON to a Python with a CUDA build of torch."
# Tests for the sanitizer, which is slow: one property with a few shapes launches every kernel.
SMALL = "random_values and (lora-T3- or lora-T70- or train-T17-)"
LAWS = "tests/test_contract.py"
# Kernels that a sanitizer's tool does not check. Expand loads four floats of v at a time. No kernel
# writes the floats beyond the adapter's rank, so initcheck reports the load, although expand then
# replaces them by zeros. To write them, or to load fewer, probably takes more instructions.
EXCLUDED = {"initcheck": "lora_expand_kernel"}
PYTEST = [PY, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--require-gpu"]
PROBE = "nvcc -O3 -std=c++20 -arch=native tools/gpu_probe.cu -o build/gpu_probe && build/gpu_probe"


def gpu() -> tuple[str, str]:
    """Return name and compute capability of the first GPU, or exit with a message."""
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


def preparations(arch: str) -> list[Leg]:
    """Return the legs that build and load the kernels; their time is not counted."""
    # Eager loading compiles the PTX of every kernel, and the driver stores the results.
    load = Leg("load", [PY, "-m", "lora_ext.doctor"], 600, env={"CUDA_MODULE_LOADING": "EAGER"})
    if shutil.which("nvcc") is None:
        print("no nvcc found: using the module in place, skipping the legs that compile")
        return [load]
    load.after = "build"
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", arch)
    env = {"LORA_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}
    return [Leg("build", [PY, "setup.py", "build_ext", "--inplace"], 900, env=env), load]


def legs(call: int, arch: str, out: Path) -> list[Leg]:
    """Return the legs of one call.

    The sum of their limits, without those of :func:`preparations`, is nine minutes at most.
    """
    if call == 0:
        return preparations(arch)
    if call == 2:
        return [
            Leg("cuda tests", [*PYTEST, "-m", "cuda", "tests"], 330),
            *(_sanitized(tool, 100) for tool in ("initcheck", "synccheck")),
        ]
    if call == 3:
        command = [PY, "benchmarks/bench_lora.py", "--device", "cuda", "--out", str(out)]
        return [Leg("benchmarks", command, 530)]
    report = ["-m", "lora_ext", "gpu-report", "--minutes", "2", "--out", f"{out}/lora_ext_gpu.json"]
    steps = [
        Leg("report", [PY, *report], 290),
        Leg("captured step", [PY, "benchmarks/captured_step.py"], 80),
        *(_sanitized(tool, 50) for tool in ("memcheck", "racecheck")),
    ]
    first = preparations(arch)
    if first[0].name != "build":
        return [*first, *steps]
    for step in steps:
        step.after = "build"
    return [
        *first,
        Leg("wrappers", [PY, "tools/wrapper_goldens.py", "--out", str(out)], 30),
        Leg("probe", ["bash", "-c", PROBE], 40),
        *steps,
    ]


def _sanitized(check: str, seconds: int) -> Leg:
    tool = sanitizer()
    if tool is None:
        return Leg(f"sanitizer {check}", _missing_sanitizer, 1)
    # Torch's caching allocator would hide an access past the end of a tensor in its block.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, f"--tool={check}", "--error-exitcode=9", "--kernel-name=kns=lora_ext"]
    if check in EXCLUDED:
        command.append(f"--kernel-name-exclude=kns={EXCLUDED[check]}")
    small = [*PYTEST, "-x", "-m", "cuda", "-k", SMALL, LAWS]
    return Leg(f"sanitizer {check}", [*command, *small], seconds, env=env)


def _missing_sanitizer() -> str:
    raise FileNotFoundError("compute-sanitizer is not on PATH, and not under CUDA_HOME")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--call", type=int, choices=(0, 1, 2, 3), default=1, help="run 1 before 2")
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
    return 1 if run(legs(args.call, arch, out), out) else 0


if __name__ == "__main__":
    sys.exit(main())
