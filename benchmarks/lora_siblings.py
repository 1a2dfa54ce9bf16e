"""Compare one op for q, k and v, or for gate and up, with one op per layer.

Shapes are those of SmolLM2-135M, with 16 adapters of rank 16. `separate` is one op per layer, `one
op` is `ops.lora_apply_siblings_`, which is bitwise equal, and `base` is the base products to which
both add. `one shrink` (with all A stacked) and `shrinks` (one per layer) show how much time reading
x only once can save at most. Launches are counted on the emulator if it is built. The last line is
a decode step of the whole model, with 16 rows and 16 adapters, attached with and without
`fuse_siblings`, which only this benchmark enables on the CPU. Run

    python benchmarks/lora_siblings.py [--threads 1] [--rounds 151] [--steps 15]
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Timing, interleaved
from torch.nn.functional import linear

import lora_ext
from lora_ext import _loader, ops
from lora_ext.ops import _registration, lora_siblings
from lora_ext.ops import lora as lora_ops
from lora_ext.serving.layers import _siblings

IN, RANK, ADAPTERS = 576, 16, 16
SIBLINGS = {"q k v": (576, 192, 192), "gate up": (1536, 1536)}


def row(rows: int, outs: tuple[int, ...], rounds: int) -> dict[str, Timing]:
    """Time the LoRA ops of all layers with the same input; return the timings by name."""
    ids = torch.arange(rows) % ADAPTERS
    plan, scale = ops.lora_plan(ids, ADAPTERS), torch.ones(ADAPTERS)
    x = torch.randn(rows, IN)
    a = [torch.randn(ADAPTERS, RANK, IN) for _ in outs]
    b = [torch.randn(ADAPTERS, o, RANK) for o in outs]
    y = [torch.randn(rows, o) for o in outs]
    weights = [torch.randn(o, IN) for o in outs]
    stacked, scales = torch.cat(a, 1), [scale] * len(outs)

    def separate(into: list[torch.Tensor]) -> None:
        for out, up, down in zip(into, a, b, strict=True):
            ops.lora_apply_(out, x, up, down, ids, scale, None, None, plan)

    def one_op(into: list[torch.Tensor]) -> None:
        ops.lora_apply_siblings_(into, x, a, b, ids, scales, [], [], plan)

    def shrink(*banks: torch.Tensor) -> None:
        for bank in banks:
            ops.lora_shrink(x, bank, ids, scale, None, None, plan)

    first, second = [t.clone() for t in y], [t.clone() for t in y]
    separate(first)
    one_op(second)
    if not all(map(torch.equal, first, second)):
        off = max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))
        raise SystemExit(f"{rows} rows, one op: expected no difference, found {off:.3g}")
    return interleaved(
        {
            "base": lambda: [linear(x, w) for w in weights],
            "separate": lambda: separate(y),
            "one op": lambda: one_op(y),
            "shrinks": lambda: shrink(*a),
            "one shrink": lambda: shrink(stacked),
        },
        rounds=rounds,
        min_seconds=3e-3,
    )


@functools.cache
def _emulator() -> Any:
    try:
        emulator = _loader.load("_emu")
    except ImportError:
        return None
    _registration.register("lora_ext_emu")
    return emulator


def launches(rows: int, modules: int) -> tuple[int, int] | None:
    """Return the numbers of launches of separate ops and of one op on the emulator, or None without
    the emulator."""
    emulator = _emulator()
    if emulator is None:
        return None
    ids = torch.arange(rows) % ADAPTERS
    plan, x = ops.lora_plan(ids, ADAPTERS), torch.randn(rows, 64)
    a = [torch.randn(ADAPTERS, RANK, 64) for _ in range(modules)]
    b = [torch.randn(ADAPTERS, 64, RANK) for _ in range(modules)]
    y = [torch.randn(rows, 64) for _ in range(modules)]
    own = lora_ops._c
    lora_ops._c = lora_siblings._c = torch.ops.lora_ext_emu
    counts = [emulator.launches()]
    for each in zip(y, a, b, strict=True):
        ops.lora_apply_(each[0], x, *each[1:], ids, None, None, None, plan)
    counts.append(emulator.launches())
    ops.lora_apply_siblings_(y, x, a, b, ids, plan=plan)
    counts.append(emulator.launches())
    lora_ops._c = lora_siblings._c = own
    return counts[1] - counts[0], counts[2] - counts[1]


def decode_steps(rounds: int) -> dict[str, Timing]:
    """Time a decode step of a SmolLM2-shaped model without adapters, with separate ops and with one
    op. Exit if the results with separate ops and with one op differ."""
    from lora_model import CONTEXT, NAMES, Step, _sharing_weights, build

    _siblings.SHARE_ON_CPU = True
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        engines = build(Path(folder))
        fused = lora_ext.attach(_sharing_weights(engines.plain), engines.pool, fuse_siblings=True)
        tokens = torch.randint(0, 49152, (16, CONTEXT + 1), generator=torch.manual_seed(1))
        models = {"base": engines.plain, "separate": engines.ours, "one op": fused}
        steps = {
            name: Step(model, tokens, NAMES, "base" if name == "base" else "lora_ext", True)
            for name, model in models.items()
        }
        if not torch.equal(single := steps["separate"](), joint := steps["one op"]()):
            off = (single - joint).abs().max()
            raise SystemExit(f"decode, one op: expected no difference, found {off:.3g}")
        return interleaved(steps, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=151)
    parser.add_argument("--steps", type=int, default=15, help="rounds of decode steps; 0: none")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with torch.inference_mode():
        for rows in (1, 16, 128):
            for name, outs in SIBLINGS.items():
                times = row(rows, outs, asked.rounds)
                shown = ", ".join(f"{k} {1e6 * t.p20:.1f}" for k, t in times.items())
                ratio = times["one op"].over(times["separate"])
                print(
                    f"{rows} rows, {name}, us: {shown}; one op / separate {ratio:.3f}", flush=True
                )
                print(f"  launches, separate ops and one op: {launches(rows, len(outs))}")
    if asked.steps:
        times = decode_steps(asked.steps)
        shown = ", ".join(f"{k} {1e3 * t.median:.2f}" for k, t in times.items())
        ratio = times["one op"].over(times["separate"])
        print(f"decode step, 16 rows, ms: {shown}; one op / separate {ratio:.3f}")


if __name__ == "__main__":
    main()
