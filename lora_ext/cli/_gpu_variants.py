"""Further cases of ``lora-ext gpu-report``, which are checked but not timed.

With the timed cases, they launch every instance of a kernel that depends on dtype, precision, rank,
alignment, page table, number of rows or number of states. ``tests/cli/test_gpu_launches.py``
compares the launched instances with ``kernels.lock``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_ext import ops, reference
from lora_ext.circuits import Categorical, RegionGraph

from . import _gpu_cases as cases
from ._gpu_cases import Call, Case, Inputs

# Bound of the relative error by dtype. Results in 16 bits are rounded once.
_BOUNDS = {torch.float32: 1e-4, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
PAGE = 8  # ranks per page of a pool


def all_cases() -> list[Case]:
    """Return the timed cases, followed by cases that are only checked."""
    timed = cases.all_cases()
    return [*timed, *(replace(case, timed=False) for case in [*_dtypes(timed), *_paths()])]


def _in(case: Case, dtype: torch.dtype) -> Case:
    name = str(dtype).removeprefix("torch.")
    bound = _BOUNDS[dtype] if case.bound in _BOUNDS.values() else case.bound
    return replace(case, op=f"{case.op}, {name}", dtype=dtype, bound=bound)


def _dtypes(timed: list[Case]) -> list[Case]:
    """Return the timed cases in the other dtypes of their kernels."""
    fixed = ("lora_plan", "lora_segment_ids", "circuit_table", "circuit_layers", "unpack_weight")
    return [
        _in(case, dtype)
        for case in timed
        if not case.op.startswith(fixed)
        for dtype in _BOUNDS
        if dtype != case.dtype
    ]


def _paths() -> list[Case]:
    """Return cases of kernels that no timed case launches, in every dtype."""
    variants = [*_lora_paths(), *_circuit_paths(), *_other_paths()]
    return [
        *(_in(case, dtype) for case in variants for dtype in _BOUNDS),
        *(cases.unpacking(bits, half) for bits in (8, 4) for half in (torch.bfloat16, torch.half)),
        *_gram_paths(),
        *_layers_paths(),
    ]


# --- LoRA -----------------------------------------------------------------------------------------
# (rows, input features, output features, rank, adapters) of each path
_APPLY = {
    "odd sizes": (5, 71, 47, 12, 3),
    "prefill, odd sizes": (300, 71, 47, 12, 3),
    "prefill of 128 rows": (4096, 72, 48, 16, 2),
    "prefill of many inputs": (300, 16400, 16, 8, 2),
    "decode of many inputs": (40, 16400, 16, 8, 2),
    "large rank, decode": (5, 72, 48, 264, 2),
    "large rank, many inputs": (40, 16400, 16, 264, 2),
    "large rank, 128 rows": (4096, 16, 16, 264, 1),
}
_WEIGHTED = {
    "decode": (5, 72, 48, 16, 3),
    "odd sizes": (5, 71, 47, 12, 3),
    "prefill": (300, 72, 48, 16, 3),
    "prefill of 128 rows": (4096, 72, 48, 16, 2),
}
_SHRINK = {"many inputs": (40, 16400, 16, 8, 2), "many rows": (16900, 520, 8, 8, 2)}
_TRAIN = {
    "rank 40": (300, 72, 48, 40, 2),
    "many rows": (1200, 40, 24, 8, 2),
    "many rows, rank 40": (1200, 40, 24, 40, 2),
    "128 rows": (4096, 24, 24, 16, 1),
    "128 rows, rank 40": (4096, 24, 24, 72, 1),
    "rank 264": (300, 72, 48, 264, 1),
    "few rows, rank 264": (40, 72, 48, 264, 1),
    "rank 264, many inputs": (40, 3400, 16, 264, 1),
    "many outputs": (300, 24, 1040, 8, 1),
    "128 rows, rank 264": (4096, 16, 16, 264, 1),
}


def _sized(*sizes: int) -> Callable[..., Inputs]:
    """Return the function that makes banks for (rows, inputs, outputs, rank, adapters)."""
    return partial(cases.lora_inputs, (sizes,))


def _paged(g: torch.Generator, size: int) -> Inputs:
    """Return a pool's pages in random order, and adapters of different ranks."""
    given = _sized(5, 72, 48, 24, 3)(g, size)
    ranks, per_slot = torch.tensor([24, 5, 0], dtype=torch.int32), 3
    order = torch.randperm(3 * per_slot + 1, generator=g)[: 3 * per_slot]
    needed = torch.arange(per_slot) * PAGE < ranks[:, None]
    table = torch.where(needed, order.view(3, per_slot), -1).int()
    a, b = (torch.full(shape, torch.nan) for shape in ((10, PAGE, 72), (10, 48, PAGE)))
    a[order] = given["a"].view(3 * per_slot, PAGE, 72)
    b[order] = given["b"].unflatten(2, (per_slot, PAGE)).movedim(2, 1).reshape(-1, 48, PAGE)
    return {
        **given,
        "a": a,
        "b": b,
        "ranks": ranks,
        "page_table": table,
        "scale": torch.rand(3, generator=g),
    }


