"""What LoRA's ops promise beyond the laws of the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from cases import APPLY_, DEEP, MEDIUM, OPS, SMALL, Inputs, Shape, make_inputs
from contract import assert_same_bits, off_grid, same, shapes
from torch import Tensor

from lora_ext import ops, reference

(OP,) = OPS


def test_v_has_the_dtype_of_sums_and_y_that_of_x(backend: Backend) -> None:
    for dtype in backend.dtypes():
        found = OP.run(make_inputs(SMALL[2], dtype, device=backend.device))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert found.pop("lora_shrink").dtype == wide
        assert {t.dtype for t in found.values()} == {dtype}


@shapes(OP, SMALL, DEEP)
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


@shapes(OP, SMALL, DEEP, MEDIUM)
def test_a_plan_changes_no_bit(backend: Backend, shape: Shape) -> None:
    inputs = make_inputs(shape, torch.float32, seed=5, device=backend.device)
    plan = ops.lora_plan(inputs["adapter_ids"], len(shape.ranks))
    same(OP.run({**inputs, "plan": plan}), OP.run(inputs))


@shapes(OP, SMALL, DEEP)
def test_pages_give_the_bits_of_a_bank(backend: Backend, shape: Shape) -> None:
    for dtype in backend.dtypes():
        bank = OP.run(make_inputs(shape, dtype, seed=6, device=backend.device))
        pages = OP.run(make_inputs(shape, dtype, seed=6, paged=True, device=backend.device))
        # A bank may be narrower than pages, and so may its v.
        same({k: t[:, : bank[k].shape[1]] for k, t in pages.items()}, bank)


@shapes(OP, SMALL, DEEP, MEDIUM)
def test_int32_ids_are_int64_ids(backend: Backend, shape: Shape) -> None:
    inputs = make_inputs(shape, torch.float32, seed=7, device=backend.device)
    narrow = {**inputs, "adapter_ids": inputs["adapter_ids"].int()}
    assert_same_bits(APPLY_.call(narrow), APPLY_.call(inputs))


@shapes(OP, SMALL, DEEP)
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


@shapes(OP, SMALL, DEEP, MEDIUM)
def test_permuted_tokens_give_permuted_rows(backend: Backend, shape: Shape) -> None:
    inputs = make_inputs(shape, torch.float32, seed=11, exact=True, device=backend.device)
    order = torch.randperm(shape.tokens, generator=torch.Generator().manual_seed(0))
    order = order.to(backend.device)
    permuted: Inputs = {**inputs, **{k: inputs[k][order] for k in ("x", "y", "adapter_ids")}}
    assert_same_bits(APPLY_.call(permuted), APPLY_.call(inputs)[order])


@pytest.mark.parametrize("shape", [*SMALL, *DEEP], ids=str)
def test_a_row_does_not_depend_on_its_batch_on_the_cpu(shape: Shape) -> None:
    inputs = make_inputs(shape, torch.float32, seed=13)
    together = APPLY_.call(inputs)
    for t in range(min(shape.tokens, 8)):
        alone = {**inputs, **{k: inputs[k][t : t + 1] for k in ("x", "y", "adapter_ids")}}
        assert_same_bits(APPLY_.call(alone), together[t : t + 1])


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
@shapes(OP, SMALL, DEEP)
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
