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
    fixed = ("lora_plan", "lora_segment_ids", "circuit_table", "circuit_layers")
    return [
        _in(case, dtype)
        for case in timed
        if not case.op.startswith(fixed)
        for dtype in _BOUNDS
        if dtype != case.dtype
    ]


def _paths() -> list[Case]:
    """Return cases of kernels that no timed case launches, in every dtype."""
    variants = [
        *_lora_paths(),
        *_weighted_paths(),
        *_train_paths(),
        *_circuit_paths(),
        *_other_paths(),
    ]
    return [
        *(_in(case, dtype) for case in variants for dtype in _BOUNDS),
        *_gram_paths(),
        *_layers_paths(),
    ]


# --- LoRA -----------------------------------------------------------------------------------------
def _sized(*sizes: int) -> Callable[..., Inputs]:
    """Return the function that makes banks for (rows, inputs, outputs, rank, adapters)."""
    return lambda g, size: cases.lora_inputs((sizes, sizes), g, size)


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
        "table": table,
        "scale": torch.rand(3, generator=g),
    }


def _pages(given: Inputs) -> tuple[Any, ...]:
    return *cases.bank(given), given["scale"], given["ranks"], given["table"]


def _lora_paths() -> list[Case]:
    apply = partial(cases.pair, "lora_apply")
    shapes = {
        "odd sizes": (5, 71, 47, 12, 3),
        "prefill, odd sizes": (300, 71, 47, 12, 3),
        "prefill of 128 rows": (4096, 72, 48, 16, 2),
        "prefill of many inputs": (300, 16400, 16, 8, 2),
        "decode of many inputs": (40, 16400, 16, 8, 2),
        "large rank, decode": (5, 72, 48, 264, 2),
        "large rank, many inputs": (40, 16400, 16, 264, 2),
        "large rank, 128 rows": (4096, 16, 16, 264, 1),
    }
    return [
        *(
            apply(_sized(*sizes), cases.bank, "lora_apply", op=f"lora_apply, {name}")
            for name, sizes in shapes.items()
        ),
        apply(_paged, _pages, "lora_apply", op="lora_apply, pages"),
        *(
            cases.pair(
                *("lora_shrink", _sized(*sizes), cases.shrink, "lora_shrink"),
                op=f"lora_shrink, {name}",
                **cases.FLOAT,
            )
            for name, sizes in {
                "many inputs": (40, 16400, 16, 8, 2),
                "many rows": (16900, 520, 8, 8, 2),
            }.items()
        ),
    ]


def _weighted(make: Callable[..., Inputs]) -> Callable[..., Inputs]:
    """Return the function that also makes a weight for each row."""

    def weighted(g: torch.Generator, size: int) -> Inputs:
        given = make(g, size)
        return {**given, "row_weights": torch.rand(len(given["x"]), generator=g)}

    return weighted


