"""Record what a GPU computes for every wrapper of lx/device.h, as a golden file.

    python tools/wrapper_goldens.py            compare the device with tests/golden/wrappers.json
    python tools/wrapper_goldens.py --update   write that file from the device
    python tools/wrapper_goldens.py --compile-only   nvcc alone, for machines without a GPU

tests/emu/test_wrappers.py compares the emulator with the same file.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "emu"))
from test_wrappers import golden_input  # one definition of the input

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "wrappers.json"
KERNELS = ROOT / "tests" / "emu" / "wrappers.cu"

# Number of words that each kernel writes.
LENGTHS = {
    "ldmatrix_x1": 32,
    "ldmatrix_x2": 64,
    "ldmatrix_x4": 128,
    "ldmatrix_x1_trans": 32,
    "ldmatrix_x2_trans": 64,
    "ldmatrix_x4_trans": 128,
    "mma_bf16": 128,
    "mma_f16": 128,
    "mma_tf32": 128,
    "cp_async_4": 32,
    "cp_async_8": 64,
    "cp_async_16": 128,
    "shuffle": 12 * 32,
    "vote": 11 * 32,
    "bits": 9 * 32,
}


def compile_library(folder: Path) -> Path:
    library = folder / "libwrappers.so"
    architectures = [
        f"-gencode=arch=compute_{a},code={code}_{a}"
        for a, code in (("80", "sm"), ("90a", "sm"), ("80", "compute"))
    ]
    command = ["nvcc", "-std=c++20", "-O3", "-shared", "-Xcompiler=-fPIC", *architectures]
    command += [f"-I{ROOT / 'csrc' / 'device'}", str(KERNELS), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def dump(library: ctypes.CDLL) -> dict[str, list[int]]:
    words = golden_input()
    library.wrapper_name.restype = ctypes.c_char_p
    dumps: dict[str, list[int]] = {}
    while (name := library.wrapper_name(ctypes.c_int64(len(dumps)))) is not None:
        out = np.zeros(4096, np.uint32)
        pointers = (ctypes.c_void_p(words.ctypes.data), ctypes.c_void_p(out.ctypes.data))
        status = library.wrapper_on_device(ctypes.c_int64(len(dumps)), *pointers)
        if status != 0:
            sys.exit(f"{name.decode()}: CUDA error {status}")
        dumps[name.decode()] = out[: LENGTHS[name.decode()]].tolist()
    return dumps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = compile_library(Path(folder))
        if arguments.compile_only:
            print(f"{KERNELS.name} compiles for sm_80 and sm_90a; nothing was run")
            return
        library = ctypes.CDLL(str(path))
        count = ctypes.c_int(0)
        library.wrapper_device.restype = ctypes.c_char_p
        device = library.wrapper_device(ctypes.byref(count)).decode()
        if count.value == 0:
            sys.exit("wrapper_goldens: no CUDA device here; golden files come from a real GPU only")
        dumps = dump(library)
    if arguments.update:
        GOLDEN.parent.mkdir(exist_ok=True)
        date = datetime.date.today().isoformat()
        GOLDEN.write_text(json.dumps({"device": device, "date": date, "dumps": dumps}) + "\n")
        print(f"wrote {GOLDEN.relative_to(ROOT)} from {device}")
        return
    if not GOLDEN.exists():
        sys.exit(f"wrapper_goldens: {GOLDEN.relative_to(ROOT)} does not exist; use --update")
    golden = json.loads(GOLDEN.read_text())
    different = [name for name in dumps if dumps[name] != golden["dumps"].get(name)]
    print(f"{device} against {golden['device']}: {len(dumps)} wrappers, different: {different}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
