"""Time packed weights: products of few rows relative to torch's, and SmolLM2 with 16 adapters.

`python benchmarks/packed_linear.py [--matrix ops model bits widths accuracy] [--dtype bfloat16]`.
`widths` times products with spaced rows (`docs/layers.md`), `bits` the model with weights of 8 and
4 bits, whose accuracy `accuracy` measures (`benchmarks/packed_accuracy.py`). Results are checked
before they are timed. With `--threads 1`, times are processor times. `packed_twin` measures the
lower bound of the products, the time of reading the weight once (`benchmarks/packed_twin.cpp`).

`--check` prints all missed limits, and exits with 1 if there is one:

* A decode step of 8 or 16 rows with different adapters over packed weights takes at most 0.75 of
  the time of torch's step without adapters.
* Steps with 8 or 4 bits: see `BITS_LIMITS`.
* A product takes at most 1.05 of the time of torch's linear, and for up to 8 rows at most 1.25 of
  the time in which torch sums the packed bytes.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import (
    ROOT,
    Call,
    Timing,
    append_rows,
    error_over_bound,
    interleaved,
    machine_columns,
)
from lora_model import MODULES, NAMES, RANK, Step
from packed_accuracy import bench_accuracy
from torch import Tensor
from torch.nn import functional as F

import lora_ext
from lora_ext import nn, ops
from lora_ext._torch import linear
from lora_ext.interop.smollm2 import load_smollm2

SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576), (576, 49152))  # of SmolLM2-135M
ROWS = (1, 2, 4, 8, 16, 32)
WIDTHS, WIDE_ROWS = (144, 172, 1000), (17, 128, 512)
COLD_BYTES = 64 << 20  # total size of the weights of one shape, which are used in turn
MOST = 0.75  # time of a packed step with adapters over that of torch's step without
MOST_OF_TORCH = 1.05
MOST_OF_READING, READ_ROWS = 1.25, 8  # READ_ROWS: largest number of rows with this limit
MATRICES = ("ops", "model", "bits", "widths", "accuracy")
GROUP = 64  # input features per scale of a weight of 8 or 4 bits
#: Rows, a step, the step by which its time is divided, and the largest quotient.
BITS_LIMITS = (
    (1, "8 bits", "base", 0.45),
    (4, "8 bits", "base", 0.45),
    (16, "8 bits", "base", 0.8),
    (1, "4 bits", "8 bits", 0.75),
)
TEXT_TOKENS = 16  # of each row of the greedy text that is compared


class OwnTime:
    """Call timed by the clock of its thread, which is less affected by other processes."""

    def __init__(self, call: Call):
        self.call = call

    def __call__(self) -> object:
        return self.call()

    def seconds(self, count: int) -> float:
        """Return the seconds of ``count`` calls, as in :class:`common.Remote`."""
        start = time.thread_time()
        for _ in range(count):
            self.call()
        return time.thread_time() - start


def has_onednn(dtype: torch.dtype) -> bool:
    """Return whether oneDNN packs weights of this dtype here; bfloat16 needs AVX-512."""
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Row(NamedTuple):
    """Row of results/packed_cpu.csv."""

    matrix: str
    case: str
    provider: str
    dtype: str
    in_features: int | str
    out_features: int | str
    unit: str
    time: float  # of a product: the least of all rounds; of a step: the median
    over_base: float  # time over that of torch's linear, or of the step without adapters
    over_reading: float | str  # time over that of reading the packed bytes, in the same rounds

    def __str__(self) -> str:
        """Return one line for the terminal."""
        size = f", {self.in_features} -> {self.out_features}" if self.matrix == "ops" else ""
        read = f", {self.over_reading:.2f} of reading" if self.over_reading != "" else ""
        time = f"{self.time:8.1f} {self.unit}, {self.over_base:.2f} of base{read}"
        return f"{self.case}{size}: {self.provider:11} {time}"

    def missed(self) -> Iterator[str]:
        """Yield the limits that the row misses."""
        if self.matrix != "ops" or self.provider in ("F.linear", "oneDNN"):
            return
        if self.over_base > MOST_OF_TORCH:
            yield f"{self}: more than {MOST_OF_TORCH} of torch's linear"
        rows = int(self.case.split()[0])
        if rows <= READ_ROWS and float(self.over_reading) > MOST_OF_READING:
            yield f"{self}: more than {MOST_OF_READING} of reading"


class Sweep(NamedTuple):
    """Call with copies of one weight in turn, so that a cache does not hold all of them."""

    call: Call
    weights: int

    @classmethod
    def of(cls, nbytes: int, make: Callable[[], Tensor], call: Callable[[Tensor], Tensor]) -> Sweep:
        """Return the sweep of ``call`` over copies that ``make`` returns."""
        kept = [make() for _ in range(max(1, COLD_BYTES // nbytes))]
        return cls(functools.partial(_all, kept, call), len(kept))


def products(x: Tensor, weight: Tensor) -> dict[str, Sweep]:
    """Return calls by name: products of x with a weight, and calls that read each packed weight."""
    (rows, wide), out, size = x.shape, weight.shape[0], weight.nbytes
    each: dict[str, tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] = {
        "F.linear": (weight, weight, lambda w: F.linear(x, w)),
        "packed": (weight, ops.pack_weight(weight), lambda w: ops.packed_linear(x, w, None, out)),
    }
    if has_onednn(x.dtype):
        each["oneDNN"] = (
            weight,
            torch.ops.mkldnn._reorder_linear_weight(weight, 16),
            lambda w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
        )
    for bits in (8, 4) if wide % GROUP == 0 else ():
        codes = ops.pack_weight(weight, bits=bits, group=GROUP)
        each[f"{bits} bits"] = (
            ops.unpack_weight(codes, out, wide),
            codes,
            lambda w: ops.packed_linear(x, w, None, out),
        )
    found: dict[str, Sweep] = {}
    for name, (plain, kept, call) in each.items():
        peer, exact = F.linear(x, plain.to(x.dtype)), x.double() @ plain.double().t()
        if not (worst := error_over_bound(call(kept), peer, exact)) <= 1:
            case = f"{name}, {rows} rows of {wide} -> {out}"
            raise SystemExit(f"packed_linear: {case}: off by {worst:.2g} times its bound")
        opaque = kept.layout != torch.strided
        nbytes = size if opaque else kept.nbytes
        found[name] = Sweep.of(nbytes, lambda kept=kept: kept.clone(), call)
        if name == "packed" or kept.dtype == torch.uint8:
            words = kept.view(torch.uint8).view(torch.float32)
            read = Sweep.of(nbytes, lambda words=words: words.clone(), torch.sum)
            found[f"{name}, reading"] = read
    return found


def _all(weights: list[Tensor], call: Any) -> None:
    for w in weights:
        call(w)


def bench_ops(dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    """Yield rows with the least time of each product; with one thread, the least processor time."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for wide, out in SHAPES:
        weight = torch.randn(out, wide).to(dtype)
        for rows in ROWS:
            sweeps = products(torch.randn(rows, wide).to(dtype), weight)
            least = dict.fromkeys(sweeps, float("inf"))
            for _ in range(rounds):
                for name, (call, count) in sweeps.items():
                    start = clock()
                    call()
                    least[name] = min(least[name], (clock() - start) / count)
            for name in sweeps:
                if name.endswith("reading"):
                    continue
                own, reading = least[name], least.get(f"{name}, reading")
                yield Row(
                    "ops", f"{rows} rows", name, str(dtype)[6:], wide, out, "us", own * 1e6,
                    own / least["F.linear"], "" if reading is None else own / reading,
                )  # fmt: skip


