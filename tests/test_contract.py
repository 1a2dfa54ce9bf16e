"""Laws that hold for every op in the tables of cases, on every backend that can run here."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BACKENDS, Backend, marks_of
from contract import Op, same, with_threads, within
from torch.utils._pytree import tree_leaves

import lora_ext

pytestmark = pytest.mark.hosts

# Each family of ops has a table in a file cases*.py.
FAMILIES = [
    importlib.import_module(p.stem) for p in sorted(Path(__file__).parent.glob("cases*.py"))
]
TABLE: list[Op] = [op for family in FAMILIES for op in getattr(family, "OPS", ())]


def everywhere(has: Callable[[Op], Any], shapes: Any = Op.shapes) -> pytest.MarkDecorator:
    """Return a mark that runs a test for each op with ``has(op)``, on its backends and shapes."""
    params = [
        pytest.param(b, op, shape, id=f"{b.name}-{op.name}-{shape}", marks=marks_of(b))
        for b in BACKENDS
        for op in TABLE
        if has(op)
        for shape in shapes(op, b)
    ]
    return pytest.mark.parametrize(("backend", "op", "shape"), params, indirect=["backend"])


def alone(has: Callable[[Op], Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("op", [op for op in TABLE if has(op)], ids=lambda op: op.name)


@everywhere(lambda op: op.formula and op.exact)
def test_equals_the_formula_bit_for_bit_on_small_integers(
    backend: Backend, op: Op, shape: Any
) -> None:
    for dtype in op.dtypes(backend):
        for i in op.feed(shape, dtype, seed=1, exact=True, device=backend.device):
            same(op.run(i), op.formula(i), dtype)


@everywhere(lambda op: op.bounds)
def test_errors_on_random_values_stay_within_bounds(backend: Backend, op: Op, shape: Any) -> None:
    for dtype in op.dtypes(backend):
        for i in op.feed(shape, dtype, 1, seed=2, device=backend.device, **op.random):
            exact, found = op.formula(i), op.run(i)
            within(found, exact, op.bounds(i, exact), dtype)
            if backend.device == "cpu" and dtype == torch.float32 and op.steady:
                same(op.run(i), found, "repeated: ")


def repeated(op: Op, backend: Backend) -> list[Any]:
    """Return shapes for repeated calls; on the CPU none if the test of bounds repeats calls."""
    if backend.device == "cpu":
        return [] if op.bounds else [*op.small]
    return [shape for shape in op.shapes(backend) if shape not in op.large]


@everywhere(lambda op: op.steady, repeated)
def test_repeated_runs_are_bitwise_equal(backend: Backend, op: Op, shape: Any) -> None:
    for i in op.feed(shape, torch.float32, seed=4, device=backend.device):
        first = op.run(i)
        for _ in range(5 if backend.device == "cuda" else 1):
            same(op.run(i), first)


@alone(lambda op: op.threads is not None)
def test_number_of_threads_changes_no_bit(op: Op) -> None:
    for shape in op.shapes(Backend("cpu")):
        for i in op.feed(shape, torch.float32, 1, seed=12, **op.threads):
            one, four = (op.run(i) for _ in with_threads(1, 4))
            same(four, one, shape)


@pytest.mark.slow
@alone(lambda op: op.checks)
def test_passes_opcheck(op: Op) -> None:
    for name, args in op.checks():
        torch.library.opcheck(getattr(torch.ops.lora_ext, name).default, args)


@pytest.mark.cuda
@alone(lambda op: op.on_gpu and op.steady)
def test_captured_graph_replays_with_changed_contents(op: Op, request: Any) -> None:
    if not torch.cuda.is_available() or not lora_ext._C.has_kernels():
        if request.config.getoption("--require-gpu"):
            pytest.fail("--require-gpu: no CUDA device, or a build without kernels")
        pytest.skip("no CUDA device, or a build without kernels")
    run = op.captured or op.run
    for shape in op.replays or [*op.small, *op.medium]:
        how = {"device": "cuda", **op.variants[0][-1]}
        live = op.inputs(shape, torch.bfloat16, seed=18, **how)
        run(live)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(live)
        for seed in (19, 20):  # The seed also changes ids, ranks and dropout seeds.
            fresh = op.inputs(shape, torch.bfloat16, seed=seed, **how)
            for old, new in zip(tree_leaves(live), tree_leaves(fresh), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)
            graph.replay()
            same(captured, run(fresh), shape)


@alone(lambda op: op.wrong)
def test_wrong_input_raises_and_names_the_argument(backend: Backend, op: Op) -> None:
    for message, call in op.wrong(backend.device):
        with pytest.raises(ValueError, match=message):
            call()
