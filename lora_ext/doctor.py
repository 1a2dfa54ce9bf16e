"""``lora-ext doctor``: versions, build and a test of each device, to attach to bug reports.

Run ``python -m lora_ext.doctor`` if the command ``lora-ext`` is not on the path. The exit status is
1 if the test failed on a device.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import torch

from lora_ext import _loader

PACKAGES = ("lora_ext", "torch", "numpy", "safetensors", "transformers", "peft", "triton")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _devices(info: dict[str, object]) -> tuple[list[torch.device], dict[str, object]]:
    """Return the devices to test, and the report's rows about CUDA.

    The rows describe each GPU, or give the reason why CUDA is not used.
    """
    devices = [torch.device("cpu")]
    if not torch.version.cuda:
        return devices, {"cuda": "this torch is a CPU build"}
    if not torch.cuda.is_available():
        return devices, {"cuda": "torch finds no GPU; `nvidia-smi` shows if the driver finds one"}
    rows: dict[str, object] = {}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        rows[f"cuda:{index}"] = (
            f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB, "
            f"{card.multi_processor_count} multiprocessors"
        )
        devices.append(torch.device("cuda", index))
    if not info.get("cuda"):
        rows["note"] = "lora_ext was built without CUDA: set CUDA_HOME and install it again"
        devices = devices[:1]
    return devices, rows


def _try_op(device: torch.device) -> tuple[bool, str]:
    """Run one op on a batch with several adapters.

    Return whether the result matches the reference, and a line for the report: the largest error,
    or the exception.
    """
    from lora_ext import ops, reference

    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 67, generator=g)
    a = torch.randn(3, 8, 67, generator=g)
    b = torch.randn(3, 33, 8, generator=g)
    ids = torch.tensor([2, -1, 0, 0, 1])
    want = reference.lora_apply(x.double(), a.double(), b.double(), ids)  # (5, 33)
    try:
        got = ops.lora_apply(*(t.to(device) for t in (x, a, b, ids))).cpu()
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"
    # Two float32 sums of 67 and 8 terms have a rounding error below (67 + 8) * 2^-23 * sum |a||b|.
    bound = reference.lora_apply(x.double().abs(), a.double().abs(), b.double().abs(), ids)
    error = (got.double() - want).abs()
    fine = bool((error <= 75 * 2**-23 * bound).all())
    return fine, f"lora_apply, largest error {error.max():.1e}"


def main(as_json: bool = False) -> int:
    """Print the report; return 0 if the op matches its reference on every device, otherwise 1."""
    info = _loader.build_info()
    devices, cards = _devices(info)
    sections = _sections(info, cards)
    if not as_json:  # The report is printed before any op runs: an op may crash the process.
        for title, rows in sections.items():
            print(title)
            for key, value in rows.items():
                print(f"  {key:<14} {value}")
        print("ops", flush=True)
    ops: dict[str, dict[str, object]] = {}
    for device in devices:
        fine, words = _try_op(device)
        ops[str(device)] = {"ok": fine, "found": words}
        if not as_json:
            print(f"  {device!s:<14} {'ok  ' if fine else 'FAIL'} {words}")
    failed = sum(not op["ok"] for op in ops.values())
    if as_json:
        print(json.dumps({**sections, "ops": ops}, indent=2, default=str))
    else:
        print("all good" if not failed else f"{failed} of {len(devices)} devices failed")
    return 1 if failed else 0


def _sections(info: dict[str, object], cards: dict[str, object]) -> dict[str, dict[str, object]]:
    here, other = Path(__file__).resolve().parent, _loader.hidden()
    module = _loader.load()
    package: dict[str, object] = {"imported from": str(here), "kernels from": module.__file__}
    if other is not None:
        package["note"] = (
            f"it hides another lora_ext in {other}; start Python outside of {here.parent} to use it"
        )
    build = dict(info)
    if info and info["torch"] != torch.__version__:
        build["note"] = f"built for torch {info['torch']}, found {torch.__version__}"
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "machine": {
            "python": f"{platform.python_version()} ({sys.executable})",
            "system": platform.platform(),
            "processor": f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores for this process",
            "threads": torch.get_num_threads(),
        },
        "package": package,
        "build": build,
        "devices": {"cpu kernels": module.cpu_isa(), **cards},
    }


if __name__ == "__main__":
    sys.exit(main())
