"""What one op for q, k and v (gate and up) could save over one op each: an upper bound.

Shapes of SmolLM2-135M, 16 adapters of rank 16, one thread. `separate` is what layers do now; `one
shrink` is the shrink of all A's stacked along the rank, which one op could do once for `shrinks`;
`calls` is the same number of ops on 8 x 8 layers: what calling costs. Launches are counted on the
emulator, where it is built. Run

    python benchmarks/lora_siblings.py
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from common import interleaved
from torch.nn.functional import linear

from lora_ext import _loader, ops
from lora_ext.ops import _registration
from lora_ext.ops import lora as lora_ops

IN, RANK, ADAPTERS = 576, 16, 16
SIBLINGS = {"q k v": (576, 192, 192), "gate up": (1536, 1536)}


def row(rows: int, outs: tuple[int, ...]) -> dict[str, float]:
    """Microseconds for all siblings of one input."""
    ids = torch.arange(rows) % ADAPTERS
    plan, scale = ops.lora_plan(ids, ADAPTERS), torch.ones(ADAPTERS)
    x, small = torch.randn(rows, IN), torch.randn(rows, 8)
    a = [torch.randn(ADAPTERS, RANK, IN) for _ in outs]
    b = [torch.randn(ADAPTERS, o, RANK) for o in outs]
    y = [torch.randn(rows, o) for o in outs]
    weights = [torch.randn(o, IN) for o in outs]
    stacked, factor = torch.cat(a, 1), torch.randn(ADAPTERS, 8, 8)

    def apply_(*factors: tuple[torch.Tensor, ...], x: torch.Tensor = x) -> None:
        for out, up, down in zip(*factors, strict=True):
            ops.lora_apply_(out, x, up, down, ids, scale, None, None, plan)

    def shrink(*banks: torch.Tensor) -> None:
        for bank in banks:
            ops.lora_shrink(x, bank, ids, scale, None, None, plan)

    eight = [small.clone() for _ in outs], [factor] * len(outs), [factor] * len(outs)
    times = interleaved(
        {
            "base": lambda: [linear(x, w) for w in weights],
            "separate": lambda: apply_(y, a, b),
            "shrinks": lambda: shrink(*a),
            "one shrink": lambda: shrink(stacked),
            "calls": lambda: apply_(*eight, x=small),
        },
        rounds=151,
        min_seconds=3e-4,
    )
    return {name: 1e6 * timing.p20 for name, timing in times.items()}


@functools.cache
def _emulator() -> Any:
    try:
        emulator = _loader.load("_emu")
    except ImportError:
        return None
    _registration.register("lora_ext_emu")
    return emulator


def launches(rows: int) -> int | None:
    """Of one op on the CUDA path; None where the emulator is not built."""
    emulator = _emulator()
    if emulator is None:
        return None
    ids = torch.arange(rows) % ADAPTERS
    plan, own = ops.lora_plan(ids, ADAPTERS), lora_ops._c
    lora_ops._c = torch.ops.lora_ext_emu
    before = emulator.launches()
    a, b = torch.randn(ADAPTERS, RANK, 64), torch.randn(ADAPTERS, 64, RANK)
    ops.lora_apply_(torch.randn(rows, 64), torch.randn(rows, 64), a, b, ids, None, None, None, plan)
    lora_ops._c = own
    return emulator.launches() - before


def main() -> None:
    """Print a line for each case."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        for rows in (1, 16, 128):
            print(f"{rows} rows: {launches(rows)} launches of a module's op on the CUDA path")
            for name, outs in SIBLINGS.items():
                shown = ", ".join(f"{k} {v:.1f}" for k, v in row(rows, outs).items())
                print(f"  {name}, us: {shown}", flush=True)


if __name__ == "__main__":
    main()
