"""Further cases of ``lora-ext gpu-report``, which are checked but not timed.

With the timed cases, they launch every instance of a kernel that depends on dtype, precision, rank,
alignment, page table, number of rows or number of states. ``tests/cli/test_gpu_launches.py``
compares the launched instances with ``kernels.lock``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lora_ext import ops, reference
from lora_ext.circuits import Categorical, RegionGraph

from . import _gpu_cases as cases
from ._gpu_cases import Call, Case, Inputs, convert

# Bound of the relative error by dtype. Results in 16 bits are rounded once.
_BOUNDS = {torch.float32: 1e-4, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
PAGE = 8  # ranks per page of a pool
E4M3 = torch.float8_e4m3fn


def all_cases() -> list[Case]:
    """Return the timed cases, followed by cases that are only checked."""
    timed = cases.all_cases()
    more = [*_dtypes(timed), *_paths({case.op: case for case in timed})]
    return [*timed, *(replace(case, timed=False) for case in more)]


def _varied(case: Case, note: str, **changes: Any) -> Case:
    return replace(case, op=case.op + note, **changes)


def _in(case: Case, dtype: torch.dtype) -> Case:
    bound = _BOUNDS[dtype] if case.bound in _BOUNDS.values() else case.bound
    return _varied(case, f", {str(dtype).removeprefix('torch.')}", dtype=dtype, bound=bound)


def _dtypes(timed: list[Case]) -> list[Case]:
    """Return copies of the timed cases in the other dtypes that their kernels support."""
    fixed = ("lora_plan", "lora_segment_ids", "circuit_table", "circuit_layers", "unpack_weight")
    return [
        _in(case, dtype)
        for case in timed
        if not case.op.startswith(fixed)
        for dtype in _BOUNDS
        if dtype != case.dtype
    ]


def _paths(known: Mapping[str, Case]) -> list[Case]:
    """Return cases of kernels that no timed case launches, in every dtype.

    Most of them are timed cases, which ``known`` contains by name, with other inputs.
    """
    variants = [*_lora_paths(known), *_circuit_paths(known), *_other_paths(known)]
    return [
        *(_in(case, dtype) for case in variants for dtype in _BOUNDS),
        *(cases.unpacking(bits, half) for bits in (8, 4) for half in (torch.bfloat16, torch.half)),
        *_gram_paths(known),
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
    """Return a function that makes inputs for (rows, inputs, outputs, rank, adapters)."""
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


def _paged_float8(g: torch.Generator, size: int, siblings: bool = False) -> Inputs:
    """Return the inputs of :func:`_paged`, rounded to float8, for one module or two."""
    given = _paged(g, size)
    given |= {name: given[name].to(E4M3).float() for name in ("a", "b", "scale")}
    shared = ("a", "b", "scale", "ranks", "page_table") if siblings else ()
    return {**given, **{name: [given[name]] * 2 for name in shared}}


def _of_float8(case: Case, make: Callable[..., Inputs]) -> list[Case]:
    """Return two copies of a case with pages of float8: one without and one with weights."""

    def arguments(given: Inputs) -> Inputs:
        a, b, scale = (given[name] for name in ("a", "b", "scale"))
        own = {"a": convert(a, lambda t: t.to(E4M3)), "b": convert(b, lambda t: t.to(E4M3))}
        return {**case.arguments(given), **own, "scale": convert(scale, torch.Tensor.float)}

    more = {"make": _weighted(make), "floats": "weights", "arguments": arguments}
    return [
        _varied(case, ", float8", make=make, arguments=arguments),
        _varied(case, " with weights, float8", **more),
    ]


def _weighted(make: Callable[..., Inputs]) -> Callable[..., Inputs]:
    """Return a function that calls ``make`` and also makes a weight for each row."""

    def weighted(g: torch.Generator, size: int) -> Inputs:
        given = make(g, size)
        return {**given, "weights": torch.rand(len(given["x"]), generator=g)}

    return weighted


def _lora_paths(known: Mapping[str, Case]) -> list[Case]:
    names = ("lora_apply", "lora_shrink", "lora_linear", "lora_apply_siblings_")
    apply, shrink, train, siblings = (known[name] for name in names)
    made = [
        *((apply, f", {name}", _sized(*sizes)) for name, sizes in _APPLY.items()),
        *((shrink, f", {name}", _sized(*sizes)) for name, sizes in _SHRINK.items()),
        *((train, f", {name}", _sized(*sizes)) for name, sizes in _TRAIN.items()),
    ]
    of_train = {"leaves": "x a b weights"}
    weighted = [
        *((apply, f", {name}", _sized(*sizes), {}) for name, sizes in _WEIGHTED.items()),
        (siblings, "", cases.sibling_inputs, {}),
        (train, "", _sized(300, 72, 48, 16, 3), of_train),
    ]
    return [
        *(_varied(case, note, make=make) for case, note, make in made),
        _varied(apply, ", pages", make=_paged, floats="scale"),
        *_of_float8(apply, _paged_float8),
        *_of_float8(siblings, partial(_paged_float8, siblings=True)),
        *(
            _varied(case, f" with weights{note}", make=_weighted(make), floats="weights", **more)
            for case, note, make, more in weighted
        ),
    ]


# Bound of the error of log-values by precision, relative to the largest log-value. "high" keeps 16
# bits of both operands of a product, "fp16s" keeps 11 bits.
_PRECISIONS = {"high": 2.0**-13, "fp16s": 2.0**-10}


def _circuit_paths(known: Mapping[str, Case]) -> list[Case]:
    # (rows, states, words): more states than a warp walks, more words than a warp reads, and more
    # words than one block verifies.
    sizes = ((2, 40, 24), (1, 12, 4100), (1, 2, 4096))
    states, long, words = (partial(cases.circuit_inputs, (each,)) for each in sizes)
    sums = Case("log_einsum_exp", cases.sum_inputs, launches="log_sum_fused", floats="values")
    return [
        _varied(known["circuit_scan"], ", 40 states", make=states),
        _varied(known["circuit_sample"], ", 40 states", make=states),
        _varied(known["circuit_sample"], ", 4100 words", make=long),
        _varied(known["circuit_conditional_dist"], ", 40 states", make=states),
        _varied(known["spec_verify"], ", by a grid", make=words),
        *(
            _varied(sums, f", {precision}", of_op={"precision": precision}, bound=bound)
            for precision, bound in _PRECISIONS.items()
        ),
    ]


def _tree(variables: int, rows: int, g: torch.Generator, size: int) -> Inputs:
    """Return the inputs of a circuit with several nodes per stage, each stage a separate launch."""
    return cases.graph_inputs(g, RegionGraph.btree(variables, 130, Categorical(2)), rows)


def _layers_in(precision: str, semiring: str, of: Any, given: Inputs) -> Call:
    leaf, w = given["leaf"], given["w"]
    how: Any = given["numbers"], "logits", semiring
    if of is ops:
        how = ops.Program(how[0], list(given["plan"])), *how[1:], precision
    return lambda: [of.circuit_layers(leaf, w, *how)[:, 2:]]


def _layers_paths() -> list[Case]:
    """Return cases of whole circuits, always with float32 inputs."""
    trees = {"tree": partial(_tree, 4, 3), "wide tree": partial(_tree, 64, 130)}
    chosen = {"by stages": cases.wide_program_inputs, **trees}
    # A gradient of a weight is a difference of nearly equal sums over rows, so its error is larger.
    whole: Any = {"prepare": cases.layers, "launches": cases.BACKWARD, "bound": 1e-3}
    forward = partial(Case, launches=cases.FORWARD)
    of_max = partial(_layers_in, "fp32", "max")
    return [
        *(Case(f"circuit_layers, {name}", make, **whole) for name, make in trees.items()),
        *(
            forward(
                f"circuit_layers, {name}, {precision}",
                make,
                prepare=partial(_layers_in, precision, "sum"),
                bound=bound,
            )
            for name, make in chosen.items()
            for precision, bound in _PRECISIONS.items()
        ),
        forward("circuit_layers, max", cases.program_inputs, prepare=of_max),
    ]


# --- losses and mixtures --------------------------------------------------------------------------
def _routed_mixes(g: torch.Generator, size: int) -> Inputs:
    given = cases.mixes(g, size)
    return {**given, "router": cases.randn(g, 3, 40) / 6, "bias": cases.randn(g, 3)}


def _wide_norms(given: Inputs) -> Inputs:
    """Return arguments with float32 norm weights (float64 for float64 inputs)."""
    dtype = reference.accumulator(given["hiddens"][0].dtype)
    return {**given, "eps": 1e-5, "gammas": given["gammas"].to(dtype)}


def _wide_heads(g: torch.Generator, size: int) -> Inputs:
    heads = {"q": 6, "k": 2, "v": 2}
    given = {name: cases.randn(g, 2, count, 5, 96) for name, count in heads.items()}
    return {**given, "mask": torch.rand(2, 5, 5, generator=g) < 0.9}


def _gram_paths(known: Mapping[str, Case]) -> list[Case]:
    """Return the cases that compute Gram matrices in float64 from factors of every dtype."""
    wide: Any = {"arguments": partial(dict, dtype=torch.float64), "bound": 1e-10}
    grams = _varied(known["lora_gram"], " in float64", **wide)
    return [
        *(_in(grams, dtype) for dtype in (*_BOUNDS, torch.float64)),
        replace(_in(known["lora_pair_stats"], torch.float64), bound=1e-10),
    ]


def _other_paths(known: Mapping[str, Case]) -> list[Case]:
    mix, odd = known["depth_mix"], partial(cases.mix_inputs, ((5, 37),))
    entropy, divergence = known["chunked_cross_entropy"], known["chunked_kl"]
    leaves, inputs = "hiddens gammas router", "hiddens gammas router bias"
    routed = Case("depth_mix_routed", _routed_mixes, inputs, leaves, **cases.MIXES)
    wide: Any = {"arguments": _wide_norms}
    capped: Any = {"arguments": partial(dict, softcap=3.0), "leaves": "hidden weight"}
    return [
        _varied(mix, ", odd width", make=odd),
        routed,
        _varied(mix, ", float32 norms", **wide),
        _varied(mix, ", odd width, float32 norms", make=odd, **wide),
        _varied(routed, ", float32 norms", **wide),
        _varied(entropy, ", capped", arguments=partial(dict, bias=None, softcap=3.0)),
        _varied(divergence, ", weight", leaves="hidden weight"),
        _varied(divergence, ", capped", **capped),
        _varied(known["row_attention"], ", 96 columns", make=_wide_heads),
        *(cases.packed(rows, bits) for rows in (12, 20) for bits in (8, 4)),
        *(cases.packed(rows, 4, minimum=True) for rows in (1, 12, 20, 64)),
    ]