def _weighted(make: Callable[..., Inputs]) -> Callable[..., Inputs]:
    """Return the function that also makes a weight for each row."""

    def weighted(g: torch.Generator, size: int) -> Inputs:
        given = make(g, size)
        return {**given, "weights": torch.rand(len(given["x"]), generator=g)}

    return weighted


def _lora_paths() -> list[Case]:
    apply = partial(cases.compared, "lora_apply")
    shrink: Any = partial(cases.compared, "lora_shrink", **cases.FLOAT)
    weights: Any = {"floats": ("weights",)}
    train, leaves = _weighted(_sized(300, 72, 48, 16, 3)), ("x", "a", "b", "weights")
    return [
        *(apply(_sized(*sizes), op=f"lora_apply, {name}") for name, sizes in _APPLY.items()),
        apply(_paged, op="lora_apply, pages", floats=("scale",)),
        *(
            shrink(cases.only(_sized(*sizes), "x", "a", "adapter_ids"), op=f"lora_shrink, {name}")
            for name, sizes in _SHRINK.items()
        ),
        *(
            apply(_weighted(_sized(*sizes)), op=f"lora_apply with weights, {name}", **weights)
            for name, sizes in _WEIGHTED.items()
        ),
        cases.siblings(
            _weighted(cases.sibling_inputs), op="lora_apply_siblings_ with weights", **weights
        ),
        cases.train(train, leaves=leaves, op="lora_linear with weights", **weights),
        *(cases.train(_sized(*sizes), op=f"lora_linear, {name}") for name, sizes in _TRAIN.items()),
    ]


# Bound of the error of log-values by precision, relative to the largest one. "high" keeps 16 bits
# of both operands of a product, "fp16s" 11 bits.
_PRECISIONS = {"high": 2.0**-13, "fp16s": 2.0**-10}


def _precise(precision: str) -> Callable[..., Tensor]:
    def call(function: Any, w: Tensor, values: Tensor) -> Tensor:
        extra = (precision,) if function is ops.log_einsum_exp else ()
        return function(w, values, "logits", "sum", *extra)

    return call


def _circuit_paths() -> list[Case]:
    # (rows, states, words): more states than a warp walks, more words than a warp reads, and more
    # words than one block verifies.
    sizes = ((2, 40, 24), (1, 12, 4100), (1, 2, 4096))
    states, long, words = (partial(cases.circuit_inputs, (each,)) for each in sizes)
    sums = partial(cases.compared, "log_einsum_exp", cases.sum_inputs, launchers="log_sum_fused")
    return [
        cases.scan(states, "circuit_scan, 40 states"),
        cases.samples(states, "circuit_sample, 40 states"),
        cases.samples(long, "circuit_sample, 4100 words"),
        cases.distributions(states, "circuit_conditional_dist, 40 states"),
        cases.verified(words, "spec_verify, by a grid"),
        *(
            sums(call=_precise(p), op=f"log_einsum_exp, {p}", floats=("values",), bound=bound)
            for p, bound in _PRECISIONS.items()
        ),
    ]


def _tree(variables: int, rows: int, g: torch.Generator, size: int) -> Inputs:
    """Return a circuit with several nodes per stage, whose stages are launched one by one."""
    return cases.graph_inputs(g, RegionGraph.btree(variables, 130, Categorical(2)), rows)


