"""Install a wheel without a compiler in a new environment, and run the README's ten lines.

`python tools/fresh.py dist/lora_ext-*.whl --python python3.13` creates an environment of that
Python and installs torch and transformers, then the wheel. No compiler, cmake or nvcc is on PATH.
It runs the ten lines of the README, in a folder made by `make demo`, and `lora-ext doctor`. The
installation of the wheel is timed separately from the downloads. Only pip uses the network. CI does
not run this script; run it before a release (docs/releasing.md).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "clang++", "cmake", "ninja", "nvcc")
_TEN = re.compile(r"^## Serve in ten lines$.*?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
_CHILD = """
import json, sys, time
import torch, transformers
code, times = sys.stdin.read(), [time.perf_counter()]
import lora_ext
times.append(time.perf_counter())
scope = {}
exec(compile(code, "<README, ten lines>", "exec"), scope)
times.append(time.perf_counter())
lora_ext.detach(scope["model"])
print(json.dumps({"import": times[1] - times[0], "ten lines": times[2] - times[1],
                  "torch": torch.__version__, "rows": len(scope["answers"]),
                  "file": lora_ext.__file__}))
"""


def torch_of(wheel: Path) -> str:
    """Return the minor version of torch that a wheel of ``make wheels`` requires."""
    found = re.search(r"\+torch(\d+\.\d+)\.", wheel.name)
    if found is None:
        raise SystemExit(
            f"fresh: expected a wheel of `make wheels`, with +torchX.Y, found {wheel.name}"
        )
    return found[1]


def install(python: str, wheel: Path, room: Path) -> tuple[Path, dict[str, float]]:
    """Install torch, transformers and the wheel in a new environment.

    Returns:
        Its Python, and the seconds that the downloads and the wheel took.
    """
    subprocess.run([python, "-m", "venv", room], check=True)
    inside = room / "bin" / "python"
    seconds: dict[str, float] = {}
    needed = [f"torch=={torch_of(wheel)}.*", "transformers>=4.56"]
    for part, what in (("downloads", needed), ("install", ["--no-deps", str(wheel)])):
        begun = time.perf_counter()
        command = [inside, "-m", "pip", "install", "-q", "--disable-pip-version-check", *what]
        subprocess.run(command, check=True, env=bare(room))
        seconds[part] = time.perf_counter() - begun
    return inside, seconds


def bare(room: Path) -> dict[str, str]:
    """Return environment variables with only the virtual environment on PATH: no compiler."""
    path = str(room / "bin")
    found = [name for name in COMPILERS if shutil.which(name, path=path)]
    if found:
        raise SystemExit(f"fresh: expected no compiler on PATH, found {found} in {path}")
    gone = {"CC", "CXX", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH", "LD_LIBRARY_PATH"}
    kept = {key: value for key, value in os.environ.items() if key not in gone}
    return {**kept, "PATH": path, "HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Install the wheel, run the code and print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path, help="wheel that `make wheels` has built")
    parser.add_argument("--python", default=sys.executable, help="Python that the wheel is for")
    place = ROOT / "out" / "demo"
    parser.add_argument("--place", type=Path, default=place, help="folder of model and adapters")
    args = parser.parse_args()
    if not (args.place / "base-model").is_dir():
        raise SystemExit(f"fresh: --place: expected a folder with base-model (`make demo` leaves "
                         f"out/demo), found {args.place}")  # fmt: skip
    found = _TEN.search((ROOT / "README.md").read_text())
    assert found is not None, "README.md: expected a block under 'Serve in ten lines', found none"
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder) / "venv"
        inside, seconds = install(args.python, args.wheel.resolve(), room)
        run = subprocess.run(
            [inside, "-c", _CHILD], input=found[1], text=True, stdout=subprocess.PIPE,
            check=True, cwd=args.place, env=bare(room),
        )  # fmt: skip
        subprocess.run([inside, "-m", "lora_ext", "doctor"], check=True, cwd=room, env=bare(room))
        result = json.loads(run.stdout.splitlines()[-1])
        assert result["rows"] == 3 and result["file"].startswith(folder), result
    print(f"{args.wheel.name} with torch {result['torch']}, no compiler on PATH")
    ours = f"import {result['import']:.2f} s after torch, ten lines {result['ten lines']:.1f} s"
    print(f"lora_ext: install {seconds['install']:.1f} s, {ours}")
    print(f"torch and transformers from the index: {seconds['downloads']:.0f} s")


if __name__ == "__main__":
    main()
