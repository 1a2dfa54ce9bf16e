"""Errors of the LoRA ops; messages contain op, argument, expected and found value."""

from __future__ import annotations

import pytest
import torch
from cases import Inputs, Shape, make_inputs
from cases_wrong import Change, ints

from lora_ext import ops, reference

SHAPE = Shape(4, 16, 24, (8, 3))


def apply_(i: Inputs) -> None:
    tail = (i["adapter_ids"], i["scale"], i["ranks"], i["page_table"], i.get("plan"))
    ops.lora_apply_(i["y"], i["x"], i["a"], i["b"], *tail)


def strided_columns(*shape: int) -> torch.Tensor:
    return torch.zeros(shape[0], 2 * shape[1])[:, ::2]


def with_ids(*values: int) -> Change:
    return lambda i: {"adapter_ids": torch.tensor(values)}


def pages(*values: int) -> Change:
    return lambda i: {"page_table": ints(*values)[:, None]}


BANK: list[tuple[str, Change]] = [
    (r"x: expected shape \(T, I\), found \[4\]", lambda i: {"x": i["x"][:, 0]}),
    (r"x: expected float32, float16, bfloat16 or float64", lambda i: {"x": i["x"].int()}),
    (r"y: expected the dtype of x, Float, found Half", lambda i: {"y": i["y"].half()}),
    (r"y: expected shape \(T, O\), found \[24\]", lambda i: {"y": i["y"][0]}),
    (r"y\.shape\[0\]: expected x\.shape\[0\] = 4, found 3", lambda i: {"y": i["y"][:3]}),
    (r"y: expected contiguous rows, found strides", lambda i: {"y": strided_columns(4, 24)}),
    (r"a: expected the dtype of x, Float, found Double", lambda i: {"a": i["a"].double()}),
    (r"a: expected shape \(A, R, I\), found \[8, 16\]", lambda i: {"a": i["a"][0]}),
    (r"a\.shape\[2\]: expected x\.shape\[1\] = 16, found 15", lambda i: {"a": i["a"][:, :, 1:]}),
    (r"b: expected the dtype of x, Float, found BFloat16", lambda i: {"b": i["b"].bfloat16()}),
    (r"b\.shape\[0\]: expected a\.shape\[0\] = 2, found 1", lambda i: {"b": i["b"][:1]}),
    (r"b\.shape\[2\]: expected a\.shape\[1\] = 8, found 7", lambda i: {"b": i["b"][:, :, 1:]}),
    (r"b\.shape\[1\]: expected y\.shape\[1\] = 24, found 20", lambda i: {"b": i["b"][:, 4:]}),
    (
        r"a\.shape\[1\]: expected a rank of at most 2147418112, found 2147483647",
        lambda i: {
            "a": torch.zeros(1, 1, 16).expand(2, 2**31 - 1, 16),
            "b": torch.zeros(1, 24, 1).expand(2, 24, 2**31 - 1),
        },
    ),
    (
        r"adapter_ids: expected int64 or int32, found Float",
        lambda i: {"adapter_ids": torch.zeros(4)},
    ),
    (r"adapter_ids: expected shape \(4,\), one id per row, found \[3\]", with_ids(0, 1, -1)),
    (r"adapter_ids\[2\]: expected .* in \[-1, 2\), found 2", with_ids(0, 1, 2, -2)),
    (r"adapter_ids\[0\]: expected .* in \[-1, 2\), found -2", with_ids(-2, 1, 0, 0)),
    (r"scale: expected Float, found Double", lambda i: {"scale": i["scale"].double()}),
    (r"scale: expected shape \(2,\), found \[1\]", lambda i: {"scale": i["scale"][:1]}),
    (r"ranks: expected Int, found Long", lambda i: {"ranks": i["ranks"].long()}),
    (r"ranks\[1\]: expected .* in \[0, 8\], found 9", lambda i: {"ranks": ints(8, 9)}),
    (r"ranks\[0\]: expected .* in \[0, 8\], found -1", lambda i: {"ranks": ints(-1, 8)}),
    (
        r"plan: expected lora_plan\(\) of 4 rows and 2 adapters",
        lambda i: {"plan": ops.lora_plan(torch.zeros(5, dtype=torch.long), 2)},
    ),
]
PAGED: list[tuple[str, Change]] = [
    (r"page_table: expected Int, found Long", lambda i: {"page_table": i["page_table"].long()}),
    (r"page_table: expected shape \(A, R / 8\)", lambda i: {"page_table": i["page_table"][0]}),
    (r"ranks: expected the rank of each slot of the page_table, found", lambda i: {"ranks": None}),
    (r"a\.shape\[1\]: expected 8, the ranks of a page, found 7", lambda i: {"a": i["a"][:, 1:]}),
    (r"b\.shape\[2\]: expected 8, the ranks of a page, found 7", lambda i: {"b": i["b"][:, :, 1:]}),
    (
        r"b: expected pages that are contiguous in their last dimension",
        lambda i: {"b": i["b"].transpose(1, 2).contiguous().transpose(1, 2)},
    ),
    (r"page_table\[0, 0\]: expected .* in \[0, 3\), as adapter 0 has rank 8, found 3", pages(3, 0)),
    (r"page_table\[1, 0\]: expected .* in \[0, 3\), as adapter 1 has rank 3, found", pages(2, -1)),
    (r"b\.shape\[0\]: expected a\.shape\[0\] = \d+ pages", lambda i: {"b": i["b"][:1]}),
    (
        r"page_table\.shape\[1\]: expected at most 268427264",
        lambda i: {"page_table": ints(0, 0)[:, None].expand(2, 2**28)},
    ),
]