def _layers_in(precision: str, semiring: str = "sum") -> Callable[[Inputs], Call]:
    def ready(given: Inputs) -> Call:
        program = ops.Program(given["numbers"], list(given["plan"]))
        rest = program, "logits", semiring, precision
        return lambda: [ops.circuit_layers(given["leaf"], given["w"], *rest)[:, 2:]]

    return ready


def _layers_formula(semiring: str) -> Callable[[Inputs], list[Tensor]]:
    def formula(given: Inputs) -> list[Tensor]:
        leaf, w, numbers = given["leaf"], given["w"], given["numbers"]
        return [reference.circuit_layers(leaf, w, numbers, "logits", semiring)[:, 2:]]

    return formula


def _layers_paths() -> list[Case]:
    """Return cases of whole circuits, whose numbers are always float32."""
    forward = cases.LAYERS[:2]
    trees = {"tree": partial(_tree, 4, 3), "wide tree": partial(_tree, 64, 130)}
    chosen = {"by stages": cases.wide_program_inputs, **trees}
    return [
        *(
            # Gradients of weights are differences of sums over rows, which are nearly equal.
            Case(
                *(f"circuit_layers, {name}", cases.LAYERS, make),
                *(cases.layers, cases.layers_formula),
                bound=1e-3,
            )
            for name, make in trees.items()
        ),
        *(
            Case(
                *(f"circuit_layers, {name}, {precision}", forward, make),
                *(_layers_in(precision), _layers_formula("sum"), torch.float32, bound),
            )
            for name, make in chosen.items()
            for precision, bound in _PRECISIONS.items()
        ),
        Case(
            *("circuit_layers, max", forward, cases.program_inputs),
            *(_layers_in("fp32", "max"), _layers_formula("max")),
        ),
    ]


# --- losses and mixtures --------------------------------------------------------------------------
def _routed_mixes(g: torch.Generator, size: int) -> Inputs:
    given = cases.only(cases.mixes, "hiddens", "gammas")(g, size)
    return {**given, "router": cases.randn(g, 3, 40) / 6, "bias": cases.randn(g, 3)}


def _wide_norms(given: Inputs) -> Inputs:
    """Return arguments with float32 norm weights (float64 for float64 inputs)."""
    dtype = reference.accumulator(given["hiddens"][0].dtype)
    return {**given, "eps": 1e-5, "gammas": given["gammas"].to(dtype)}


def _wide_heads(g: torch.Generator, size: int) -> Inputs:
    heads = {"q": 6, "k": 2, "v": 2}
    given = {name: cases.randn(g, 2, count, 5, 96) for name, count in heads.items()}
    return {**given, "mask": torch.rand(2, 5, 5, generator=g) < 0.9}


def _gram_paths() -> list[Case]:
    """Return the cases of Gram matrices in float64, of factors of every dtype."""
    wide = partial(dict, dtype=torch.float64)
    how: Any = {"arguments": wide, "op": "lora_gram in float64", "bound": 1e-10}
    grams = cases.compared("lora_gram", cases.grams, **how)
    stats = next(case for case in cases.lora_cases() if case.op == "lora_pair_stats")
    return [
        *(_in(grams, dtype) for dtype in (*_BOUNDS, torch.float64)),
        replace(_in(stats, torch.float64), bound=1e-10),
    ]


def _other_paths() -> list[Case]:
    odd, wide = partial(cases.mix_inputs, ((5, 37),)), {"arguments": _wide_norms}
    leaves, name = ("hiddens", "gammas", "router"), "depth_mix_routed"
    routed: Any = partial(cases.compared, name, _routed_mixes, leaves, **cases.MIXES)
    return [
        cases.mix(odd, op="depth_mix, odd width"),
        routed(),
        cases.mix(cases.mixes, op="depth_mix, float32 norms", **wide),
        cases.mix(odd, op="depth_mix, odd width, float32 norms", **wide),
        routed(op="depth_mix_routed, float32 norms", **wide),
        cases.entropy("chunked_cross_entropy, capped", 3.0),
        cases.divergence(op="chunked_kl, weight"),
        cases.divergence(op="chunked_kl, capped", softcap=3.0),
        cases.attention(_wide_heads, "row_attention, 96 columns"),
        *(cases.packed(rows, bits) for rows in (12, 20) for bits in (8, 4)),
        *(cases.packed(rows, 4, minimum=True) for rows in (1, 12, 20, 64)),
    ]
