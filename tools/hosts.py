"""Run the tests marked `hosts` with the code paths of other processors.

    python tools/hosts.py [name of a setting to leave out ...]

torch, oneDNN, MKL and the CPU kernels of this package choose their code by the processor. Each
setting makes one or all of these libraries choose the code of another processor. Two settings run
at a time.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from legs import ROOT, Leg, run

from lora_ext import _C

PYTEST = [sys.executable, "-m", "pytest", "-q", "--quick", "1", "-p", "no:cacheprovider"]
PYTEST += ["-m", "hosts and not emulated and not cuda"]
# LX_ISA sets the instruction set of the backend "cpu". Backends with a fixed instruction set are
# left out: they use the same code in every setting, and other tests run them.
PYTEST += ["-k", "not compile and not graph and not cpu-scalar and not cpu-avx"]

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "LX_ISA": "avx2",
}
SETTINGS: dict[str, dict[str, str]] = {
    "this processor": {},
    "3 threads": {"OMP_NUM_THREADS": "3"},
    "torch without AVX, lora_ext scalar": {"ATEN_CPU_CAPABILITY": "default", "LX_ISA": "scalar"},
    "oneDNN SSE41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    # Skipped on processors without AVX-512, on which oneDNN uses AVX2 in every setting.
    "oneDNN AVX2, lora_ext avx512": {"ONEDNN_MAX_CPU_ISA": "AVX2", "LX_ISA": "avx512"},
    "MKL SSE4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "all AVX2": AVX2,
}


def marked() -> list[str]:
    """Return the test files with the mark `hosts`; collecting all test files would take longer."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.hosts" in file.read_text()]


def lacking(env: dict[str, str]) -> str | None:
    """Return the reason why this processor cannot run a setting, or None."""
    before = _C.cpu_isa()
    try:
        _C.set_cpu_isa(env.get("LX_ISA", ""))
    except ValueError as error:
        return str(error).splitlines()[0]
    _C.set_cpu_isa(before)
    return None


def processor() -> str:
    """Return the model name that lscpu prints."""
    lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    names = [line for line in lines.splitlines() if line.startswith("Model name:")]
    return names[0].partition(":")[2].strip() if names else "unknown"


def main(left_out: Sequence[str] = ()) -> int:
    if unknown := set(left_out) - set(SETTINGS):
        raise SystemExit(f"hosts: expected settings of {sorted(SETTINGS)}, found {sorted(unknown)}")
    print(f"processor: {processor()}; lora_ext's best instruction set: {_C.cpu_isa()}")
    legs: list[Leg] = []
    for name, env in SETTINGS.items():
        reason = "named on the command line" if name in left_out else lacking(env)
        if reason:
            print(f"{name}: skipped: {reason}")
            continue
        env = {"OMP_NUM_THREADS": "1", **env}
        legs.append(Leg(name, PYTEST + marked(), 600, env=env, beside=len(legs) % 2 == 1))
    return 1 if run(legs, ROOT / "out" / "hosts") else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
