"""Time LoRA: `python benchmarks/bench_lora.py --matrix decode layers ...`.

A matrix is a group of cases. Rows are appended to OUT/lora_cpu.csv or lora_cuda.csv, from which
`benchmarks/report.py` makes the tables and the chart. Every result is checked before it is timed.
See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from common import ROOT, append_rows
from depth_mix import bench_mix
from lora_gram import bench_gram
from lora_large_rank import bench_large_rank
from lora_ops import (
    DECODE,
    PREFILL,
    bench_allocation,
    bench_call,
    bench_mixed_ranks,
    bench_shapes,
)
from lora_train import TRAIN, TRAIN_CPU, bench_train
from row import Row

MATRICES = (
    "ops", "decode", "prefill", "train", "gram", "large_rank", "mix", "model", "swap", "layers"
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--matrix", nargs="+", choices=[*MATRICES, "all"], default=["all"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "bench", help="folder of the csv"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    wanted = MATRICES if "all" in args.matrix else tuple(args.matrix)
    path = args.out / f"lora_{args.device}.csv"
    for row in measure(wanted, args.device, args.rounds):
        append_rows(path, [row.columns(args.device)])  # Rows of an aborted run are kept.
        print(summary(row), flush=True)
    print(f"\n{path}")


def measure(wanted: tuple[str, ...], device: str, rounds: int) -> Iterator[Row]:
    """Yield all rows of the requested matrices (groups of cases)."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.inference_mode():
        if "decode" in wanted:
            yield from bench_shapes("decode", DECODE, device, dtype, rounds)
        if "prefill" in wanted:
            yield from bench_shapes("prefill", PREFILL, device, dtype, max(3, rounds // 2))
        if "train" in wanted:
            shapes = TRAIN_CPU if device == "cpu" else TRAIN
            yield from bench_train(shapes, device, dtype, max(3, rounds // 2))
        if "gram" in wanted:
            yield from bench_gram(device, rounds)
        if "large_rank" in wanted:
            yield from bench_large_rank(device, dtype, rounds)
        if "mix" in wanted:
            yield from bench_mix(device, rounds)
        if "ops" in wanted:
            yield from bench_mixed_ranks(device, dtype, rounds)
            if device == "cpu":
                yield from bench_call(rounds)
                yield from bench_allocation()
    if device == "cpu" and set(wanted) & {"model", "swap", "ops"}:
        yield from measure_model(wanted, rounds)
    if device == "cpu" and "layers" in wanted:
        import lora_layers

        yield from lora_layers.bench_layers(rounds)
        yield from lora_layers.bench_many(rounds)
        yield from lora_layers.bench_modalities(rounds)
        yield from lora_layers.bench_models(max(3, rounds // 2))
        yield from lora_layers.bench_memory()


def measure_model(wanted: tuple[str, ...], rounds: int) -> Iterator[Row]:
    """Yield the rows of the requested matrices that need transformers and PEFT."""
    import lora_model

    with lora_model.temporary_folder() as folder:
        engines = lora_model.build(Path(folder))
        if "ops" in wanted:
            yield from lora_model.bench_memory(engines)
        if "model" in wanted:
            yield from lora_model.bench_model(engines, rounds)
        if "swap" in wanted:
            yield from lora_model.bench_swap(Path(folder), engines, rounds)


def summary(row: Row) -> str:
    """Format a row as one line for the terminal."""
    parts = [f"{row.matrix:8} {row.case:38} {row.provider:10} {row.median:12.4g} {row.unit:5}"]
    if row.rank != "":
        parts.append(f"rank {row.rank}")
    for label, value in (
        ("of copy", row.of_copy),
        ("over base", row.over_base),
        ("x faster than PEFT", row.over_peft),
        ("over all-64", row.over_full),
    ):
        if isinstance(value, float):
            parts.append(f"{value:.2f} {label}")
    return "  ".join(parts)


if __name__ == "__main__":
    main()
