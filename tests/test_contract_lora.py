"""Laws of the LoRA ops, in addition to ``test_contract.py``, for one module and for siblings."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend
from cases import APPLY_, DEEP, MEDIUM, OPS, SMALL, Inputs, Shape, make_inputs
from cases_siblings import OPS as SIBLINGS
from cases_siblings import alone, each, family, together
from contract import assert_same_bits, off_grid, same, shapes
from torch import Tensor

from lora_ext import ops, reference

(OP,) = OPS


def test_v_has_the_accumulation_dtype_and_y_that_of_x(backend: Backend) -> None:
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
        y[idle] = -0.0  # Adding zero would turn -0.0 into +0.0.
        got = APPLY_.call(inputs)
        assert torch.equal(torch.signbit(got[idle]), torch.signbit(y[idle]))
        assert_same_bits(got[idle], y[idle])


@shapes(OP, SMALL, DEEP, MEDIUM)
def test_plans_int32_ids_and_the_row_order_change_no_bit(backend: Backend, shape: Shape) -> None:
    inputs = make_inputs(shape, torch.float32, seed=5, device=backend.device)
    plan = ops.lora_plan(inputs["adapter_ids"], len(shape.ranks))
    same(OP.run({**inputs, "plan": plan}), OP.run(inputs))
    narrow = {**inputs, "adapter_ids": inputs["adapter_ids"].int()}
    assert_same_bits(APPLY_.call(narrow), APPLY_.call(inputs))
    inputs = make_inputs(shape, torch.float32, seed=11, exact=True, device=backend.device)
    order = torch.randperm(shape.tokens, generator=torch.Generator().manual_seed(0))
    order = order.to(backend.device)
    permuted: Inputs = {**inputs, **{k: inputs[k][order] for k in ("x", "y", "adapter_ids")}}
    assert_same_bits(APPLY_.call(permuted), APPLY_.call(inputs)[order])


@shapes(OP, SMALL, DEEP)
def test_pages_are_bitwise_equal_to_a_bank(backend: Backend, shape: Shape) -> None:
    for dtype in backend.dtypes():
        bank = OP.run(make_inputs(shape, dtype, seed=6, device=backend.device))
        pages = OP.run(make_inputs(shape, dtype, seed=6, paged=True, device=backend.device))
        # The rank of a bank need not be a multiple of 8, so v can be narrower for a bank than for
        # pages.
        same({k: t[:, : bank[k].shape[1]] for k, t in pages.items()}, bank)


@shapes(OP, SMALL, DEEP)
def test_rows_may_be_strided_and_unaligned(backend: Backend, shape: Shape) -> None:
    for dtype in backend.dtypes():
        inputs = make_inputs(shape, dtype, seed=8, exact=True, device=backend.device)
        expected = APPLY_.call(inputs)
        y, x = off_grid(inputs["y"]), off_grid(inputs["x"])
        ops.lora_apply_(
            y, x, inputs["a"], inputs["b"], inputs["adapter_ids"], inputs["scale"], inputs["ranks"]
        )
        assert_same_bits(y, expected)


def test_x_may_be_expanded_and_a_bank_a_view(backend: Backend) -> None:
    shape = SMALL[4]
    inputs = make_inputs(shape, torch.float32, seed=9, exact=True, device=backend.device)
    inputs["x"] = inputs["x"][:1].expand(shape.tokens, -1)
    assert_same_bits(APPLY_.call(inputs), APPLY_.formula(inputs))
    inputs = make_inputs(SMALL[3], torch.float32, seed=10, device=backend.device)
    expected = APPLY_.call(inputs)
    inputs["a"] = torch.cat([inputs["a"], inputs["a"]], 2)[:, :, : SMALL[3].wide]
    inputs["b"] = torch.cat([inputs["b"], inputs["b"]], 2)[:, :, : SMALL[3].max_rank]
    assert_same_bits(APPLY_.call(inputs), expected)
    inputs["b"] = inputs["b"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_same_bits(APPLY_.call(inputs), expected)


@pytest.mark.parametrize("shape", [*SMALL, *DEEP], ids=str)
def test_result_of_a_row_does_not_depend_on_the_batch_on_the_cpu(shape: Shape) -> None:
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
    if not y.requires_grad:  # If no row has an adapter, the formula does not use the leaves.
        return [torch.zeros_like(leaf) for leaf in leaves.values()]
    weights = torch.arange(y.numel()).reshape(y.shape) % 3 - 1
    return list(torch.autograd.grad(y, list(leaves.values()), weights.to(y)))


@pytest.mark.parametrize(("paged", "names"), [(False, "xab"), (True, "x")], ids=["bank", "paged"])
@shapes(OP, SMALL, DEEP)
def test_gradients_equal_the_formula(
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


def test_nan_affects_only_its_adapter_and_gradients_beyond_the_rank_are_zero() -> None:
    inputs = make_inputs(Shape(6, 16, 12, (8, 8), "interleaved"), torch.float32, seed=15)
    inputs["x"][1] = torch.nan
    a, b = inputs["a"].requires_grad_(), inputs["b"].requires_grad_()
    y = ops.lora_apply(inputs["x"], a, b, inputs["adapter_ids"])
    assert y[0::2].isfinite().all() and y[1].isnan().all()
    y.sum().backward()
    assert a.grad[0].isfinite().all() and b.grad[0].isfinite().all()
    inputs = make_inputs(Shape(6, 16, 12, (3, 8)), torch.float32, seed=15)
    a, b = inputs["a"].requires_grad_(), inputs["b"].requires_grad_()
    tail = (inputs[k] for k in ("adapter_ids", "scale", "ranks"))
    ops.lora_apply(inputs["x"], a, b, *tail).sum().backward()
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


@shapes(SIBLINGS[0], SMALL, DEEP, MEDIUM)
def test_siblings_are_bitwise_equal_to_single_modules(backend: Backend, shape: Shape) -> None:
    """Check siblings with and without a plan, in banks and in pages; each dtype occurs with banks
    and with pages over all shapes. Kernels run medium shapes with a single dtype."""
    dtypes = list(enumerate(backend.dtypes()))
    if shape in MEDIUM and not backend.is_twin:
        dtypes = [dtypes[MEDIUM.index(shape) % len(dtypes)]]
    for turn, dtype in dtypes:
        (modules,) = SIBLINGS[0].feed(shape, dtype, turn, seed=2, device=backend.device)
        plan = ops.lora_plan(modules[0]["adapter_ids"], len(shape.ranks))
        for got, module in zip(together(modules, plan if turn % 3 else None), modules, strict=True):
            assert_same_bits(got, alone(module), f"{dtype}: ")


def test_siblings_may_differ_in_ranks_and_alignment(backend: Backend) -> None:
    """Check rank 0, small and large ranks, a module without adapters, and unaligned outputs."""
    shape = Shape(19, 64, 48, (8, 3), "uniform")
    for dtype in backend.dtypes():
        modules = family(shape, dtype, seed=3, device=backend.device)
        for i, ranks in enumerate(((0, 0), (40, 9), (300, 1))):
            other = make_inputs(replace(shape, ranks=ranks), dtype, seed=4 + i)
            for key in ("y", "a", "b", "ranks", "scale"):
                value = other[key].to(backend.device)
                modules[i] |= {key: off_grid(value) if key == "y" and i == 1 else value}
        modules.append({**modules[1], "a": modules[1]["a"][:, :0], "b": modules[1]["b"][..., :0]})
        modules[3]["ranks"] = torch.zeros_like(modules[1]["ranks"])
        for got, module in zip(together(modules), modules, strict=True):
            assert_same_bits(got, alone(module), f"{dtype}: ")


@pytest.mark.parametrize(
    ("tokens", "out", "paged", "launches"),
    [
        (1, 64, True, 2),
        (16, 64, True, 2),
        (32, 64, False, 2),
        (256, 64, True, 2),
        (257, 64, True, 6),
        (16, 60, True, 6),
    ],
)
def test_siblings_need_as_many_launches_as_one_module(
    backend: Backend, tokens: int, out: int, paged: bool, launches: int
) -> None:
    """Check the number of launches: 2 for all modules, or 2 per module for more than 256 rows
    (prefill) or rows that are not aligned to 16 bytes."""
    if backend.is_twin or backend.device == "cuda":
        pytest.skip("only the emulator counts launches")
    modules = family(Shape(tokens, 64, out, (16, 8)), torch.bfloat16, seed=6, paged=paged)
    plan = ops.lora_plan(modules[0]["adapter_ids"], 2)
    before = backend.module.launches()
    together(modules, plan)
    assert backend.module.launches() - before == launches
    for module in modules:
        alone(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_two_calls_may_add_to_the_same_outputs(backend: Backend, dtype: torch.dtype) -> None:
    """Check that the expand of a second call does not race with the expand of the first call; the
    emulator would report it. Expand reads y before it waits for the preceding shrink."""
    modules = family(Shape(5, 64, 32, (8, 8)), dtype, seed=7, paged=True, exact=True)
    modules = [{k: v if v is None else v.to(backend.device) for k, v in m.items()} for m in modules]
    once = together(modules)
    again = together([{**m, "y": y} for m, y in zip(modules, once, strict=True)])
    for got, first, module in zip(again, once, modules, strict=True):
        assert_same_bits(got, alone({**module, "y": first}))


def call(modules: list[Inputs], **changed: Any) -> None:
    given: dict[str, Any] = {
        "y": each(modules, "y"),
        "x": modules[0]["x"],
        "a": each(modules, "a"),
        "b": each(modules, "b"),
        "adapter_ids": modules[0]["adapter_ids"],
        "scale": each(modules, "scale"),
        "ranks": each(modules, "ranks"),
        **changed,
    }
    ops.lora_apply_siblings_(**given)


def test_wrong_siblings_raise_and_change_nothing() -> None:
    modules = family(Shape(4, 16, 24, (8, 3), "interleaved"), torch.float32, seed=8)
    y, a, b = (each(modules, k) for k in "yab")
    before = [t.clone() for t in y]
    ranks, rows = each(modules, "ranks"), torch.zeros(7, 32)
    wrong: dict[str, dict[str, Any]] = {
        r"y: expected 1 to 8 tensors, found 0": {"y": []},
        r"y: expected 1 to 8 tensors, found 9": {"y": y * 3},
        r"a: expected as many tensors as y, 3, found 2": {"a": a[:2]},
        r"ranks: expected as many tensors as y, 3, found 1": {"ranks": ranks[:1]},
        r"x: expected shape \(T, I\), found \[16\]": {"x": modules[0]["x"][0]},
        r"module 1: y\.shape\[0\]: expected x\.shape\[0\] = 4": {"y": [y[0], y[1][:3], y[2]]},
        r"module 2: b\.shape\[1\]: expected y\.shape\[1\] = 12": {"b": [b[0], b[1], b[1]]},
        r"module 1: y: expected the dtype of x": {"y": [y[0], y[1].half(), y[2]]},
        r"module 1: a: expected as many adapters as module 0, 2, found 1": {
            "a": [a[0], a[1][:1], a[2]],
            "b": [b[0], b[1][:1], b[2]],
            "scale": [],
            "ranks": [],
        },
        r"module 2: ranks\[0\]: expected a rank in \[0, 8\], found 9": {
            "ranks": [*ranks[:2], torch.tensor([9, 0], dtype=torch.int32)]
        },
        r"module 0: y: expected memory that does not overlap that of another y": {
            "y": [y[0], y[0], y[2]],
            "b": [b[0], b[0], b[2]],
        },
        r"module 1: y: expected memory that does not overlap that of another y": {
            "y": [y[0], rows[:4, :32], rows[3:, 20:]]
        },
        r"module 2: y: expected rows that do not overlap, found shape \[4, 12\]": {
            "y": [*y[:2], torch.zeros(21).as_strided((4, 12), (3, 1))]
        },
        r"module 0: y: expected memory that does not overlap that of a, found an overlap": {
            "a": [a[0], a[1], y[0].new_zeros(0).set_(y[0].untyped_storage(), 0, (2, 8, 4))]
        },
    }
    for message, changed in wrong.items():
        with pytest.raises(ValueError, match="lora_apply_siblings_: " + message):
            call(modules, **changed)
    assert all(torch.equal(now, then) for now, then in zip(y, before, strict=True))


@pytest.mark.parametrize("name", ["y", "x", "a", "b", "adapter_ids", "scale", "ranks"])
def test_meta_tensor_among_siblings_raises(name: str) -> None:
    """Check the fake kernel. It runs if any tensor is on meta, and without a check would silently
    do nothing."""
    modules = family(Shape(4, 16, 24, (8, 3)), torch.float32, seed=8)
    if name in ("x", "adapter_ids"):
        changed = modules[0][name].to("meta")
        message = "expected all tensors on one device, found x on .* and adapter_ids on"
    else:
        changed = each(modules, name)
        changed[1] = changed[1].to("meta")
        message = f"module 1: {name}: expected the device of x, cpu, found meta"
    with pytest.raises(ValueError, match=f"lora_apply_siblings_: {message}"):
        call(modules, **{name: changed})


def test_siblings_increment_versions_and_reject_gradients() -> None:
    """Check the version counters, from which autograd detects that a saved tensor was changed."""
    modules = family(Shape(4, 16, 24, (8, 3)), torch.float32, seed=11)
    with torch.no_grad():
        before = [m["y"]._version for m in modules]
        call(modules)
    assert [m["y"]._version for m in modules] == [v + 1 for v in before]
    with pytest.raises(RuntimeError, match=r"lora_apply_siblings_ has no backward.*lora_apply"):
        call(modules, a=[m["a"].clone().requires_grad_() for m in modules])


def test_siblings_compile_without_a_graph_break(backend: Backend) -> None:
    modules = family(SMALL[4], torch.float32, seed=12, exact=True, device=backend.device)

    def step(x: Tensor, modules: list[Inputs]) -> list[Tensor]:
        ys = [m["y"] * x[:, :1] for m in modules]
        rest = (modules[0]["adapter_ids"], each(modules, "scale"), each(modules, "ranks"))
        ops.lora_apply_siblings_(ys, x, each(modules, "a"), each(modules, "b"), *rest)
        return [y + 1 for y in ys]

    expected = step(modules[0]["x"], modules)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, plain in zip(compiled(modules[0]["x"], modules), expected, strict=True):
        assert_same_bits(got, plain)
