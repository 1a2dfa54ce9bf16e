"""Estimate the time of each kernel from its machine code, and compare it with a lower bound.

    python tools/kernel_report.py [--json | --check]

The script writes the part of `docs/gpu.md` between the marks from `kernels.lock`, in which
`sass_gate.py` has recorded numbers of the machine code, so nothing is compiled or disassembled. The
instructions that a warp issues were counted by hand, in code whose length `COUNTED_IN` records.
`--check` compares the page instead of writing it. Below the table, `WHY` explains each row in red.
A red row without a reason is an error, and so is a reason without a red row. Every time is an
ESTIMATE by the model below: no GPU has run a kernel. `gpu_page.py` adds measured columns from
reports of `lora-ext gpu-report`.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import sass_gate

ROOT = Path(__file__).resolve().parents[1]
LOCK, PAGE = ROOT / "kernels.lock", ROOT / "docs/gpu.md"
# RESERVED: bytes of reserved shared memory, which the lock includes.
ARCH, RED, RESERVED = "sm_90a", 2.0, 1024
BEGIN, END = "<!-- kernel_report: begin -->", "<!-- kernel_report: end -->"

# The model of an H100 SXM. Assumed, not measured here.
SMS, CLOCK = 132, 1755.0  # multiprocessors; cycles per us
NULL, L2, DRAM = 2.0, 0.2, 0.55  # us: an empty kernel in a graph, a load from L2, from memory
STREAM, L2_STREAM = 2.7e6, 5.5e6  # bytes per us, of memory and of L2
HANDOFF = 0.3  # us: an empty kernel that starts before the previous kernel ends
STEP = 1.1  # us: one product of a chain in one launch, with its barrier and trips
ISSUE = 0.9  # largest share of a scheduler's cycles that issue an instruction
ALONE = 2.7  # cycles per instruction of a warp without others; from stall counts of leaf and expand
MOST_SHARED = 227 * 1024 - 2048  # most bytes of dynamic shared memory per block
MMA_FLOPS, MMA_CYCLES = 4096, 6.4  # flops and scheduler cycles of one m16n8k16
TENSOR = 798e6  # flops per us, 16 bits


@dataclass(frozen=True)
class Code:
    """Numbers that ``kernels.lock`` records for a kernel."""

    registers: int
    shared: int
    inflight: tuple[int, ...]  # bytes per thread, for each main loop
    trips: int | None
    mma_share: float | None
    each: float | None  # instructions per element
    dependent: bool = False  # contains the wait for the previous launch
    dynamic: int = 0  # bytes of dynamic shared memory, from kernels.toml
    length: int = 0  # instructions of the machine code
    turn: int | None = None  # serial memory trips per iteration of the outermost loop

    def per_multiprocessor(self, threads: int) -> int:
        """Return the number of blocks of ``threads`` threads that fit on a multiprocessor."""
        static = self.shared - RESERVED if self.shared else 0
        return sass_gate.blocks_per_multiprocessor(self.registers, threads, static + self.dynamic)


@dataclass(frozen=True)
class Case:
    """Kernel at one shape, with the numbers of one launch from which its time is estimated.

    `bytes` must be moved. `parts` are further bytes, for sums that several blocks share. ``flops``
    are computed on tensor cores, each as ``products`` products of 16 bits. ``blocks`` of
    ``threads`` are launched and read ``l2`` bytes again from L2.

    ``way`` contains pairs: a number of instructions, and how often each warp issues them. They were
    counted in code of the length in `COUNTED_IN`. A warp that runs alone takes `alone` cycles per
    instruction. Without a way, only the main loop's instructions for ``values`` values are counted.
    The outermost loop runs ``turns`` iterations, each of which waits for its loads.

    An empty launch takes ``handoff`` us after the previous launch of the call; a dependent launch
    may start before the previous one ends. ``others`` are further launches of the same call.

    A chain has `repeat` launches, one after the other, and also `repeat` launches of each case in
    `beside`. A launch may have several `steps`, whose blocks wait for each other, make `hops` trips
    to L2, and run `once` instructions per warp outside the main loop. `loop` is the index of the
    main loop that takes the time, if other loops are fallbacks; by default it is the one with the
    fewest bytes in flight.
    """

    kernel: str
    shape: str
    bytes: float
    blocks: int
    threads: int
    parts: float = 0
    values: float = 0
    flops: float = 0
    products: int = 1
    l2: float = 0
    repeat: int = 1
    steps: int = 1
    once: int = 0
    hops: int = 0
    loop: int | None = None
    beside: tuple[Case, ...] = ()
    way: tuple[tuple[int, float], ...] = ()
    alone: float = ALONE
    turns: int = 1
    handoff: float = NULL
    others: tuple[Case, ...] = ()

    @property
    def issued(self) -> float:
        """Number of instructions that each warp issues."""
        return sum(count * times for count, times in self.way)

    @property
    def launches(self) -> tuple[Case, ...]:
        return (self, *self.beside, *self.others)


def read_lock(text: str, rules: Sequence[Mapping[str, Any]] = ()) -> dict[str, Code]:
    """Return the kernels of one architecture by name; ``rules`` describe the launches."""
    found = {}
    for line in text.splitlines():
        row = re.match(rf"{ARCH}\s+((?:\d+\s+){{14}})\s*(.*?)  inflight (\S+)(.*)$", line)
        if row is None:
            continue
        numbers = [int(n) for n in row[1].split()]
        costs = {key: float(value) for key, value in re.findall(r"  (\w+) ([\d.]+)", row[4])}
        flights = [int(n) for n in row[3].split("/") if n != "-"]
        trips = costs.get("trips")
        found[row[2]] = Code(
            numbers[0],
            numbers[1],
            tuple(flights),
            None if trips is None else int(trips),
            costs.get("mma"),
            costs.get("each"),
            numbers[13] > 0,
            most_of(rules, row[2], "dynamic_shared"),
            numbers[2],
            int(costs["turn"]) if "turn" in costs else None,
        )
    return found


def most_of(rules: Sequence[Mapping[str, Any]], kernel: str, key: str) -> int:
    """Return the largest number under ``key`` in the rules for a kernel, or 0."""
    own = (rule for rule in rules if fnmatch.fnmatchcase(kernel, rule["match"]))
    return max((rule.get(key, 0) for rule in own), default=0)


# --- shapes ---------------------------------------------------------------------------------------
# Decode: rows, adapters, in, out, rank.
DECODE = {
    "D1": (1, 1, 4096, 4096, 16),
    "D2": (16, 16, 4096, 4096, 16),
    "D3": (32, 8, 4096, 6144, 16),
    "D4": (64, 64, 4096, 28672, 16),
    "D5": (64, 64, 4096, 4096, 64),
    "D6": (256, 64, 14336, 4096, 32),
    "D7": (256, 1, 4096, 4096, 16),
    "D8": (256, 32, 4096, 4096, 8),
}
# A block of an 8B model: in-features, and out-features of the layers that share the input.
BLOCK = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))
LAYERS = 32
STEP_SAID = "a captured step of an 8B model, its updates alone: 64 rows, rank 16, adapters: "
BF16 = "__nv_bfloat16"


def decode_outputs(rows: int, tiles: int, outputs: Sequence[int]) -> int:
    """Return the number of outputs per block at decode, like ``decode_outputs`` in
    lora_expand.cu."""

    def time(each: int) -> int:
        blocks = [n * sum(ceil(o / each) for o in outputs) for n in (tiles, ceil(rows / 16))]
        return sum(ceil(n / (5 * SMS)) * (4 + each // 128) for n in blocks)

    return min((128, 256, 512, 1024), key=time)


def decode_pair(
    rows: int,
    slots: int,
    i: int,
    outputs: Sequence[int],
    rank: int,
    said: str,
    float8: bool = False,
) -> tuple[Case, Case]:
    """Return the cases of shrink and expand for up to 256 rows, of modules with the same input.

    With ``float8``, a number of a page has one byte, and pages have scales. More instructions widen
    the numbers and read the scales.
    """
    pages_in, size, wider, scales = ("Float8BF16", 1, 171, 61) if float8 else (BF16, 2, 0, 0)
    tiles, tile_rows = slots * ceil(rows / slots / 16), min(16, ceil(rows / slots))
    pages, blocks_of_ranks = min(4, ceil(rank / 8)), ceil(rank / 32)
    width = ceil(i / min(16, ceil(i / 512)) / 256) * 256  # in-features of a split
    splits = ceil(i / width)
    v = 4 * rows * rank * splits * len(outputs)
    # The second argument is the largest number of chunks that a plan can have.
    each = decode_outputs(rows, rows // 16 + min(rows, slots), outputs)
    steps = each // 128
    modules = 1 if len(outputs) == 1 else 8
    if modules == 1:
        before, turn, last = 286, (129 if pages <= 2 else 98) + wider, 37
        head = 589 + scales
    else:
        before, turn, last = 300, (129 if pages <= 2 else 98) + wider, 41
        head = 588 + scales
    step = 105 if tile_rows > 8 else 84  # with at most eight rows, a step has no second store
    step += 80 if float8 else 0
    # A step has one product per block of ranks, plus instructions for y and for the step itself.
    if blocks_of_ranks > 1:
        product = 190 if float8 else 107
        head, step = head + 224 * (blocks_of_ranks - 1), product * blocks_of_ranks + 78
    shrink = Case(
        f"lora_shrink_decode_kernel<{pages_in}, true, {modules}>",
        said,
        size * slots * rank * i * len(outputs) + 2 * rows * i + v,
        tiles * splits * ceil(rank / 32) * len(outputs),
        128,
        flops=2 * 16 * tiles * max(8, rank) * i * len(outputs),
        way=(
            (before, 1),
            (turn, ceil(width / (512 if pages <= 2 else 256))),
            (92, 1),
            (last, ceil(tile_rows / 4)),
        ),
        handoff=HANDOFF,
    )
    expand = Case(
        f"lora_expand_kernel<{pages_in}, true, 1, 4, {modules}, {str(float8).lower()}>",
        said,
        sum(size * slots * rank * o + 4 * rows * o for o in outputs) + v,
        tiles * sum(ceil(o / each) for o in outputs),
        128,
        flops=2 * 2 * 16 * tiles * max(32, rank) * sum(outputs),
        way=((head, 1), (step, steps)),
        turns=steps if blocks_of_ranks > 1 else ceil(steps / 2),
        handoff=HANDOFF,
    )
    return shrink, expand


def decode_cases() -> Iterator[Case]:
    """Yield cases of shrink and expand: ``lora_apply_`` up to 256 rows, and a captured step."""
    for name, (rows, slots, i, o, rank) in DECODE.items():
        said = f"{name}: {rows} rows, {slots} adapters, {i} to {o}, rank {rank}"
        yield from decode_pair(rows, slots, i, (o,), rank, said)
    for slots, float8 in ((1, False), (64, False), (64, True)):
        said = f"{STEP_SAID}{slots}{', pages of float8' * float8}"
        first, *others = (
            case
            for i, outputs in BLOCK
            for case in decode_pair(64, slots, i, outputs, 16, said, float8)
        )
        yield replace(first, repeat=LAYERS, beside=tuple(others))


def large_cases() -> Iterator[Case]:
    """Yield cases of the kernels of training and of large ranks."""
    rows, width, rank = 8192, 4096, 16
    shape = f"{rows} rows, {width} features, rank {rank}"
    x = 2 * rows * width
    yield Case(  # blocks of 64 rows and four bands of 128 columns
        f"lora_train_input_kernel<{BF16}, false>",
        shape,
        2 * x + 2 * rank * width + 4 * rank * rows,  # dx is read and written
        rows // 64 * ceil(width / 512),
        256,
        flops=2 * rows * width * max(32, rank) * 2,
        way=((890, 1), (1179, 4)),
    )
    shrink = Case(  # 128 rows, 512 columns
        f"lora_shrink_kernel<{BF16}, 128, false>",
        f"prefill and training: {shape}",
        x + 2 * rank * width,
        rows // 128 * ceil(width / 512),
        128,
        parts=4 * rank * rows * ceil(width / 512),
        flops=2 * rows * width * rank,
        way=((2181, 1), (1044, 8), (819, 1)),
    )
    expand = Case(  # 128 rows, 512 outputs, 32 of them in a step
        f"lora_expand_kernel<{BF16}, true, 8, 1, 1, false>",
        f"prefill: {shape}",
        2 * x + 2 * rank * width + 4 * rank * rows,
        rows // 128 * ceil(width / 512),
        256,
        flops=2 * 2 * rows * width * max(32, rank),
        way=((929, 1), (221, 8)),
        turns=8,
        handoff=HANDOFF,
    )
    reduce = Case(  # eight splits of v; a block has 16 rows
        "lora_reduce_kernel",
        "",
        4 * rank * rows,
        rows // 16 + 1,
        128,
        parts=4 * rank * rows * 8,
        way=((285, 1), (242, 1)),
        handoff=HANDOFF,
    )
    yield from (shrink, expand)
    said = f"prefill, the three launches of `lora_apply_`: {shape}"
    yield replace(shrink, shape=said, beside=(reduce, expand))
    # A block has 512 columns and a range of rows. With dv, slices of columns are summed as well.
    weights_ways = {
        (2, 2): ((654, 1), (524, 16), (2656, 1)),
        (2, 3): ((808, 1), (503, 16), (2668, 1)),
        (8, 2): ((705, 1), (832, 32), (2793, 1)),
        (8, 3): ((930, 1), (843, 32), (2802, 1)),
    }
    for width, rank, pages, ranges, slices in ((4096, 16, 2, 16, 16), (14336, 64, 8, 8, 28)):
        sums = Case(
            f"lora_train_weights_reduce_kernel<{BF16}, {pages}>",
            "",
            0,
            4 * ceil(width / 512),
            256,
            parts=4 * rank * width * ranges,
        )
        sums_of_dv = Case(
            "lora_train_project_reduce_kernel",
            "",
            0,
            rows // 16 + 1,
            128,
            parts=4 * rank * rows * (slices + 1),
        )
        for form, passes in (("false", 2), ("true", 3)):
            what = "da" if passes == 2 else "db and dv"
            yield Case(
                f"lora_train_weights_kernel<{BF16}, {pages}, {form}>",
                f"{what}: {rows} rows, {width} features, rank {rank}",
                2 * rows * width + 2 * rank * width * (passes - 1),
                ranges * ceil(width / 512),
                256,
                parts=4 * rank * (width * ranges + (rows * slices if passes == 3 else 0)),
                flops=2 * rows * width * rank * passes,
                way=weights_ways[pages, passes],
                others=(sums,) if passes == 2 else (sums, sums_of_dv),
            )
    width, rank = 4096, 1024
    gemm_ways = {0: ((1617, 1), (660, 64), (1368, 1)), 2: ((1537, 1), (809, 32), (402, 4))}
    for product, what in ((0, "shrink"), (2, "expand")):
        yield Case(
            f"lora_gemm_kernel<{BF16}, (Product){product}, 128>",
            f"{what}: {rows} rows, {width} features, rank {rank}",
            (1 if what == "shrink" else 2) * x + 2 * rank * width + 4 * rows * rank,
            ceil(rows / 128) * ceil((rank if what == "shrink" else width) / 128),
            128,
            flops=2 * rows * width * rank * (1 if what == "shrink" else 2),
            way=gemm_ways[product],
        )


def circuit_cases() -> Iterator[Case]:
    """Yield the kernels of circuits with parameters from a network, and related ones."""
    rows = 1024 * 8 * 32
    yield Case(
        f"circuit_leaf_kernel<{BF16}>",
        "CP, 8 tokens, 32 states, 320 words, batch 1024",
        2 * rows * 320,
        rows // 32,  # eight lanes per row; each reads its five pieces two at a time
        256,
        way=((235, 1), (141, 2), (83, 1)),
    )
    values = 8192 * 7 * 32 * 32
    # A matrix has 1,024 elements, 32 per lane. A step waits for its norms and its leaf. The pairs
    # of `way` are norms, probabilities, iterations of the loops over columns (backward: rows and
    # columns), and the rest, which is the shortest path through 12 loops over a lane's states.
    for kernel, each, way in (
        ("scan", 1, ((273, 7), (226, 7), (27, 4 * 7), (580, 7))),
        ("scan_backward", 2, ((273, 7), (225, 7), (65, 16 * 7), (750, 7))),
    ):
        yield Case(
            f"circuit_{kernel}_kernel<{BF16}, WarpTeam>",
            "HMM, 8 tokens, 32 states, batch 8192",
            2 * values * each,
            8192 // 4,
            128,
            way=way,
            alone=4.0,
            turns=2 * 7 + 1,
        )
    yield from walk_cases()
    yield from packed_cases()
    values = 33 * 320
    yield Case(
        f"spec_verify_kernel<{BF16}>",
        "one row, 32 states, 320 words",
        2 * values,
        1,
        256,
        way=((1960, 1),),
        alone=4.0,
    )
    yield from verify_cases(131072)
    values = 8192 * 4096 * 4
    yield Case(
        f"depth_mix_kernel<{BF16}, {BF16}, false>",
        "8192 rows, 4096 features, four depths",
        2 * values * 1.25,
        8192,
        256,
        way=((94, 1), (392, 4)),  # with LayerNorm and beta
        alone=3.2,
    )
    values = 8192 * 8192
    for kernel in ("update", "gradient"):
        yield Case(
            f"cross_entropy_{kernel}_kernel<{BF16}, false>",
            "8192 rows, a piece of 8192 words",
            2 * values * (1 if kernel == "update" else 2),
            8192,
            256,
            values=values,
        )
    values = 4096 * 1024 * 8
    yield Case(
        f"log_sum_rows_kernel<{BF16}>",
        "4096 rows, 8 nodes of 1024 inputs",
        2 * values,
        4096,
        256,
        values=values,
        loop=0,
    )


def walk_cases() -> Iterator[Case]:
    """Yield the kernels in which one block processes a row position by position, and row attention.

    A way contains the norms of a warp's rows, then eight positions, without code for unaligned
    rows. The loop over the columns of a step runs four iterations, other loops run one.
    """
    said = "HMM, one row, 8 tokens, 32 states, 320 words"
    bytes_ = 8 * 32 * 320 * 2 + 7 * 32 * 32 * 2
    for kernel, threads, way, alone in (
        ("circuit_sample_kernel<{}, WarpTeam>", 512, ((413, 4), (2601, 8)), 4.7),
        (
            "circuit_conditional_dist_kernel<{}, WarpTeam>",
            512,
            ((413, 4), (1429, 8), (548, 2)),
            5.0,
        ),
        ("circuit_argmax_kernel<{}>", 256, ((486, 8), (897, 8), (305, 1)), 3.5),
    ):
        yield Case(kernel.format(BF16), said, bytes_, 1, threads, way=way, alone=alone)
    prompts, rows, heads, width = 4, 1024, 32, 128
    yield Case(  # a block has 32 rows; a warp issues 5,013 instructions for each 32 of their keys
        f"row_attention_kernel<{BF16}, 4>",
        f"{prompts} causal prompts of {rows} tokens, {heads} heads of {width}",
        2 * 4 * prompts * rows * heads * width,
        prompts * heads * ceil(rows / 32),
        128,
        flops=2 * 2 * prompts * heads * rows * rows / 2 * width,
        way=((5013, (rows / 32 + 1) / 2),),
        alone=2.2,
    )


def packed_cases() -> Iterator[Case]:
    """Yield cases of products with packed weights of 8 and 4 bits, group 64.

    A slice has eight chunks of 32 in-features. Rows are padded to 8 or 32.
    """
    width, out = 4096, 4096
    for rows, bits, way in (
        (1, 8, ((159, 1), (120, 8), (202, 1))),
        (1, 4, ((187, 1), (102, 8), (202, 1))),
        (64, 8, ((203, 1), (165, 8), (100, 2))),
    ):
        few, codes = rows <= 8, width * out * bits // 8 + width * out // 64 * 2
        x, y = 2 * rows * width, 2 * rows * out
        parts = 0 if few else 4 * 4 * rows * out
        sums = Case(
            f"packed_linear_sum_kernel<{BF16}>",
            "",
            0,
            ceil(out / 512) * rows,
            128,
            parts=parts + y,
            way=((130, 1),),
            handoff=HANDOFF,
        )
        yield Case(
            f"packed_linear_kernel<{BF16}, {bits}, false, {1 if few else 4}>",
            f"{rows} row{'s' * (rows > 1)}, {width} to {out}, {bits} bits, group 64",
            codes + x + y,
            # Two blocks of 32 rows share four panels, of which a block computes a part of four.
            out // 32 if few else 2 * 4 * (out // 128),
            512,
            parts=parts,
            flops=2 * max(8, rows) * width * out,
            l2=x * (out // 32 if few else out // 128) + (1 if few else 2) * codes,
            way=way,
            beside=() if few else (sums,),
        )


def verify_cases(words: int) -> Iterator[Case]:
    """Yield launches of ``spec_verify`` for one row with eight drafted tokens and 32 states.

    The vocabulary has ``words`` tokens, too many for one block. The cases are three of the four
    kernels, each alone, and then all four together.
    """
    spans = ceil(words / 2048)
    launches: list[Case] = []
    for kernel, values, bytes_, blocks in (
        ("target", 9 * words, 18 * words, ceil(9 * spans / 8)),
        ("leaves", 32 * words, 64 * words, ceil(32 * spans / 8)),
        ("weights", 32 * words, 70 * words, ceil(words / 512)),
    ):
        launches.append(
            Case(
                f"verify_{kernel}_kernel<{BF16}>",
                f"spec_verify: one row, 8 tokens, 32 states, {words} words",
                bytes_,
                blocks,
                256,
                values=values,
                handoff=HANDOFF if launches else NULL,
            )
        )
    yield from launches
    pick = Case(  # two searches of two trips each
        "verify_pick_kernel", "", 0, 1, 32, way=((834, 1),), alone=5.5, turns=5, handoff=HANDOFF
    )
    said = launches[0].shape.replace("spec_verify:", "the four launches of spec_verify:")
    yield replace(launches[0], shape=said, beside=(*launches[1:], pick))


# --- whole circuits: a chain whose stages go to tensor cores --------------------------------------
PRODUCTS = {3: 6, 2: 3, 1: 1}  # number of products of parts, by parts per number
PRECISIONS = {3: "fp32", 2: "high", 1: "fp16s"}


def layers_product(product: int, parts: int, sizes: tuple[int, int, int], out: float) -> Case:
    """Return one product of a stage, (rows, columns, k), that writes ``out`` bytes."""
    rows, columns, k = sizes
    large = 4 * ceil(rows / 128) * ceil(columns / 64) >= 3 * SMS  # as launch_parts chooses
    tile = (128, 64) if large else (64, 32)
    blocks = ceil(rows / tile[0]) * ceil(columns / tile[1])
    return Case(
        f"layers_product_kernel<(LayersProduct){product}, {parts}, {str(large).lower()}>",
        "",
        out,
        blocks,
        128,
        flops=2 * rows * columns * k,
        products=PRODUCTS[parts],
        l2=blocks * sum(tile) * k * 2 * parts,
        handoff=HANDOFF,
    )


def layers_run(parts: int, states: int, batch: int, steps: int) -> Case | None:
    """Return the case of a chain in one launch; None if 64 rows of weights exceed shared memory."""
    step, blocks = 64 if parts == 1 else 32, ceil(states / 64) * ceil(batch / 32)
    ring = 4 * 32 * step * 2 * parts
    if ring + ceil(states / 64) * (64 * 64 * 2 * parts + 128) > MOST_SHARED:
        return None
    values = states * batch
    return Case(
        f"layers_run_kernel<{parts}>",
        "",
        8 * values,  # leaves, and sums
        blocks,
        128,
        flops=2 * values * states,
        products=PRODUCTS[parts],
        l2=blocks * states * 2 * parts * (32 + 64 / steps) + values * (8 + 2 * parts),
        steps=steps,
        hops=2,  # for a node's part and children; the node itself is loaded while blocks wait
        once=1600,  # counted: 16 numbers per thread, each with an exponential and a logarithm
    )


def layers_cases() -> Iterator[Case]:
    """Yield cases of ``circuit_layers`` of a homogeneous HMM: each forward, and the backward."""
    batch, steps = 512, 31
    outside, turn = {1: 327, 2: 356, 3: 361}, {1: 309, 2: 370, 3: 435}  # of `layers_weights_kernel`
    for states in (512, 2048):
        shape = f"HMM of {states} states, 32 steps, batch {batch}, "
        values = states * batch
        lanes = batch // 16
        leaves = (steps + 1) * values
        copy = Case(  # rows of leaves become lanes
            "layers_leaves_kernel",
            "",
            0,
            leaves // 256,
            256,
            parts=8 * leaves,
            way=((72, 1),),
            alone=4.7,
        )

        def scale(parts: int, states: int = states) -> Case:
            return Case(
                f"layers_weights_kernel<{parts}>",
                "",
                0,
                states // 4,
                128,
                parts=(4 + 2 * parts) * states**2,
                way=((outside[parts], 1), (turn[parts], states // 512)),
            )

        def terms(parts: int, down: bool, values: int = values, lanes: int = lanes) -> Case:
            return Case(
                f"layers_terms_kernel<{parts}, {str(down).lower()}>",
                "",
                4 * values,
                lanes * 4,
                256,
                values=values * (7 if down else 5),  # four blocks compute each maximum
                l2=values * (32 + 2 * parts + (14 if down else 0)),
                handoff=HANDOFF,
            )

        for parts, precision in PRECISIONS.items():
            run = layers_run(parts, states, batch, steps)
            if run is not None:
                yield replace(
                    run, shape=shape + f"forward, {precision}", others=(scale(parts), copy)
                )
                continue
            up = layers_product(0, parts, (states, batch, states), 4 * values)
            yield replace(
                up,
                shape=shape + f"forward, {precision}",
                repeat=steps,
                beside=(terms(parts, False),),
                others=(scale(parts), copy),
            )
        down = layers_product(1, 3, (states, batch, states), 4 * values)
        weights = layers_product(2, 3, (states, states, batch), 8 * states * states)
        children = Case(
            "layers_children_kernel", "", 20 * values, lanes * states // 16, 256, handoff=HANDOFF
        )
        roots = Case("layers_roots_kernel", "", 0, ceil(batch / 256), 256, way=((121, 1),))
        owed = Case("layers_owed_kernel", "", 0, states, 128, way=((1314, 1),), alone=3.6)
        yield replace(
            down,
            shape=shape + "backward",
            repeat=steps,
            beside=(
                terms(3, True),
                replace(weights, bytes=0, l2=weights.l2 + weights.bytes),
                children,
            ),
            others=(scale(3), roots, owed),
        )


# Length of the machine code in which the ways of cases were counted. If it changes, count again.
COUNTED_IN = {
    f"lora_shrink_decode_kernel<{BF16}, true, 1>": 1032,
    f"lora_shrink_decode_kernel<{BF16}, true, 8>": 1128,
    f"lora_expand_kernel<{BF16}, true, 1, 4, 1, false>": 1544,
    f"lora_expand_kernel<{BF16}, true, 1, 4, 8, false>": 1528,
    f"lora_expand_kernel<{BF16}, true, 8, 1, 1, false>": 1608,
    "lora_shrink_decode_kernel<Float8BF16, true, 1>": 1384,
    "lora_shrink_decode_kernel<Float8BF16, true, 8>": 1456,
    "lora_expand_kernel<Float8BF16, true, 1, 4, 1, true>": 1776,
    "lora_expand_kernel<Float8BF16, true, 1, 4, 8, true>": 1776,
    # The next two and the gemm were counted in code without a mask's column, which has 8
    # instructions fewer.
    f"lora_train_input_kernel<{BF16}, false>": 2224,
    f"lora_shrink_kernel<{BF16}, 128, false>": 4160,
    "lora_reduce_kernel": 616,
    f"lora_train_weights_kernel<{BF16}, 2, false>": 3928,
    f"lora_train_weights_kernel<{BF16}, 2, true>": 4072,
    f"lora_train_weights_kernel<{BF16}, 8, false>": 4424,
    f"lora_train_weights_kernel<{BF16}, 8, true>": 4672,
    f"lora_gemm_kernel<{BF16}, (Product)0, 128>": 3720,
    f"lora_gemm_kernel<{BF16}, (Product)2, 128>": 2728,
    f"circuit_leaf_kernel<{BF16}>": 496,
    f"circuit_scan_kernel<{BF16}, WarpTeam>": 11016,
    f"circuit_scan_backward_kernel<{BF16}, WarpTeam>": 12072,
    f"circuit_sample_kernel<{BF16}, WarpTeam>": 12592,
    f"circuit_conditional_dist_kernel<{BF16}, WarpTeam>": 12080,
    f"circuit_argmax_kernel<{BF16}>": 5264,
    f"row_attention_kernel<{BF16}, 4>": 3552,
    f"packed_linear_kernel<{BF16}, 8, false, 1>": 496,
    f"packed_linear_kernel<{BF16}, 4, false, 1>": 504,
    f"packed_linear_kernel<{BF16}, 8, false, 4>": 528,
    f"packed_linear_sum_kernel<{BF16}>": 144,
    f"spec_verify_kernel<{BF16}>": 3824,
    "verify_pick_kernel": 944,
    f"depth_mix_kernel<{BF16}, {BF16}, false>": 688,
    "layers_leaves_kernel": 240,
    "layers_weights_kernel<1>": 864,
    "layers_weights_kernel<2>": 968,
    "layers_weights_kernel<3>": 1056,
    "layers_roots_kernel": 216,
    "layers_owed_kernel": 1648,
}

CASES = [*decode_cases(), *large_cases(), *circuit_cases(), *layers_cases()]


# --- the model ------------------------------------------------------------------------------------
def floor_us(case: Case) -> float:
    """Return the lower bound of the time, called the floor, in us.

    The floor is the largest of three times: for moving the bytes, for computing the products, and
    for an empty launch (in a chain, the barrier of a step).
    """
    each = (case, *case.beside)
    rounds = case.repeat * case.steps
    least = NULL if rounds == 1 else STEP * sum(one.flops > 0 for one in each)
    total = sum(one.bytes for one in each) / STREAM, sum(one.flops for one in each) / TENSOR
    return rounds * max(least, *total)


def launch_us(case: Case, code: Code) -> float:
    """Return the time of one launch on the multiprocessors that have a block.

    The time is the sum of an empty launch, the loads before the first wide load, that load, and the
    slowest of memory, instructions, tensor cores, and warps that wait for their own instructions
    and loads (``alone``).
    """
    sms = min(SMS, case.blocks)
    per_sm = code.per_multiprocessor(case.threads)
    resident = min(per_sm, ceil(case.blocks / SMS)) * case.threads
    inflight = min(code.inflight, default=0) if case.loop is None else code.inflight[case.loop]
    rate = min(STREAM, sms * resident * (inflight or 16) / DRAM)
    cycles = sms * 4 * CLOCK
    issued = case.issued * case.blocks * case.threads / 32
    issue = (issued or case.values * (code.each or 0) / 32) / cycles / ISSUE
    mma = 0.0
    if case.flops and code.mma_share:
        count = case.flops * case.products / MMA_FLOPS
        each = MMA_CYCLES if case.way else max(MMA_CYCLES, 100 / code.mma_share)
        mma = count * each / cycles
    waves = max(1.0, case.blocks / (SMS * per_sm))
    trips = (case.turns - 1) * (code.turn or 1)
    alone = waves * (case.issued * case.alone / CLOCK + trips * DRAM)
    slowest = max((case.bytes + case.parts) / rate, case.l2 / L2_STREAM, issue, mma, alone)
    if case.steps > 1:
        slowest = case.steps * (STEP + case.hops * L2 + case.once / CLOCK + slowest)
    return NULL + (code.trips or 0) * L2 + DRAM + slowest


def estimate_us(case: Case, lock: Mapping[str, Code]) -> float:
    """Return the time of all launches of a call, one after the other.

    A launch overlaps the previous one only if its code contains the wait for that launch.
    """
    total = 0.0
    for one in (case, *case.beside):
        code = code_of(one, lock)
        total += launch_us(one, code)
        if case.beside and code.dependent:
            total -= NULL - one.handoff
    return case.repeat * total + sum(launch_us(one, code_of(one, lock)) for one in case.others)


def code_of(case: Case, lock: Mapping[str, Code]) -> Code:
    """Return the numbers that ``kernels.lock`` records for the kernel of a case."""
    if case.kernel not in lock:
        raise SystemExit(f"kernel_report: kernels.lock has no {case.kernel}")
    code = lock[case.kernel]
    if case.way and code.length != COUNTED_IN.get(case.kernel):
        raise SystemExit(
            f"kernel_report: {case.kernel}: expected {COUNTED_IN.get(case.kernel)} instructions, "
            f"as when they were counted, found {code.length}; count again"
        )
    return code


def counted(case: Case, code: Code) -> str:
    """Return a text with the instruction count from which the time of a case is estimated."""
    if case.way:
        return " + ".join(
            f"{count}" if times == 1 else f"{times:g} x {count}" for count, times in case.way
        )
    if case.values and code.each:
        return f"{code.each:g} per value"
    return f"{100 / code.mma_share:.1f} per product" if code.mma_share else ""


def rows(lock: Mapping[str, Code], cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """Return one object per kernel and shape; a number that does not apply is None."""
    found = []
    for case in cases:
        code = code_of(case, lock)
        estimate, floor = round(estimate_us(case, lock), 1), round(floor_us(case), 1)
        found.append(
            {
                "name": case.kernel,
                "shape": case.shape,
                "estimate_us": estimate,
                "floor_us": floor,
                "ratio": round(estimate / floor, 2),
                "trips": code.trips,
                "mma_share": code.mma_share,
                "instructions_per_element": code.each,
                "instructions": counted(case, code),
                "bytes": round(
                    case.repeat * case.steps * sum(one.bytes for one in (case, *case.beside))
                ),
                "registers": code.registers,
                "blocks_per_sm": code.per_multiprocessor(case.threads),
            }
        )
    return found


# --- reasons --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reason:
    """Reason why the ratios of some rows are above ``RED``; kernel and shape are shell patterns."""

    kernel: str
    shape: str
    said_of: str
    text: str

    def speaks_of(self, row: Mapping[str, Any]) -> bool:
        return fnmatch.fnmatchcase(row["name"], self.kernel) and fnmatch.fnmatchcase(
            row["shape"], self.shape
        )


WHY = [
    Reason(
        "lora_expand_kernel<*",
        "D[2378]: *",
        "Expand of D2, D3, D7, D8",
        "a warp issues 589 instructions before its first step and 84 to 105 for each step of 128 "
        "outputs of the block. After its shrink, expand takes 1.7 us less.",
    ),
    Reason(
        "lora_shrink_decode_kernel<*",
        "D8: *",
        "Shrink of D8",
        "an empty launch, the memory trips, the first load and a warp's 581 instructions follow "
        "one another; the floor is an empty launch.",
    ),
    Reason(
        "lora_shrink_decode_kernel<*",
        "a captured step*: 1",
        "The captured step with one adapter",
        "the 256 launches take 320 us to start, find their rows and load once, 280 for a warp's "
        "instructions, and 59 for bytes of y. A shrink waits for the previous kernel, which may "
        "write the plan (51 us). The floor has 1.1 us per launch.",
    ),
    Reason(
        "lora_gemm_kernel<*",
        "expand: *",
        "Expand of rank 1024",
        "v in two parts costs two products each, and two warps per scheduler do not hide the "
        "latency of their instructions.",
    ),
    Reason(
        "circuit_scan*_kernel<*",
        "*",
        "`circuit_scan_kernel` and its backward",
        "a step costs 580 instructions (backward 750) plus 19 (48) per element of its matrix, and "
        "waits for two memory trips; four warps per scheduler (three) do not hide these.",
    ),
    Reason(
        "circuit_*",
        "HMM, one row, *",
        "`circuit_sample_kernel`, `circuit_conditional_dist_kernel`, `circuit_argmax_kernel`",
        "one block processes the eight positions of a row one after the other; the floor is an "
        "empty launch. The counted path is the one that loads most, so a row may take less time.",
    ),
    Reason(
        "row_attention_kernel<*",
        "*",
        "`row_attention_kernel`",
        "it does not use tensor cores: 32 keys cost a warp of eight rows 5,013 instructions, 3,072 "
        "of them multiply-adds. Its reads of shared memory take nearly as long. The floor assumes "
        "that tensor cores compute the products.",
    ),
    Reason(
        "packed_linear_kernel<*",
        "64 rows, *",
        "`packed_linear_kernel` of 64 rows",
        "two blocks of 32 rows each read and widen the codes, one of them from L2, and a second "
        "launch adds the parts of the sums. The floor counts only the bytes read from memory.",
    ),
    Reason(
        "spec_verify_kernel<*",
        "*",
        "`spec_verify_kernel`",
        "one block processes a row with nine serial memory trips and 1,960 instructions per warp; "
        "the floor is an empty launch.",
    ),
    Reason(
        "verify_target_kernel<*",
        "the four launches*",
        "The four launches of `spec_verify`",
        "the floor counts only the bytes; each launch waits for the previous one, and the last "
        "one is a single warp that searches sums twice.",
    ),
    Reason(
        "verify_leaves_kernel<*",
        "*",
        "`verify_leaves_kernel`",
        "three of its five memory trips overlap the end of `verify_target_kernel`, but the "
        "estimate counts them in full.",
    ),
    Reason(
        "layers_product_kernel<*",
        "HMM of * states, *",
        "Chains of launches",
        "a step takes two launches forward and four backward. A float32 number takes six products "
        "and six bytes, a `high` one three products and four bytes; the floor assumes one 16-bit "
        "product.",
    ),
    Reason(
        "layers_run_kernel<*",
        "*",
        "Chains in one launch",
        "float32 costs six 16-bit products, 2.8 us per step; `high` costs three. A step also takes "
        "1.1 us for its barrier, 0.4 to read its node, and 0.9 for exponentials and logarithms; "
        "of these, the floor contains only the barrier.",
    ),
]


def reasons(found: Sequence[Mapping[str, Any]], why: Sequence[Reason] = WHY) -> str:
    """Return the list of reasons; raise if a red row has no reason, or a reason has no red row."""
    red = [row for row in found if row["ratio"] > RED]
    for row in red:
        if not any(reason.speaks_of(row) for reason in why):
            raise SystemExit(
                f"kernel_report: {row['name']} ({row['shape']}) is {row['ratio']} times its floor, "
                "and no entry of WHY explains it"
            )
    for reason in why:
        if not any(map(reason.speaks_of, red)):
            raise SystemExit(f"kernel_report: WHY explains {reason.said_of}, but no row is red")
    lines = [wrapped(f"* {reason.said_of}: {reason.text}") for reason in why]
    return "\n".join(["Reasons for the red ratios:", "", *lines])


def wrapped(item: str) -> str:
    """Return a list item, wrapped at the width of the pages."""
    return textwrap.fill(
        item, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


# --- the page -------------------------------------------------------------------------------------
def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table; ratios above ``RED`` are red."""
    lines = [
        "| kernel | shape | MB | estimate, us | floor, us | ratio | trips | mma, % "
        "| instructions | registers | blocks per SM |",
        "|---" * 11 + "|",
    ]
    for row in found:
        name = row["name"].replace(BF16, "bf16")
        ratio = f"{row['ratio']:.1f}"
        if row["ratio"] > RED:
            ratio = f'<span style="color:red">**{ratio}**</span>'
        blanks = [row["trips"], row["mma_share"]]
        cells = [name, row["shape"], f"{row['bytes'] / 1e6:.3g}", f"{row['estimate_us']:.1f}"]
        cells += [f"{row['floor_us']:.1f}", ratio]
        cells += ["" if value is None else f"{value:g}" for value in blanks] + [row["instructions"]]
        cells += [str(row["registers"]), str(row["blocks_per_sm"])]
        lines.append(f"| `{cells[0]}` | " + " | ".join(cells[1:]) + " |")
    return "\n".join(lines)


def with_table(page: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Return the page with the part between the marks rewritten."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"kernel_report: {PAGE.name} lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table(found)}\n\n{reasons(found)}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the report; return 1 if ``--check`` finds a different page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="only print JSON objects")
    parser.add_argument("--check", action="store_true", help="only compare docs/gpu.md")
    parsed = parser.parse_args(arguments)
    found = rows(read_lock(LOCK.read_text(), sass_gate.load_rules(sass_gate.RULES)))
    if parsed.json:
        print(json.dumps(found, indent=1))
        return 0
    page = PAGE.read_text()
    wanted = with_table(page, found)
    if parsed.check:
        if page != wanted:
            print("kernel_report: docs/gpu.md differs; `python tools/kernel_report.py` writes it")
        return int(page != wanted)
    PAGE.write_text(wanted)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