def _train_weighted(function: Any, given: Inputs) -> Call:
    def run(x: Tensor, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
        return function(x, None, None, a, b, given["ids"], weights=weights)

    return cases.gradients(run, given, ("x", "a", "b", "row_weights"))


def _weighted_paths() -> list[Case]:
    """Return cases of rows with weights."""
    shapes = {
        "decode": (5, 72, 48, 16, 3),
        "odd sizes": (5, 71, 47, 12, 3),
        "prefill": (300, 72, 48, 16, 3),
        "prefill of 128 rows": (4096, 72, 48, 16, 2),
    }
    siblings = "lora_apply_siblings_"
    return [
        *(
            cases.pair(
                *("lora_apply", _weighted(_sized(*sizes)), cases.bank, "lora_apply"),
                op=f"lora_apply with weights, {name}",
            )
            for name, sizes in shapes.items()
        ),
        cases.pair(
            *(siblings, _weighted(cases.sibling_inputs), cases.siblings, "lora_apply"),
            op=f"{siblings} with weights",
        ),
        cases.both(
            *("lora_linear", ("lora_train_shrink", "lora_train_backward")),
            *(_weighted(_sized(300, 72, 48, 16, 3)), _train_weighted),
            op="lora_linear with weights",
        ),
    ]


def _train_paths() -> list[Case]:
    shapes = {
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
    launchers = ("lora_train_shrink", "lora_train_backward")
    return [
        cases.both("lora_linear", launchers, _sized(*sizes), cases.train, op=f"lora_linear, {name}")
        for name, sizes in shapes.items()
    ]


# --- circuits -------------------------------------------------------------------------------------
def _many_states(g: torch.Generator, size: int) -> Inputs:
    """Return a circuit with more states than a warp walks."""
    return cases.circuit_inputs(g, 2, 40, 24)


def _long_rows(g: torch.Generator, size: int) -> Inputs:
    """Return a circuit with more words than a warp reads."""
    return cases.circuit_inputs(g, 1, 12, 4100)


def _many_words(g: torch.Generator, size: int) -> Inputs:
    """Return a circuit with more words than one block verifies."""
    return cases.circuit_inputs(g, 1, 2, 4096)


# Bound of the error of log-values by precision, relative to the largest one. "high" keeps 16 bits
# of both operands of a product, "fp16s" 11 bits.
_PRECISIONS = {"fp32": 1e-4, "high": 2.0**-13, "fp16s": 2.0**-10}


def _precise(precision: str) -> Any:
    def ready(function: Any, given: Inputs) -> Call:
        extra = (precision,) if function is ops.log_einsum_exp else ()
        return lambda: [function(given["w"], given["values"], "logits", "sum", *extra)]

    return ready


def _circuit_paths() -> list[Case]:
    both, pair, head = cases.both, cases.pair, cases.head
    scan = ("circuit_scan", "circuit_scan_backward")
    return [
        both("circuit_scan", scan, _many_states, cases.scan, op="circuit_scan, 40 states"),
        *(
            both(
                *("circuit_sample", ("circuit_sample",), make, cases.scored),
                op=f"circuit_sample, {name}",
                **cases.FLOAT,
            )
            for name, make in (("40 states", _many_states), ("4100 words", _long_rows))
        ),
        pair(
            "circuit_conditional_dist",
            _many_states,
            lambda i: (*head(i), i["x"], i["k"]),
            "circuit_conditional_dist",
            op="circuit_conditional_dist, 40 states",
            **cases.FLOAT,
        ),
        pair(
            *("spec_verify", _many_words, cases.verify, "spec_verify"),
            op="spec_verify, by a grid",
            exact=True,
        ),
        *(
            both(
                *("log_einsum_exp", ("log_sum_fused",), cases.sum_inputs, _precise(precision)),
                op=f"log_einsum_exp, {precision}",
                bound=bound,
            )
            for precision, bound in _PRECISIONS.items()
            if precision != "fp32"
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
    launchers = ("layers_weights", "layers_forward", "layers_backward", "layers_dweights")
    trees = {"tree": partial(_tree, 4, 3), "wide tree": partial(_tree, 64, 130)}
    chosen = {"by stages": cases.wide_program_inputs, **trees}
    return [
        *(
            # Gradients of weights are differences of sums over rows, which are nearly equal.
            Case(
                *(f"circuit_layers, {name}", launchers, make, cases.layers, cases.layers_formula),
                bound=1e-3,
            )
            for name, make in trees.items()
        ),
        *(
            Case(
                *(f"circuit_layers, {name}, {precision}", launchers[:2], make),
                *(_layers_in(precision), _layers_formula("sum"), torch.float32, bound),
            )
            for name, make in chosen.items()
            for precision, bound in _PRECISIONS.items()
            if precision != "fp32"
        ),
        Case(
            *("circuit_layers, max", launchers[:2], cases.program_inputs),
            *(_layers_in("fp32", "max"), _layers_formula("max")),
        ),
    ]


# --- losses and mixtures --------------------------------------------------------------------------
def _odd_mixes(g: torch.Generator, size: int) -> Inputs:
    return cases.mix_inputs(g, 5, 37)


def _routed_mixes(g: torch.Generator, size: int) -> Inputs:
    given = cases.mix_inputs(g, 5, 40)
    return {**given, "router": cases.randn(g, 3, 40) / 6, "bias": cases.randn(g, 3)}


def _wide_norms(ready: Any) -> Any:
    """Return ``ready`` with float32 norm weights (float64 for float64 inputs)."""

    def wide(function: Any, given: Inputs) -> Call:
        dtype = reference.accumulator(given["h0"].dtype)
        return ready(function, {**given, "gammas": given["gammas"].to(dtype)})

    return wide


def _routed(function: Any, given: Inputs) -> Call:
    def run(h0: Tensor, h1: Tensor, h2: Tensor, gammas: Tensor, router: Tensor) -> Tensor:
        return function([h0, h1, h2], gammas, router, given["bias"], 1e-5)[0]

    return cases.gradients(run, given, ("h0", "h1", "h2", "gammas", "router"))


def _capped_entropy(function: Any, given: Inputs) -> Call:
    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return function(hidden, weight, None, given["labels"], softcap=3.0)

    return cases.gradients(run, given, ("hidden", "weight"))


def _divergence(softcap: float | None) -> Any:
    def ready(function: Any, given: Inputs) -> Call:
        def run(hidden: Tensor, weight: Tensor) -> Tensor:
            return function([hidden, given["other"]], weight, None, softcap=softcap)

        return cases.gradients(run, given, ("hidden", "weight"))

    return ready


def _wide_heads(g: torch.Generator, size: int) -> Inputs:
    heads = {"q": 6, "k": 2, "v": 2}
    given = {name: cases.randn(g, 2, count, 5, 96) for name, count in heads.items()}
    return {**given, "mask": torch.rand(2, 5, 5, generator=g) < 0.9}


def _gram_paths() -> list[Case]:
    """Return the cases of Gram matrices in float64, of factors of every dtype."""
    grams = cases.pair(
        *("lora_gram", cases.grams, lambda i: (i["a"], i["b"], torch.float64), "lora_gram"),
        op="lora_gram in float64",
        bound=1e-10,
    )
    stats = next(case for case in cases.lora_cases() if case.op == "lora_pair_stats")
    return [
        *(_in(grams, dtype) for dtype in (*_BOUNDS, torch.float64)),
        replace(_in(stats, torch.float64), bound=1e-10),
    ]


def _other_paths() -> list[Case]:
    both = cases.both
    mix, kl = ("depth_mix", "depth_mix_backward"), ("kl_update", "kl_finish", "kl_gradient")
    entropy = tuple(f"cross_entropy_{part}" for part in ("update", "finish", "gradient"))
    return [
        both("depth_mix", mix, _odd_mixes, cases.mix, op="depth_mix, odd width"),
        both("depth_mix_routed", mix, _routed_mixes, _routed),
        *(
            both(name, mix, make, _wide_norms(ready), op=f"{label}, float32 norms")
            for name, make, ready, label in (
                ("depth_mix", cases.mixes, cases.mix, "depth_mix"),
                ("depth_mix", _odd_mixes, cases.mix, "depth_mix, odd width"),
                ("depth_mix_routed", _routed_mixes, _routed, "depth_mix_routed"),
            )
        ),
        both(
            *("chunked_cross_entropy", entropy, cases.head_inputs, _capped_entropy),
            op="chunked_cross_entropy, capped",
        ),
        both("chunked_kl", kl, cases.head_inputs, _divergence(None), op="chunked_kl, weight"),
        both("chunked_kl", kl, cases.head_inputs, _divergence(3.0), op="chunked_kl, capped"),
        both(
            *("row_attention", ("row_attention",), _wide_heads, cases.attend),
            op="row_attention, 96 columns",
        ),
    ]
