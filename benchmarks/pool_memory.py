"""Measure the memory of an AdapterPool: empty, and with 1, 8 and 32 adapters of rank 16.

The base is Llama-3-8B's linear layers in bfloat16 on the meta device, so only the pool uses memory.
Run

    python benchmarks/pool_memory.py [--check]
"""

from __future__ import annotations

import argparse
import mmap
from pathlib import Path

import torch
from torch import nn

from lora_ext import AdapterPool

RANK = 16
LAYERS = {  # I, O
    "q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096),
    "gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096),
}  # fmt: skip


def held() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def main() -> None:
    """Print the pool's and the process's memory for each number of adapters.

    With ``--check``, exit with an error if the process has grown by 256 MiB more than the pool
    uses.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the process grows too much")
    check = parser.parse_args().check
    meta = torch.device("meta")
    blocks = range(32)
    model = nn.ModuleDict(
        {
            f"{n}_{name}": nn.Linear(*size, device=meta)
            for n in blocks
            for name, size in LAYERS.items()
        }
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": "all-linear"}
    tensors = {}
    for name, (i, o) in ((f"{n}_{k}", size) for n in blocks for k, size in LAYERS.items()):
        tensors[f"{name}.lora_A.weight"] = torch.ones(RANK, i, dtype=torch.bfloat16)
        tensors[f"{name}.lora_B.weight"] = torch.ones(o, RANK, dtype=torch.bfloat16)
    start = held()
    pool = AdapterPool(model, device="cpu", dtype=torch.bfloat16)
    print(f"limit {pool.limit_bytes / 2**20:.0f} MiB")
    for count in (0, 1, 8, 32):
        while len(pool.names) < count:
            pool.load(str(len(pool.names)), (config, tensors))
        numbers = {k: pool.stats()[k] / 2**20 for k in ("used_bytes", "reserved_bytes")}
        grown = (held() - start) / 2**20
        shown = ", ".join(f"{key} {value:.0f} MiB" for key, value in numbers.items())
        print(f"{count} adapters: {shown}, the process has grown by {grown:.0f} MiB", flush=True)
        if check and grown > numbers["used_bytes"] + 256:
            most = numbers["used_bytes"] + 256
            raise SystemExit(f"pool_memory: expected growth <= {most:.0f} MiB, found {grown:.0f}")


if __name__ == "__main__":
    main()