def bench_widths(dtype: torch.dtype, rounds: int) -> Iterator[str]:
    """Time products with spaced rows relative to torch's, at widths that are no multiples of 32."""
    for wide in WIDTHS:
        weight = torch.randn(4 * wide, wide).to(dtype)
        for rows in WIDE_ROWS:
            x = torch.randn(rows, wide).to(dtype)
            exact = x.double() @ weight.double().t()
            bound = wide * torch.finfo(dtype).eps * exact.abs().max()
            if not (off := (linear(x, weight) - exact).abs().max()) <= bound:
                case = f"{rows} spaced rows of {wide}"
                raise SystemExit(f"packed_linear: {case}: off by {off / bound:.2g} times its bound")
            calls = {
                "torch": OwnTime(functools.partial(F.linear, x, weight)),
                "spaced": OwnTime(functools.partial(linear, x, weight)),
            }
            times = interleaved(calls, rounds, min_seconds=0.02)
            own, spaced = times["torch"], times["spaced"]
            yield (
                f"{wide:5} -> {4 * wide:5}, {rows:3} rows: torch {own.median * 1e6:7.1f} us  "
                f"spaced {spaced.median * 1e6:7.1f} us  {spaced.over(own):.2f} of torch"
            )


def engines(dtype: torch.dtype) -> dict[str, Any]:
    """Return SmolLM2-135M with and without adapters and packed weights; the weights are shared.

    Models whose name ends with "float64" are in float64, without packed weights.
    """
    base = load_smollm2()[0].to(dtype).requires_grad_(False)
    wide = copy.deepcopy(base).double()
    shared = {id(p): p for p in (*base.parameters(), *wide.parameters())}
    adapters = {name: _factors(base, dtype) for name in NAMES}
    pool, wide_pool = (_pool(model, adapters) for model in (base, wide))
    attached, packed, base_packed = (copy.deepcopy(base, dict(shared)) for _ in range(3))
    attached_wide = copy.deepcopy(wide, dict(shared))
    lora_ext.attach(attached, pool)
    lora_ext.attach(packed, pool, pack_base=True)
    lora_ext.attach(attached_wide, wide_pool)
    nn.pack_linears(base_packed)
    return {
        "base": base,
        "base packed": base_packed,
        "lora_ext": attached,
        "packed": packed,
        "base, float64": wide,
        "lora_ext, float64": attached_wide,
    }


