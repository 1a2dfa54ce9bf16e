"""Growth of the peak memory of a process while an adapter of a whole model is scored.

`python tests/methods/splora_memory.py ADAPTER BASE ALIGNED` prints the growth in mebibytes and the
number of scored layers.
"""

import sys
from pathlib import Path

from lora_ext import methods
from lora_ext.adapter import LoraAdapter


def memory(field: str) -> int:
    """Return the resident memory of this process in KiB: the current value if `field` is VmRSS, the
    peak if it is VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise LookupError(f"memory: field: expected a line of /proc/self/status, found {field!r}")


def main() -> None:
    """Score the adapter, and print by how much the peak memory exceeds the memory before it."""
    adapter = LoraAdapter.load(sys.argv[1])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    stats = methods.splora.ediem_scores(adapter, *sys.argv[2:4])
    print((memory("VmHWM") - before) / 1024, len(stats))


if __name__ == "__main__":
    main()
