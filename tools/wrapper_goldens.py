"""Record what a GPU computes for every wrapper of lx/device.h, as a golden file.

    python tools/wrapper_goldens.py            compare the device with tests/golden/wrappers.json
    python tools/wrapper_goldens.py --out FOLDER     also write the device's values to FOLDER
    python tools/wrapper_goldens.py --update   write that file from the device
    python tools/wrapper_goldens.py --compile-only   nvcc alone, for machines without a GPU

tests/emu/test_wrappers.py compares the emulator with the same file. If the file does not exist yet,
no other GPU has confirmed the values, and they are written to the folder as "unconfirmed".
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
    "bits": 13 * 32,
    "exp": 512,
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


def judge(device: str, dumps: dict[str, list[int]], golden: Path, out: Path | None) -> int:
    """Compare the values of a device with the golden file, and return the exit status.

    The values are written to ``out`` first, in the format of the golden file. Without a golden
    file, they are marked as unconfirmed, and the status is 0 if they were written.
    """
    date = datetime.date.today().isoformat()
    known = json.loads(golden.read_text()) if golden.exists() else None
    different = known and [name for name in dumps if dumps[name] != known["dumps"].get(name)]
    status = "unconfirmed" if known is None else "different" if different else "confirmed"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        found = {"device": device, "date": date, "status": status, "dumps": dumps}
        (out / golden.name).write_text(json.dumps(found) + "\n")
    if known is None:
        where = "lost; use --out or --update" if out is None else f"in {out / golden.name}"
        print(f"unconfirmed: {golden.name} does not exist; {len(dumps)} dumps of {device} {where}")
        return 1 if out is None else 0
    print(f"{device} against {known['device']}: {len(dumps)} wrappers, different: {different}")
    return 1 if different else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--out", type=Path, help="folder to which the device's values are written")
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
    folder = GOLDEN.parent if arguments.update else arguments.out
    status = judge(device, dumps, GOLDEN, folder)
    sys.exit(0 if arguments.update else status)


if __name__ == "__main__":
    main()
