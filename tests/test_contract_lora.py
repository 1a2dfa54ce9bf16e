"""Every op of the case table under every law, on every backend that is open here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from cases import CASES, DEEP, LARGE, MEDIUM, SMALL, Inputs, OpCase, Shape, make_inputs, wider
from torch import Tensor

import lora_ext
from lora_ext import ops, reference

every_op = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
APPLY_ = next(c for c in CASES if c.name == "lora_apply_")


def shapes(*groups: list[Shape]) -> Any:
    return pytest.mark.parametrize("shape", [s for g in groups for s in g], ids=str)


def skip_large(backend: Backend, shape: Shape) -> None:
    if backend.small and shape not in [*SMALL, *DEEP]:
        pytest.skip("this backend runs the small shapes")


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "") -> None:
    got, expected = got.cpu(), expected.cpu()
    assert got.dtype == expected.dtype and got.shape == expected.shape
    differs = (got != expected) & ~(got.isnan() & expected.isnan())
    where = differs.nonzero()
    assert not len(where), f"{what}{len(where)} of {differs.numel()}, first {where[0].tolist()}"


# --- the formula --------------------------------------------------------------------------------
@every_op
@shapes(SMALL, DEEP, MEDIUM, LARGE)
@pytest.mark.parametrize("paged", [False, True], ids=["bank", "paged"])
def test_equals_the_formula_bit_for_bit_on_small_integers(
    backend: Backend, case: OpCase, shape: Shape, paged: bool
) -> None:
    skip_large(backend, shape)
    for dtype in backend.dtypes():
        inputs = make_inputs(shape, dtype, seed=1, exact=True, paged=paged, device=backend.device)
        expected = case.formula(wider(inputs))
        assert_same_bits(case.call(inputs), expected.to(case.formula(inputs).dtype), f"{dtype}: ")


@every_op
@shapes(SMALL, DEEP, MEDIUM)
def test_stays_within_the_bound_on_random_values(
    backend: Backend, case: OpCase, shape: Shape
) -> None:
    skip_large(backend, shape)
    for dtype in backend.dtypes():
        inputs = make_inputs(shape, dtype, seed=2, device=backend.device)
        exact = case.formula(wider(inputs))
        error = (case.call(inputs).cpu().double() - exact).abs()
        allowed = case.bound(inputs, exact)
        assert (error <= allowed).all(), (
            f"{dtype}: error {(error / allowed.clamp(min=1e-300)).max():.2f} times the bound"
        )


# --- rows without an adapter --------------------------------------------------------------------
@shapes(SMALL, DEEP)
def test_rows_without_adapter_or_rank_keep_every_bit(backend: Backend, shape: Shape) -> None:
    for dtype in backend.dtypes():
        inputs = make_inputs(shape, dtype, seed=3, device=backend.device)
        ids = inputs["adapter_ids"]
        idle = ids < 0
        if len(shape.ranks):
            idle = idle | (inputs["ranks"][ids.clamp(min=0)] == 0)
        y = inputs["y"]
        y[idle] = -0.0  # a kernel that adds zero would turn it into +0.0
        got = APPLY_.call(inputs)
        assert torch.equal(torch.signbit(got[idle]), torch.signbit(y[idle]))
        assert_same_bits(got[idle], y[idle])


# --- same input, same bits ----------------------------------------------------------------------
@every_op
@shapes(SMALL, DEEP, MEDIUM)
def test_repeats_its_bits(backend: Backend, case: OpCase, shape: Shape) -> None:
    skip_large(backend, shape)
    inputs = make_inputs(shape, torch.float32, seed=4, device=backend.device)
    first = case.call(inputs)
    for _ in range(2):
        assert_same_bits(case.call(inputs), first)


@every_op
@shapes(SMALL, DEEP, MEDIUM)
def test_a_plan_changes_no_bit(backend: Backend, case: OpCase, shape: Shape) -> None:
    skip_large(backend, shape)
    inputs = make_inputs(shape, torch.float32, seed=5, device=backend.device)
    plan = ops.lora_plan(inputs["adapter_ids"], len(shape.ranks))
    assert_same_bits(case.call({**inputs, "plan": plan}), case.call(inputs))


@every_op
@shapes(SMALL, DEEP)
def test_pages_give_the_bits_of_a_bank(backend: Backend, case: OpCase, shape: Shape) -> None:
    for dtype in backend.dtypes():
        bank = make_inputs(shape, dtype, seed=6, device=backend.device)
        pages = make_inputs(shape, dtype, seed=6, paged=True, device=backend.device)
        got, expected = case.call(pages), case.call(bank)
        assert_same_bits(got[:, : expected.shape[1]], expected)  # a bank may be narrower than pages


@shapes(SMALL, DEEP, MEDIUM)
def test_int32_ids_are_int64_ids(backend: Backend, shape: Shape) -> None:
    skip_large(backend, shape)
    inputs = make_inputs(shape, torch.float32, seed=7, device=backend.device)
    narrow = {**inputs, "adapter_ids": inputs["adapter_ids"].int()}
    assert_same_bits(APPLY_.call(narrow), APPLY_.call(inputs))


# --- strides and alignment ----------------------------------------------------------------------
def off_grid(t: Tensor, gap: int = 3) -> Tensor:
    """The same values in rows `gap` elements further apart, one element off their alignment."""
    rows, width = t.shape
    store = t.new_full((rows * (width + gap) + 1,), float("nan"))
    view = store[1:].view(rows, width + gap)[:, :width]
    return view.copy_(t)


@shapes(SMALL, DEEP)
def test_rows_may_lie_apart_and_unaligned(backend: Backend, shape: Shape) -> None:
    for dtype in backend.dtypes():
        inputs = make_inputs(shape, dtype, seed=8, exact=True, device=backend.device)
        expected = APPLY_.call(inputs)
        y, x = off_grid(inputs["y"]), off_grid(inputs["x"])
        ops.lora_apply_(
            y, x, inputs["a"], inputs["b"], inputs["adapter_ids"], inputs["scale"], inputs["ranks"]
        )
        assert_same_bits(y, expected)


def test_one_row_may_serve_many_tokens(backend: Backend) -> None:
    shape = SMALL[4]
    inputs = make_inputs(shape, torch.float32, seed=9, exact=True, device=backend.device)
    inputs["x"] = inputs["x"][:1].expand(shape.tokens, -1)
    assert_same_bits(APPLY_.call(inputs), APPLY_.formula(inputs))


def test_a_bank_may_be_a_view(backend: Backend) -> None:
    inputs = make_inputs(SMALL[3], torch.float32, seed=10, device=backend.device)
    expected = APPLY_.call(inputs)
    inputs["a"] = torch.cat([inputs["a"], inputs["a"]], 2)[:, :, : SMALL[3].wide]
    inputs["b"] = torch.cat([inputs["b"], inputs["b"]], 2)[:, :, : SMALL[3].max_rank]
    assert_same_bits(APPLY_.call(inputs), expected)
    inputs["b"] = inputs["b"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_same_bits(APPLY_.call(inputs), expected)


# --- invariances --------------------------------------------------------------------------------
@shapes(SMALL, DEEP, MEDIUM)
def test_permuted_tokens_give_permuted_rows(backend: Backend, shape: Shape) -> None:
    skip_large(backend, shape)
    inputs = make_inputs(shape, torch.float32, seed=11, exact=True, device=backend.device)
    order = torch.randperm(shape.tokens, generator=torch.Generator().manual_seed(0))
    order = order.to(backend.device)
    permuted: Inputs = {**inputs, **{k: inputs[k][order] for k in ("x", "y", "adapter_ids")}}
    assert_same_bits(APPLY_.call(permuted), APPLY_.call(inputs)[order])


@shapes(SMALL, DEEP, MEDIUM)
def test_threads_change_no_bit(shape: Shape) -> None:
    threads = torch.get_num_threads()
    inputs = make_inputs(shape, torch.float32, seed=12)
    try:
        torch.set_num_threads(1)
        alone = APPLY_.call(inputs)
        torch.set_num_threads(4)
        assert_same_bits(APPLY_.call(inputs), alone)
    finally:
        torch.set_num_threads(threads)


@shapes(SMALL, DEEP)
def test_a_row_does_not_depend_on_its_batch_on_the_cpu(shape: Shape) -> None:
    inputs = make_inputs(shape, torch.float32, seed=13)
    together = APPLY_.call(inputs)
    for t in range(min(shape.tokens, 8)):
        alone = {**inputs, **{k: inputs[k][t : t + 1] for k in ("x", "y", "adapter_ids")}}
        assert_same_bits(APPLY_.call(alone), together[t : t + 1])


# --- torch's own laws ---------------------------------------------------------------------------
def gradients(inputs: Inputs, names: str, function: Any) -> list[Tensor]:
    leaves = {k: inputs[k].clone().requires_grad_() for k in names}
    tail = (inputs[k] for k in ("adapter_ids", "scale", "ranks", "page_table"))
    values = [leaves.get(k, inputs[k]) for k in "xab"]
    y = function(*values, *tail)
    if not y.requires_grad:  # no row has an adapter: the formula never touched a leaf
        return [torch.zeros_like(leaf) for leaf in leaves.values()]
    weights = torch.arange(y.numel()).reshape(y.shape) % 3 - 1
    return list(torch.autograd.grad(y, list(leaves.values()), weights.to(y)))


@pytest.mark.parametrize(("paged", "names"), [(False, "xab"), (True, "x")], ids=["bank", "paged"])
@shapes(SMALL, DEEP)
def test_gradients_are_those_of_the_formula(
    backend: Backend, shape: Shape, paged: bool, names: str
) -> None:
    dtype = torch.float64 if backend.is_twin else torch.float32
    inputs = make_inputs(shape, dtype, seed=14, exact=True, paged=paged, device=backend.device)
    got = gradients(inputs, names, ops.lora_apply)
    for mine, formula in zip(got, gradients(inputs, names, reference.lora_apply), strict=True):
        assert_same_bits(mine, formula)


def test_gradcheck_in_float64() -> None:
    inputs = make_inputs(Shape(5, 7, 6, (3, 0, 8)), torch.float64, seed=14)
    leaves = [inputs[k].nan_to_num(0.25).requires_grad_() for k in "xab"]
    tail = tuple(inputs[k] for k in ("adapter_ids", "scale", "ranks"))
    assert torch.autograd.gradcheck(lambda *values: ops.lora_apply(*values, *tail), leaves)


def test_nan_in_one_row_stays_with_its_adapter() -> None:
    inputs = make_inputs(Shape(6, 16, 12, (8, 8), "interleaved"), torch.float32, seed=15)
    inputs["x"][1] = torch.nan
    a, b = inputs["a"].requires_grad_(), inputs["b"].requires_grad_()
    y = ops.lora_apply(inputs["x"], a, b, inputs["adapter_ids"])
    assert y[0::2].isfinite().all() and y[1].isnan().all()
    y.sum().backward()
    assert a.grad is not None and b.grad is not None
    assert a.grad[0].isfinite().all() and b.grad[0].isfinite().all()


def test_no_gradient_reaches_what_lies_beyond_a_rank() -> None:
    inputs = make_inputs(Shape(6, 16, 12, (3, 8)), torch.float32, seed=15)
    a, b = inputs["a"].requires_grad_(), inputs["b"].requires_grad_()
    tail = (inputs[k] for k in ("adapter_ids", "scale", "ranks"))
    ops.lora_apply(inputs["x"], a, b, *tail).sum().backward()
    assert a.grad is not None and b.grad is not None
    assert (a.grad[0, 3:] == 0).all() and (b.grad[0, :, 3:] == 0).all()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


@pytest.mark.parametrize("name", ["lora_shrink", "lora_expand_", "lora_apply", "lora_apply_"])
@pytest.mark.parametrize("paged", [False, True], ids=["bank", "paged"])
def test_passes_opcheck(name: str, paged: bool) -> None:
    i = make_inputs(SMALL[4], torch.float32, seed=16, paged=paged)
    i = {k: v.nan_to_num(0.5) if k in ("a", "b") else v for k, v in i.items()}
    tail = (i["ranks"], i["page_table"], None)
    head = {
        "lora_shrink": (i["x"], i["a"], i["adapter_ids"], i["scale"]),
        "lora_expand_": (i["y"], i["y"].new_ones(17, SMALL[4].max_rank), i["b"], i["adapter_ids"]),
        "lora_apply": (i["x"], i["a"], i["b"], i["adapter_ids"], i["scale"]),
        "lora_apply_": (i["y"], i["x"], i["a"], i["b"], i["adapter_ids"], i["scale"]),
    }[name]
    if name == "lora_apply" and not paged:
        head = (head[0], head[1].requires_grad_(), head[2].requires_grad_(), *head[3:])
    torch.library.opcheck(getattr(torch.ops.lora_ext, name).default, (*head, *tail))


def test_opcheck_of_the_plan() -> None:
    for tokens in (0, 5, 256, 257, 5000):
        ids = torch.zeros(tokens, dtype=torch.long)
        torch.library.opcheck(torch.ops.lora_ext.lora_plan.default, (ids, 3))


def test_compiles_without_a_graph_break(backend: Backend) -> None:
    inputs = make_inputs(SMALL[4], torch.float32, seed=17, exact=True, device=backend.device)

    def step(i: Inputs) -> Tensor:
        y = i["x"][:, :1] * i["y"]
        tail = (i["adapter_ids"], i["scale"], i["ranks"])
        ops.lora_apply_(y, i["x"], i["a"], i["b"], *tail)
        return y + ops.lora_apply(i["x"], i["a"], i["b"], *tail)

    expected = step(inputs)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(inputs), expected)


@pytest.mark.cuda
@shapes(SMALL, DEEP, MEDIUM)
def test_a_captured_graph_replays_with_changed_contents(shape: Shape, request: Any) -> None:
    if not torch.cuda.is_available() or not lora_ext._C.has_kernels():
        if request.config.getoption("--require-gpu"):
            pytest.fail("--require-gpu: no CUDA device, or a build without kernels")
        pytest.skip("no CUDA device, or a build without kernels")
    live = make_inputs(shape, torch.bfloat16, seed=18, paged=True, device="cuda")
    APPLY_.call(live)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = APPLY_.call(live)
    for seed in (19, 20):
        fresh = make_inputs(shape, torch.bfloat16, seed=seed, paged=True, device="cuda")
        for key, value in fresh.items():
            live[key].copy_(value)
        graph.replay()
        assert_same_bits(captured, APPLY_.call(fresh))
