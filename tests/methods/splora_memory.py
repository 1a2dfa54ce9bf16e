"""How far the memory of a process rises while an adapter of a whole model is scored.

`python tests/methods/splora_memory.py ADAPTER BASE ALIGNED` prints mebibytes and the layers.
"""

import resource
import sys

from lora_ext import methods
from lora_ext.adapter import LoraAdapter


def main() -> None:
    """Score, and print the peak beyond what the process had before it."""
    adapter = LoraAdapter.load(sys.argv[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stats = methods.splora.ediem_scores(adapter, *sys.argv[2:4])
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((after - before) / 1024, len(stats))


if __name__ == "__main__":
    main()