@pytest.mark.parametrize(
    ("message", "change", "paged"),
    [pytest.param(m, c, False, id=m) for m, c in BANK]
    + [pytest.param(m, c, True, id=m) for m, c in PAGED],
)
def test_wrong_input_raises_and_changes_nothing(message: str, change: Change, paged: bool) -> None:
    inputs = make_inputs(SHAPE, torch.float32, seed=1, paged=paged)
    inputs["adapter_ids"] = torch.tensor([0, 1, -1, 0])
    changed = {**inputs, **change(inputs)}
    before = changed["y"].clone()
    with pytest.raises(ValueError, match="lora_apply_: .*" + message):
        apply_(changed)
    assert torch.equal(changed["y"], before)


def test_overlapping_output_rows_raise() -> None:
    inputs = make_inputs(SHAPE, torch.float32)
    for y in (inputs["y"][:1].expand(4, -1), torch.zeros(40).as_strided((4, 24), (4, 1))):
        with pytest.raises(ValueError, match="lora_apply_: y: expected rows that do not overlap"):
            apply_({**inputs, "y": y})


def square_inputs(paged: bool) -> Inputs:
    """Return inputs whose sizes and 32-bit dtypes allow every argument to share the memory of y."""
    inputs = make_inputs(Shape(16, 16, 16, (8, 8)), torch.float32, seed=1, paged=paged)
    names = ("y", "x", "a", "b", "scale")
    inputs |= {name: inputs[name].nan_to_num() for name in names}
    ids = inputs["adapter_ids"].clamp(min=0).int()
    return {**inputs, "adapter_ids": ids, "plan": ops.lora_plan(ids, 2)}


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    "name", ["x", "a", "b", "scale", "adapter_ids", "ranks", "page_table", "plan"]
)
def test_output_in_the_memory_of_another_argument_raises(name: str, paged: bool) -> None:
    inputs = square_inputs(paged)
    if inputs[name] is None:
        pytest.skip("a bank has no page table")
    size = inputs[name].numel()
    for start in (0, 7, 256 - size // 2 - 1, 255):  # The overlap shrinks to one element.
        memory = torch.zeros(256 + size)
        memory[:256] = inputs["y"].flatten()
        within = memory[start:][:size].view(inputs[name].dtype).view(inputs[name].shape)
        within.copy_(inputs[name])
        before = memory.clone()
        expected = f"expected memory that does not overlap that of {name}, found an overlap"
        message = f"lora_apply_: y: {expected}"
        with pytest.raises(ValueError, match=message):
            apply_({**inputs, "y": memory[:256].view(16, 16), name: within})
        assert torch.equal(memory, before)


def test_every_in_place_op_raises_for_an_overlap() -> None:
    i = square_inputs(paged=False)
    y, x, ids = i["y"], i["x"], i["adapter_ids"]
    v = torch.zeros(16, 8)
    segments = torch.tensor([0, 16], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for name, call in [
        ("v", lambda m: ops.lora_expand_(m(y), m(v), i["b"], ids)),
        ("b", lambda m: ops.lora_expand_(m(y), v, m(i["b"]), ids)),
        ("x", lambda m: ops.bgmv_(m(y), m(x), i["a"], i["b"], ids)),
        ("a", lambda m: ops.bgmv_(m(y), x, m(i["a"]), i["b"], ids)),
        ("b", lambda m: ops.sgmv_(m(y), x, i["a"], m(i["b"]), *segments)),
        ("scale", lambda m: ops.sgmv_(m(y), x, i["a"], i["b"], *segments, m(i["scale"]))),
    ]:
        memory = torch.zeros(512)
        with pytest.raises(ValueError, match=f"memory that does not overlap that of {name}"):
            call(lambda t, to=memory: to[: t.numel()].view(t.shape))


def digits(*shape: int) -> torch.Tensor:
    """Return small integers, whose sums of products are exact."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(1)).float()


def packed(rows: int, *widths: int) -> list[torch.Tensor]:
    """Return slices of the columns of one buffer, like q, k and v of one projection."""
    return list(digits(rows, sum(widths)).split(widths, 1))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_output_between_rows_of_another_argument_is_allowed(rows: int) -> None:
    a, b, ids = digits(1, 8, 16), digits(1, 24, 8), torch.zeros(rows, dtype=torch.long)
    columns, reverse = packed(rows, 24, 3, 16), packed(rows, 16, 24)
    pairs = [
        (columns[0], columns[2]),
        (reverse[1], reverse[0]),
        *((t[::2], t[1::2, 8:]) for t in [digits(2 * rows, 24)]),
        *((t[1::2], t[::2, :16]) for t in [digits(2 * rows, 24)]),
        *((t[:rows], t[rows:, :16]) for t in [digits(2 * rows, 24)]),
        *((t[rows:], t[:rows, 8:]) for t in [digits(2 * rows, 24)]),
    ]
    for y, x in pairs:
        want = reference.lora_apply_(y.clone(), x.clone(), a, b, ids)
        kept = x.clone()
        assert torch.equal(ops.lora_apply_(y, x, a, b, ids), want)
        assert torch.equal(x, kept)
    # The adapters are stored in the gaps between the rows of y, with the same row stride.
    if rows > 1:
        buffer = digits(8 * rows, 24 + 16)
        y, held = buffer[::8, :24], buffer[:8, 24:]
        want = reference.lora_apply_(y.clone(), torch.ones(rows, 16), held[None], b, ids)
        assert torch.equal(ops.lora_apply_(y, torch.ones(rows, 16), held[None], b, ids), want)


def test_overlaps_of_matrices_with_equal_row_strides_are_found_exactly() -> None:
    """Check that two windows of one buffer raise if, and only if, they share an element."""
    a, b = torch.zeros(1, 8, 2), torch.zeros(1, 2, 8)
    buffer = torch.zeros(6, 5)
    where = torch.arange(30).view(6, 5)
    windows = [(slice(r, r + 2), slice(c, c + 2)) for r in range(5) for c in range(4)]
    windows += [(slice(r, r + 3, 2), slice(c, c + 2)) for r in range(4) for c in range(4)]
    first_id = torch.zeros(2, dtype=torch.long)
    refused = 0
    for one in windows:
        for other in windows:
            first, second = (set(where[w].flatten().tolist()) for w in (one, other))
            shared = not first.isdisjoint(second)
            try:
                ops.lora_apply_(buffer[one], buffer[other], a, b, first_id)
                assert not shared, (one, other)
            except ValueError:
                assert shared, (one, other)
                refused += 1
    assert 0 < refused < len(windows) ** 2


def test_expand_raises_for_an_invalid_v() -> None:
    i = make_inputs(SHAPE, torch.bfloat16)
    for message, v in [
        ("v: expected Float, found BFloat16", torch.zeros(4, 8, dtype=torch.bfloat16)),
        (r"v\.shape\[0\]: expected y\.shape\[0\] = 4, found 3", torch.zeros(3, 8)),
        (r"v\.shape\[1\]: expected the rank of b, 8, found 9", torch.zeros(4, 9)),
        (r"v: expected shape \(T, R\), found \[8\]", torch.zeros(8)),
    ]:
        with pytest.raises(ValueError, match=f"lora_expand_: {message}"):
            ops.lora_expand_(i["y"], v, i["b"], i["adapter_ids"])


def test_invalid_segments_raise() -> None:
    for message, args in [
        (r"seg_indptr: expected shape \(3,\), found \[2\]", (ints(0, 4), ints(0, 1), 4)),
        (
            r"seg_indptr\[2\]: expected .* does not decrease .*, found 1",
            (ints(0, 2, 1), ints(0, 1), 4),
        ),
        (r"seg_indptr\[1\]: expected .* stays in \[0, 4\], found 5", (ints(0, 5), ints(0), 4)),
        (r"seg_adapter: expected Int, found Long", (ints(0, 4), torch.zeros(1).long(), 4)),
        (r"num_tokens: expected a number of at least 0, found -1", (ints(0), ints(), -1)),
    ]:
        with pytest.raises(ValueError, match=f"lora_segment_ids: .*{message}"):
            ops.lora_segment_ids(*args)


def test_ops_without_a_backward_raise_for_inputs_that_require_gradients() -> None:
    i = make_inputs(SHAPE, torch.float32)
    x = i["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"lora_apply_ has no backward; .* use lora_apply"):
        ops.lora_apply_(i["y"], x, i["a"], i["b"], i["adapter_ids"])
    with pytest.raises(RuntimeError, match="lora_shrink has no backward"):
        ops.lora_shrink(x, i["a"], i["adapter_ids"])
    with torch.no_grad():
        ops.lora_apply_(i["y"], x, i["a"], i["b"], i["adapter_ids"])


def test_gradients_of_pages_raise() -> None:
    i = make_inputs(SHAPE, torch.float32, paged=True)
    a = i["a"].requires_grad_()
    y = ops.lora_apply(i["x"], a, i["b"], i["adapter_ids"], i["scale"], i["ranks"], i["page_table"])
    with pytest.raises(NotImplementedError, match="pages receive no gradient"):
        y.sum().backward()


def test_empty_inputs_return_at_once() -> None:
    x, y = torch.randn(4, 16), torch.randn(4, 24)
    ids = torch.full((4,), -1)
    before = y.clone()
    ops.lora_apply_(y, x, torch.zeros(0, 8, 16), torch.zeros(0, 24, 8), ids)  # no adapters
    ops.lora_apply_(y, x, torch.zeros(2, 0, 16), torch.zeros(2, 24, 0), ids)  # no ranks
    ops.lora_apply_(y[:0], x[:0], torch.zeros(2, 8, 16), torch.zeros(2, 24, 8), ids[:0])  # no rows
    assert torch.equal(y, before)
    # Without in-features, the result is zeros, not uninitialised memory.
    many = torch.zeros(40, dtype=torch.long)
    nothing = ops.lora_apply(torch.zeros(40, 0), torch.zeros(1, 8, 0), torch.ones(1, 16, 8), many)
    assert torch.equal(nothing, torch.zeros(40, 16))
    empty = ops.lora_apply(x[:0], torch.zeros(2, 8, 16), torch.zeros(2, 24, 8), ids[:0])
    assert empty.shape == (0, 24)


@pytest.mark.parametrize("field", ["chunks", "slot", "start", "row"])
@pytest.mark.parametrize("value", [-1, 10**8])
def test_plan_with_an_index_out_of_range_raises(field: str, value: int) -> None:
    inputs = make_inputs(SHAPE, torch.float32)
    inputs["adapter_ids"] = torch.tensor([0, 1, -1, 0])
    plan = ops.lora_plan(inputs["adapter_ids"], 2)
    plan[{"chunks": 0, "slot": 8, "start": 9, "row": 8 + 4 * 2}[field]] = value
    with pytest.raises(ValueError, match=r"plan: expected lora_plan\(\) of these adapter_ids"):
        apply_({**inputs, "plan": plan})


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_plan_of_other_ids_raises(ids_dtype: torch.dtype) -> None:
    inputs = make_inputs(SHAPE, torch.float32)
    inputs["adapter_ids"] = torch.tensor([0, 1, -1, 0], dtype=ids_dtype)
    plan = ops.lora_plan(inputs["adapter_ids"].flip(0), 2)
    for other in (plan, torch.zeros_like(plan)):  # A tensor of zeros is not a plan.
        with pytest.raises(ValueError, match=r"plan: expected lora_plan\(\) of these adapter_ids"):
            apply_({**inputs, "plan": other})


@pytest.mark.parametrize("adapters", [2**31, 2**32 + 1])
def test_more_adapters_than_int32_can_represent_raise(adapters: int) -> None:
    a, b = torch.zeros(1, 8, 4).expand(adapters, 8, 4), torch.zeros(1, 5, 8).expand(adapters, 5, 8)
    with pytest.raises(ValueError, match=r"a: expected fewer than 2\^24 adapters"):
        ops.lora_apply(torch.zeros(1, 4), a, b, torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("name", ["y", "x", "a", "b", "adapter_ids", "scale"])
def test_meta_tensor_among_others_raises(name: str) -> None:
    inputs = make_inputs(SHAPE, torch.float32)
    with pytest.raises(ValueError, match="lora_apply_: expected all tensors on one device"):
        apply_({**inputs, name: inputs[name].to("meta")})


def test_tangents_raise() -> None:
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


def test_gradient_of_torch_func_raises() -> None:
    i = make_inputs(SHAPE, torch.float32)
    with pytest.raises(RuntimeError, match="lora_shrink has no backward"):
        torch.func.grad(lambda x: ops.lora_shrink(x, i["a"], i["adapter_ids"]).sum())(i["x"])
    with pytest.raises(NotImplementedError, match="lora_shrink has no forward-mode derivative"):
        torch.func.jvp(lambda x: ops.lora_shrink(x, i["a"], i["adapter_ids"]), (i["x"],), (i["x"],))
    with pytest.raises(NotImplementedError, match="lora_apply has no forward-mode derivative"):
        torch.func.jvp(
            lambda x: ops.lora_apply(x, i["a"], i["b"], i["adapter_ids"]), (i["x"],), (i["x"],)
        )


def test_scale_that_requires_a_gradient_raises() -> None:
    i = make_inputs(SHAPE, torch.float32)
    scale = i["scale"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="lora_apply_ has no backward"):
        apply_({**i, "scale": scale})
    y = ops.lora_apply(i["x"], i["a"], i["b"], i["adapter_ids"], scale)
    with pytest.raises(NotImplementedError, match="scale receives no gradient"):
        y.sum().backward()


def test_autograd_detects_a_saved_tensor_that_was_changed() -> None:
    i = make_inputs(SHAPE, torch.float32)
    saved = torch.zeros_like(i["y"]).requires_grad_().exp()  # The backward of exp reads its result.
    with torch.no_grad():
        apply_({**i, "y": saved})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