def _pool(model: Any, adapters: Mapping[str, Mapping[str, Tensor]]) -> lora_ext.AdapterPool:
    pages = len(NAMES) * RANK // 8
    pool = lora_ext.AdapterPool(
        model, max_slots=len(NAMES), max_rank=RANK, pages=pages, targets=MODULES
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": MODULES}
    for name, factors in adapters.items():
        pool.load(name, (config, {key: t.to(model.dtype) for key, t in factors.items()}))
    return pool


def _factors(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in MODULES:
            out, wide = module.weight.shape
            key = f"base_model.model.{name}.lora_"
            found[key + "A.weight"] = torch.randn(RANK, wide).to(dtype) / wide**0.5
            found[key + "B.weight"] = torch.randn(out, RANK).to(dtype) / 8
    return found


@torch.inference_mode()
def bench_model(
    models: Mapping[str, Any], dtype: torch.dtype, rounds: int
) -> Iterator[tuple[int, dict[str, Timing]]]:
    """Yield rows with the times of decode steps after 32 cached tokens. Each row of a batch has a
    different adapter."""
    for rows in (16, 8, 1):
        tokens = torch.randint(0, 49152, (rows, 33), generator=torch.manual_seed(1))
        steps: dict[str, Call] = {}
        for name, model in models.items():
            # Names are an argument of the call, as in PEFT: a block would apply to both pools.
            engine = "base" if name.startswith("base") else "peft"
            steps[name] = Step(model, tokens, NAMES[:rows], engine, True)
        logits: dict[str, Any] = {name: step() for name, step in steps.items()}
        for name, other in (("packed", "lora_ext"), ("base packed", "base")):
            worst = error_over_bound(logits[name], logits[other], logits[f"{other}, float64"])
            if not worst <= 1:
                case = f"{rows} rows, {name}"
                raise SystemExit(f"packed_linear: {case}: off by {worst:.2g} times its bound")
        each = (logits[name] for name in ("base", "lora_ext", "lora_ext, float64"))
        if not (effect := min(map(error_over_bound, *each))) > 1:
            found = f"expected adapters to change logits by more than the bound, found {effect:.2g}"
            raise SystemExit(f"packed_linear: {rows} rows: {found}")
        steps = {name: step for name, step in steps.items() if "float64" not in name}
        if torch.get_num_threads() == 1:
            steps = {name: OwnTime(step) for name, step in steps.items()}
        yield rows, interleaved(steps, rounds)


def bits_engines(dtype: torch.dtype) -> dict[str, Any]:
    """Return SmolLM2-135M, alone and with adapters over weights of 8 and 4 bits.

    A model whose name ends with "dequantised" has the same weights, without packing.
    """
    base = load_smollm2()[0].to(dtype).requires_grad_(False)
    adapters = {name: _factors(base, dtype) for name in NAMES}
    pool, models = _pool(base, adapters), {"base": base}
    for bits in (8, 4):
        models[f"{bits} bits"] = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        lora_ext.attach(models[f"{bits} bits"], pool, pack_base=bits)
        plain = copy.deepcopy(base)
        plain.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.clone(), False)
        for module in plain.modules():
            if type(module) is torch.nn.Linear:
                weight = module.weight
                packed = ops.pack_weight(weight, bits=bits, group=GROUP)
                weight.copy_(ops.unpack_weight(packed, *weight.shape))
        models[f"{bits} bits, dequantised"] = lora_ext.attach(plain, pool)
    return models


@torch.inference_mode()
def bench_bits(models: Mapping[str, Any], rounds: int) -> Iterator[tuple[int, dict[str, Timing]]]:
    """Check the greedy text of four rows, then yield rows with the times of decode steps."""
    ids = torch.randint(0, 49152, (4, 8), generator=torch.manual_seed(2))
    how: dict[str, Any] = {"max_new_tokens": TEXT_TOKENS, "do_sample": False, "pad_token_id": 0}
    for name in ("8 bits", "4 bits"):
        found, expected = (
            models[each].generate(ids, adapter_names=NAMES[:4], **how)
            for each in (name, f"{name}, dequantised")
        )
        if not torch.equal(found, expected):
            raise SystemExit(f"packed_linear: {name}: text differs from the dequantised model's")
    for rows in (1, 4, 16):
        tokens = torch.randint(0, 49152, (rows, 33), generator=torch.manual_seed(1))
        steps: dict[str, Call] = {
            name: Step(
                models[name], tokens, NAMES[:rows], "base" if name == "base" else "peft", True
            )
            for name in ("base", "8 bits", "4 bits")
        }
        if torch.get_num_threads() == 1:
            steps = {name: OwnTime(step) for name, step in steps.items()}
        yield rows, interleaved(steps, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrix", nargs="+", choices=MATRICES, default=MATRICES[:2])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "bench", help="folder of the csv"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype, missed = getattr(torch, args.dtype), list[str]()

    def keep(row: NamedTuple, name: str = "packed_cpu") -> None:
        columns = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row._asdict().items()}
        append_rows(args.out / f"{name}.csv", [{**machine_columns(), **columns}])
        print(row, flush=True)

    if "ops" in args.matrix:
        with torch.inference_mode():
            for row in bench_ops(dtype, args.rounds):
                keep(row)
                missed += row.missed()
    if "widths" in args.matrix:
        with torch.inference_mode():
            for line in bench_widths(dtype, args.rounds):
                print(line, flush=True)
    if "bits" in args.matrix:
        models = bits_engines(dtype)
        for rows, times in bench_bits(models, args.rounds):
            for row in step_rows("bits", rows, times, args.dtype):
                keep(row)
            for limited, name, under, most in BITS_LIMITS:
                if limited == rows and (over := times[name].over(times[under])) > most:
                    missed.append(f"{rows} rows, {name}: {over:.2f} of {under}, at most {most}")
    if "model" in args.matrix:
        models = engines(dtype)
        print(f"packed copies: {nn.packed_bytes(models['packed']) / 1e6:.0f} MB")
        for rows, times in bench_model(models, dtype, args.rounds):
            for row in step_rows("model", rows, times, args.dtype):
                keep(row)
            if rows > 1 and (over := times["packed"].over(times["base"])) > MOST:
                missed.append(f"{rows} rows, packed: {over:.2f} of base, at most {MOST}")
    if "accuracy" in args.matrix:
        for found in bench_accuracy(*load_smollm2()):
            keep(found, "packed_accuracy")
    if args.check:
        print(*(f"missed: {line}" for line in missed), sep="\n")
    return int(args.check and bool(missed))


def step_rows(matrix: str, rows: int, times: Mapping[str, Timing], dtype: str) -> Iterator[Row]:
    """Yield the rows of decode steps."""
    case = f"decode {rows} rows of {rows} adapters"
    for name, t in times.items():
        over = t.over(times["base"])
        yield Row(matrix, case, name, dtype, "", "", "ms", t.median * 1e3, over, "")


if __name__ == "__main__":
    sys.exit(main())
