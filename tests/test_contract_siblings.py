"""One op for several modules that see the same rows: each y as from the op of its module alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend
from cases import DEEP, MEDIUM, SMALL, Inputs, Shape, make_inputs
from cases_siblings import OPS, alone, each, family, together
from contract import assert_same_bits, off_grid, shapes
from torch import Tensor

from lora_ext import ops


@shapes(OPS[0], SMALL, DEEP, MEDIUM)
def test_siblings_have_the_bits_of_a_module_alone(backend: Backend, shape: Shape) -> None:
    """With a plan and without, of banks and of pages: each dtype has its turn at either."""
    for turn, dtype in enumerate(backend.dtypes()):
        (modules,) = OPS[0].feed(shape, dtype, turn, seed=2, device=backend.device)
        plan = ops.lora_plan(modules[0]["adapter_ids"], len(shape.ranks))
        for got, module in zip(together(modules, plan if turn % 3 else None), modules, strict=True):
            assert_same_bits(got, alone(module), f"{dtype}: ")


def test_siblings_may_differ_in_ranks_and_lie_off_the_grid(backend: Backend) -> None:
    """Adapters of none, some and many ranks, a module without any, outputs that are not aligned."""
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
def test_siblings_take_the_launches_of_one_module(
    backend: Backend, tokens: int, out: int, paged: bool, launches: int
) -> None:
    """Prefill and rows that do not lie on 16 bytes take launches of their own for each module."""
    if backend.is_twin or backend.device == "cuda":
        pytest.skip("the emulator counts launches")
    modules = family(Shape(tokens, 64, out, (16, 8)), torch.bfloat16, seed=6, paged=paged)
    plan = ops.lora_plan(modules[0]["adapter_ids"], 2)
    before = backend.module.launches()
    together(modules, plan)
    assert backend.module.launches() - before == launches
    for module in modules:
        alone(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_two_calls_in_a_row_may_add_to_the_same_ys(backend: Backend, dtype: torch.dtype) -> None:
    """Expand reads y before it waits for the shrink in front of it; the emulator would report it
    if the second call's expand could meet the first one's."""
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


def test_wrong_siblings_are_named_and_nothing_is_touched() -> None:
    modules = family(Shape(4, 16, 24, (8, 3), "interleaved"), torch.float32, seed=8)
    y, a, b = (each(modules, k) for k in "yab")
    before = [t.clone() for t in y]
    ranks, rows = each(modules, "ranks"), torch.zeros(7, 32)
    wrong: list[tuple[str, dict[str, Any]]] = [
        (r"y: expected 1 to 8 tensors, found 0", {"y": []}),
        (r"y: expected 1 to 8 tensors, found 9", {"y": y * 3}),
        (r"a: expected as many tensors as y, 3, found 2", {"a": a[:2]}),
        (r"ranks: expected as many tensors as y, 3, found 1", {"ranks": ranks[:1]}),
        (r"x: expected shape \(T, I\), found \[16\]", {"x": modules[0]["x"][0]}),
        (r"module 1: y\.shape\[0\]: expected x\.shape\[0\] = 4", {"y": [y[0], y[1][:3], y[2]]}),
        (r"module 2: b\.shape\[1\]: expected y\.shape\[1\] = 12", {"b": [b[0], b[1], b[1]]}),
        (r"module 1: y: expected the dtype of x", {"y": [y[0], y[1].half(), y[2]]}),
        (
            r"module 1: a: expected as many adapters as module 0, 2, found 1",
            {
                "a": [a[0], a[1][:1], a[2]],
                "b": [b[0], b[1][:1], b[2]],
                "scale": [],
                "ranks": [],
            },
        ),
        (
            r"module 2: ranks\[0\]: expected a rank in \[0, 8\], found 9",
            {"ranks": [*ranks[:2], torch.tensor([9, 0], dtype=torch.int32)]},
        ),
        (
            r"module 0: y: expected memory apart from that of another y",
            {"y": [y[0], y[0], y[2]], "b": [b[0], b[0], b[2]]},
        ),
        (
            r"module 1: y: expected memory apart from that of another y",
            {"y": [y[0], rows[:4, :32], rows[3:, 20:]]},
        ),
        (
            r"module 2: y: expected rows that do not overlap, found shape \[4, 12\]",
            {"y": [*y[:2], torch.zeros(21).as_strided((4, 12), (3, 1))]},
        ),
        (
            r"module 0: y: expected memory apart from that of a, found an overlap",
            {"a": [a[0], a[1], y[0].new_zeros(0).set_(y[0].untyped_storage(), 0, (2, 8, 4))]},
        ),
    ]
    for message, changed in wrong:
        with pytest.raises(ValueError, match="lora_apply_siblings_: " + message):
            call(modules, **changed)
    assert all(torch.equal(now, then) for now, then in zip(y, before, strict=True))


@pytest.mark.parametrize("name", ["y", "x", "a", "b", "adapter_ids", "scale", "ranks"])
def test_a_meta_tensor_among_siblings_is_named(name: str) -> None:
    """The fake kernel runs where one of them is on meta, and would do nothing without a word."""
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


def test_siblings_refuse_gradients() -> None:
    modules = family(Shape(4, 16, 24, (8, 3)), torch.float32, seed=9)
    with pytest.raises(RuntimeError, match=r"lora_apply_siblings_ has no backward.*lora_apply"):
        call(modules, a=[m["a"].clone().requires_grad_() for m in modules])


def test_a_change_of_siblings_is_counted() -> None:
    """Or autograd would not notice that a tensor it had saved is another one now."""
    modules = family(Shape(4, 16, 24, (8, 3)), torch.float32, seed=11)
    with torch.no_grad():
        before = [m["y"]._version for m in modules]
        call(modules)
    assert [m["y"]._version for m in modules] == [v + 1 for v in before]


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
