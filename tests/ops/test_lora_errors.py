"""What every op refuses, and in which words: op, argument, expected, found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Inputs, Shape, make_inputs

from lora_ext import ops

SHAPE = Shape(4, 16, 24, (8, 3))
Change = Callable[[Inputs], dict[str, Any]]


def apply_(i: Inputs) -> None:
    tail = (i["adapter_ids"], i["scale"], i["ranks"], i["page_table"], i.get("plan"))
    ops.lora_apply_(i["y"], i["x"], i["a"], i["b"], *tail)


def strided_columns(*shape: int) -> torch.Tensor:
    return torch.zeros(shape[0], 2 * shape[1])[:, ::2]


BANK: list[tuple[str, Change]] = [
    (r"x must have shape \(T, I\), got \[4\]", lambda i: {"x": i["x"][:, 0]}),
    (r"x must be float32, float16, bfloat16 or float64", lambda i: {"x": i["x"].int()}),
    (r"y must have the dtype of x, Float, got Half", lambda i: {"y": i["y"].half()}),
    (r"y must have shape \(T, O\), got \[24\]", lambda i: {"y": i["y"][0]}),
    (r"y\.shape\[0\] must equal x\.shape\[0\] = 4, got 3", lambda i: {"y": i["y"][:3]}),
    (r"y must be contiguous in its last dim", lambda i: {"y": strided_columns(4, 24)}),
    (r"a must have the dtype of x, Float, got Double", lambda i: {"a": i["a"].double()}),
    (r"a must have shape \(A, R, I\), got \[8, 16\]", lambda i: {"a": i["a"][0]}),
    (r"a\.shape\[2\] must equal x\.shape\[1\] = 16, got 15", lambda i: {"a": i["a"][:, :, 1:]}),
    (r"b must have the dtype of x, Float, got BFloat16", lambda i: {"b": i["b"].bfloat16()}),
    (r"b\.shape\[0\] must equal a\.shape\[0\] = 2, got 1", lambda i: {"b": i["b"][:1]}),
    (r"b\.shape\[2\] must equal a\.shape\[1\] = 8, got 7", lambda i: {"b": i["b"][:, :, 1:]}),
    (r"b\.shape\[1\] must equal y\.shape\[1\] = 24, got 20", lambda i: {"b": i["b"][:, 4:]}),
    (
        r"the rank of a must be at most 256, got 257",
        lambda i: {"a": torch.zeros(2, 257, 16), "b": torch.zeros(2, 24, 257)},
    ),
    (r"adapter_ids must be int64 or int32, got Float", lambda i: {"adapter_ids": torch.zeros(4)}),
    (
        r"adapter_ids must have shape \(4,\), one id per row, got \[3\]",
        lambda i: {"adapter_ids": i["adapter_ids"][:3]},
    ),
    (
        r"adapter_ids\[2\] must be in \[-1, 2\), got 2",
        lambda i: {"adapter_ids": torch.tensor([0, 1, 2, -2])},
    ),
    (
        r"adapter_ids\[0\] must be in \[-1, 2\), got -2",
        lambda i: {"adapter_ids": torch.tensor([-2, 1, 0, 0])},
    ),
    (r"scale must be Float, got Double", lambda i: {"scale": i["scale"].double()}),
    (r"scale must have shape \(2,\), got \[1\]", lambda i: {"scale": i["scale"][:1]}),
    (r"ranks must be Int, got Long", lambda i: {"ranks": i["ranks"].long()}),
    (
        r"ranks\[1\] must be in \[0, 8\], got 9",
        lambda i: {"ranks": torch.tensor([8, 9], dtype=torch.int32)},
    ),
    (
        r"ranks\[0\] must be in \[0, 8\], got -1",
        lambda i: {"ranks": torch.tensor([-1, 8], dtype=torch.int32)},
    ),
    (
        r"plan must be lora_plan\(\) of 4 rows and 2 adapters",
        lambda i: {"plan": ops.lora_plan(torch.zeros(5, dtype=torch.long), 2)},
    ),
]
PAGED: list[tuple[str, Change]] = [
    (r"page_table must be int32, got Long", lambda i: {"page_table": i["page_table"].long()}),
    (r"page_table must have shape \(A, R / 8\)", lambda i: {"page_table": i["page_table"][0]}),
    (r"ranks is required with a page_table", lambda i: {"ranks": None}),
    (r"a\.shape\[1\] must be 8 \(ranks of a page\), got 7", lambda i: {"a": i["a"][:, 1:]}),
    (r"b\.shape\[2\] must be 8 \(ranks of a page\), got 7", lambda i: {"b": i["b"][:, :, 1:]}),
    (
        r"pages of b must be contiguous in their last dimension",
        lambda i: {"b": i["b"].transpose(1, 2).contiguous().transpose(1, 2)},
    ),
    (
        r"page_table\[0, 0\] must be in \[0, 3\), got 3: adapter 0 has rank 8",
        lambda i: {"page_table": torch.tensor([[3], [0]], dtype=torch.int32)},
    ),
    (
        r"page_table\[1, 0\] must be in \[0, 3\), got -1: adapter 1 has rank 3",
        lambda i: {"page_table": torch.tensor([[2], [-1]], dtype=torch.int32)},
    ),
]


@pytest.mark.parametrize(
    ("message", "change", "paged"),
    [pytest.param(m, c, False, id=m) for m, c in BANK]
    + [pytest.param(m, c, True, id=m) for m, c in PAGED],
)
def test_wrong_input_is_named_and_nothing_is_touched(
    message: str, change: Change, paged: bool
) -> None:
    inputs = make_inputs(SHAPE, torch.float32, seed=1, paged=paged)
    inputs["adapter_ids"] = torch.tensor([0, 1, -1, 0])
    changed = {**inputs, **change(inputs)}
    before = changed["y"].clone()
    with pytest.raises(ValueError, match="lora_apply_: .*" + message):
        apply_(changed)
    assert torch.equal(changed["y"], before)


def test_output_must_not_overlap() -> None:
    inputs = make_inputs(SHAPE, torch.float32)
    for y in (inputs["y"][:1].expand(4, -1), torch.zeros(40).as_strided((4, 24), (4, 1))):
        with pytest.raises(ValueError, match="lora_apply_: rows of y must not overlap"):
            apply_({**inputs, "y": y})
    flat = torch.zeros(114)
    with pytest.raises(RuntimeError, match="single memory location"):
        apply_({**inputs, "x": flat[50:].view(4, 16), "y": flat[:96].view(4, 24)})


def test_expand_checks_v() -> None:
    i = make_inputs(SHAPE, torch.bfloat16)
    for message, v in [
        ("v must be Float, got BFloat16", torch.zeros(4, 8, dtype=torch.bfloat16)),
        (r"v\.shape\[0\] must equal y\.shape\[0\] = 4, got 3", torch.zeros(3, 8)),
        (r"v\.shape\[1\] must equal the rank of b, 8, got 9", torch.zeros(4, 9)),
        (r"v must have shape \(T, R\), got \[8\]", torch.zeros(8)),
    ]:
        with pytest.raises(ValueError, match=f"lora_expand_: {message}"):
            ops.lora_expand_(i["y"], v, i["b"], i["adapter_ids"])


def test_segments_are_checked() -> None:
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    for message, args in [
        (r"seg_indptr must have shape \(3,\), got \[2\]", (ints(0, 4), ints(0, 1), 4)),
        (r"must not decrease .* got seg_indptr\[2\] = 1", (ints(0, 2, 1), ints(0, 1), 4)),
        (r"must stay in \[0, 4\], got seg_indptr\[1\] = 5", (ints(0, 5), ints(0), 4)),
        (r"seg_adapter must be Int, got Long", (ints(0, 4), torch.zeros(1).long(), 4)),
        (r"num_tokens must not be negative, got -1", (ints(0), ints(), -1)),
    ]:
        with pytest.raises(ValueError, match=f"lora_segment_ids: .*{message}"):
            ops.lora_segment_ids(*args)


def test_ops_without_a_backward_say_so() -> None:
    i = make_inputs(SHAPE, torch.float32)
    x = i["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"lora_apply_ has no backward; .* use lora_apply"):
        ops.lora_apply_(i["y"], x, i["a"], i["b"], i["adapter_ids"])
    with pytest.raises(RuntimeError, match="lora_shrink has no backward"):
        ops.lora_shrink(x, i["a"], i["adapter_ids"])
    with torch.no_grad():
        ops.lora_apply_(i["y"], x, i["a"], i["b"], i["adapter_ids"])


def test_pages_receive_no_gradient() -> None:
    i = make_inputs(SHAPE, torch.float32, paged=True)
    a = i["a"].requires_grad_()
    y = ops.lora_apply(i["x"], a, i["b"], i["adapter_ids"], i["scale"], i["ranks"], i["page_table"])
    with pytest.raises(NotImplementedError, match="pages receive no gradient"):
        y.sum().backward()


def test_nothing_to_do_is_done_at_once() -> None:
    x, y = torch.randn(4, 16), torch.randn(4, 24)
    ids = torch.full((4,), -1)
    before = y.clone()
    ops.lora_apply_(y, x, torch.zeros(0, 8, 16), torch.zeros(0, 24, 8), ids)  # no adapters
    ops.lora_apply_(y, x, torch.zeros(2, 0, 16), torch.zeros(2, 24, 0), ids)  # no ranks
    ops.lora_apply_(y[:0], x[:0], torch.zeros(2, 8, 16), torch.zeros(2, 24, 8), ids[:0])  # no rows
    assert torch.equal(y, before)
    many = torch.zeros(40, dtype=torch.long)  # no in-features: a delta of zero, not of old scratch
    nothing = ops.lora_apply(torch.zeros(40, 0), torch.zeros(1, 8, 0), torch.ones(1, 16, 8), many)
    assert torch.equal(nothing, torch.zeros(40, 16))
    empty = ops.lora_apply(x[:0], torch.zeros(2, 8, 16), torch.zeros(2, 24, 8), ids[:0])
    assert empty.shape == (0, 24)


@pytest.mark.parametrize("field", ["chunks", "slot", "start", "row"])
@pytest.mark.parametrize("value", [-1, 10**8])
def test_a_plan_that_points_outside_is_refused(field: str, value: int) -> None:
    inputs = make_inputs(SHAPE, torch.float32)
    inputs["adapter_ids"] = torch.tensor([0, 1, -1, 0])
    plan = ops.lora_plan(inputs["adapter_ids"], 2)
    plan[{"chunks": 0, "slot": 8, "start": 9, "row": 8 + 4 * 2}[field]] = value
    with pytest.raises(ValueError, match=r"plan must be lora_plan\(\) of these adapter_ids"):
        apply_({**inputs, "plan": plan})


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_a_plan_of_other_ids_is_refused(ids_dtype: torch.dtype) -> None:
    inputs = make_inputs(SHAPE, torch.float32)
    inputs["adapter_ids"] = torch.tensor([0, 1, -1, 0], dtype=ids_dtype)
    plan = ops.lora_plan(inputs["adapter_ids"].flip(0), 2)
    with pytest.raises(ValueError, match=r"plan must be lora_plan\(\) of these adapter_ids"):
        apply_({**inputs, "plan": plan})


def test_a_plan_that_nobody_made_is_refused() -> None:
    inputs = make_inputs(SHAPE, torch.float32)
    empty = torch.zeros_like(ops.lora_plan(inputs["adapter_ids"], 2))
    with pytest.raises(ValueError, match=r"plan must be lora_plan\(\) of these adapter_ids"):
        apply_({**inputs, "plan": empty})


def test_pages_above_the_largest_rank_are_refused() -> None:
    inputs = make_inputs(SHAPE, torch.float32, paged=True)
    table = torch.zeros(2, 2048, dtype=torch.int32)  # rank 16384
    with pytest.raises(ValueError, match=r"page_table\.shape\[1\] must be at most 32"):
        apply_({**inputs, "page_table": table})


def test_both_factors_have_as_many_pages() -> None:
    inputs = make_inputs(SHAPE, torch.float32, paged=True)
    with pytest.raises(ValueError, match=r"b\.shape\[0\] must equal a\.shape\[0\] = \d+ pages"):
        apply_({**inputs, "b": inputs["b"][:1]})


@pytest.mark.parametrize("adapters", [2**31, 2**32 + 1])
def test_more_adapters_than_an_int32_counts_are_refused(adapters: int) -> None:
    a, b = torch.zeros(1, 8, 4).expand(adapters, 8, 4), torch.zeros(1, 5, 8).expand(adapters, 5, 8)
    with pytest.raises(ValueError, match=r"number of adapters must be below 2\^24"):
        ops.lora_apply(torch.zeros(1, 4), a, b, torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("name", ["y", "x", "a", "b", "adapter_ids", "scale"])
def test_a_meta_tensor_among_others_is_refused(name: str) -> None:
    inputs = make_inputs(SHAPE, torch.float32)
    with pytest.raises(ValueError, match="lora_apply_: expected all tensors on one device"):
        apply_({**inputs, name: inputs[name].to("meta")})


def test_tangents_are_refused() -> None:
    i = make_inputs(SHAPE, torch.float32)
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(i["x"], torch.ones_like(i["x"]))
        for op in (
            lambda: apply_({**i, "x": x}),
            lambda: ops.lora_shrink(x, i["a"], i["adapter_ids"]),
            lambda: ops.lora_apply(x, i["a"], i["b"], i["adapter_ids"]),
        ):
            with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
                op()


def test_a_gradient_of_torch_func_is_refused() -> None:
    i = make_inputs(SHAPE, torch.float32)
    with pytest.raises(RuntimeError, match="lora_shrink has no backward"):
        torch.func.grad(lambda x: ops.lora_shrink(x, i["a"], i["adapter_ids"]).sum())(i["x"])
    with pytest.raises(NotImplementedError, match="lora_shrink has no forward-mode derivative"):
        torch.func.jvp(lambda x: ops.lora_shrink(x, i["a"], i["adapter_ids"]), (i["x"],), (i["x"],))
    with pytest.raises(NotImplementedError, match="lora_apply has no forward-mode derivative"):
        torch.func.jvp(
            lambda x: ops.lora_apply(x, i["a"], i["b"], i["adapter_ids"]), (i["x"],), (i["x"],)
        )


def test_scale_that_wants_a_gradient_is_refused() -> None:
    i = make_inputs(SHAPE, torch.float32)
    scale = i["scale"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="lora_apply_ has no backward"):
        apply_({**i, "scale": scale})
    y = ops.lora_apply(i["x"], i["a"], i["b"], i["adapter_ids"], scale)
    with pytest.raises(NotImplementedError, match="scale receives no gradient"):
        y.sum().backward()


def test_autograd_notices_a_saved_tensor_that_was_changed() -> None:
    i = make_inputs(SHAPE, torch.float32)
    saved = torch.zeros_like(i["y"]).requires_grad_().exp()  # the backward of exp reads its result
    with torch.no_grad():
        apply_({**i, "y": saved})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
