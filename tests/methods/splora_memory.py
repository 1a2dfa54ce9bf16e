"""How far the memory of a process rises while an adapter of a whole model is scored.

`python tests/methods/splora_memory.py ADAPTER BASE ALIGNED` prints mebibytes and the layers.
"""

import sys
from pathlib import Path

from lora_ext import methods
from lora_ext.adapter import LoraAdapter


def memory(field: str) -> int:
    """Kibibytes: VmRSS is what the process holds now, VmHWM the most that it held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise LookupError(field)


def main() -> None:
    """Score, and print the peak beyond what the process held before it."""
    adapter = LoraAdapter.load(sys.argv[1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    stats = methods.splora.ediem_scores(adapter, *sys.argv[2:4])
    print((memory("VmHWM") - before) / 1024, len(stats))


if __name__ == "__main__":
    main()
