"""``lora_linear_apart``, which equals ``lora_linear`` for factors that are not in a bank."""

from __future__ import annotations

import pytest
import torch
from cases import Shape
from cases_train import LEAVES, train_inputs
from torch import Tensor

from lora_ext import ops

SHAPE = Shape(70, 33, 21, (5, 16, 9), "interleaved")


def parts(p: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[dict, list, list]:
    i = train_inputs(SHAPE, dtype, seed=1, dropout_p=p)
    a = [s[:r].clone().requires_grad_() for s, r in zip(i["a"], SHAPE.ranks, strict=True)]
    b = [s[:, :r].clone().requires_grad_() for s, r in zip(i["b"], SHAPE.ranks, strict=True)]
    return i, a, b


def apart(i: dict, a: list[Tensor], b: list[Tensor]) -> Tensor:
    tail = i["adapter_ids"], i["scale"], i["ranks"], i["dropout_p"], i["seed"]
    return ops.lora_linear_apart(i["x"], i["weight"], i["bias"], a, b, *tail)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(
    "frozen", [(), ("x", "weight", "bias"), ("a",), ("b",), ("x", "b")], ids=str
)
def test_separate_factors_are_bitwise_equal_to_a_bank(p: float, frozen: tuple[str, ...]) -> None:
    i, a, b = parts(p)
    for name in LEAVES:
        i[name].requires_grad_(name not in frozen)
    for factors, name in ((a, "a"), (b, "b")):
        for f in factors:
            f.requires_grad_(name not in frozen)
    tail = i["adapter_ids"], i["scale"], i["ranks"], i["dropout_p"], i["seed"]
    expected = ops.lora_linear(*(i[name] for name in LEAVES), *tail)
    expected.backward(i["dy"])
    wanted = {name: i[name].grad for name in LEAVES}
    for name in LEAVES:
        i[name].grad = None
    y = apart(i, a, b)
    y.backward(i["dy"])
    assert torch.equal(y, expected)
    for name in ("x", "weight", "bias"):
        got = i[name].grad
        assert (got is None) == (name in frozen) and (got is None or torch.equal(got, wanted[name]))
    for s, r in enumerate(SHAPE.ranks):
        for got, name, own in ((a[s].grad, "a", slice(r)), (b[s].grad, "b", (..., slice(r)))):
            assert (got is None) == (name in frozen)
            assert got is None or torch.equal(got, wanted[name][s][own])


def test_no_bank_is_saved_for_the_backward() -> None:
    i, a, b = parts()
    x = i["x"].requires_grad_()
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    plan = ops.lora_plan(i["adapter_ids"], 3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.lora_linear_apart(x, None, None, a, b, i["adapter_ids"], None, i["ranks"], plan=plan)
    v = 70 * 16 * 4
    known = [x, *a, *b, i["adapter_ids"], i["ranks"], plan]
    assert sum(kept.values()) == v + sum(t.untyped_storage().nbytes() for t in known)


def test_factors_are_cast_and_get_gradients_of_their_dtype() -> None:
    i, a, b = parts(dtype=torch.bfloat16)
    wide = [[f.detach().float().requires_grad_() for f in factors] for factors in (a, b)]
    y, expected = apart(i, *wide), apart(i, a, b)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    for mine, other in zip([*wide[0], *wide[1]], [*a, *b], strict=True):
        assert mine.grad is not None and mine.grad.dtype == torch.float32
        assert torch.equal(mine.grad, other.grad.float())


def test_factor_changed_after_the_forward_raises() -> None:
    i, a, b = parts()
    y = apart(i, a, b)
    with torch.no_grad():
        a[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()


def test_double_backward_and_missing_ranks_raise() -> None:
    i, a, b = parts()
    with pytest.raises(RuntimeError, match="not itself differentiable"):
        torch.autograd.grad(apart(i, a, b).square().sum(), a[0], create_graph=True)
    with pytest.raises(
        ValueError, match=r"ranks: expected the rank of each adapter, .*\[5, 16, 9\]"
    ):
        ops.lora_linear_apart(i["x"], None, None, a, b, i["adapter_ids"])


def test_memory_of_an_earlier_call_does_not_affect_results() -> None:
    i, a, b = parts()
    expected = apart(i, a, b)
    nan = [[torch.full((16, 33), torch.nan)] * 3, [torch.full((21, 16), torch.nan)] * 3]
    ops.lora_linear_apart(i["x"], None, None, *nan, i["adapter_ids"])
    assert torch.equal(apart(i, a, b), expected)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("frozen", [(), ("x", "a"), ("b",), LEAVES], ids=str)
def test_one_adapter_may_be_passed_as_matrices(p: float, frozen: tuple[str, ...]) -> None:
    i = train_inputs(Shape(70, 33, 21, (16,), "interleaved"), torch.float32, seed=1, dropout_p=p)
    tail = i["adapter_ids"], i["scale"], None, i["dropout_p"], i["seed"]
    found = []
    for bank in (True, False):
        leaves = [i[name] if bank or name not in "ab" else i[name][0] for name in LEAVES]
        leaves = [
            t.detach().requires_grad_(n not in frozen) for t, n in zip(leaves, LEAVES, strict=True)
        ]
        y = ops.lora_linear(*leaves, *tail)
        if y.requires_grad:
            y.backward(i["dy"])
        with torch.inference_mode():
            assert torch.equal(ops.lora_linear(*leaves, *tail), y)
        found.append((y, *(None if t.grad is None else t.grad.reshape(t.shape) for t in leaves)))
    for of_bank, own, name in zip(*found, ("y", *LEAVES), strict=True):
        assert (of_bank is None) == (own is None) == (name in frozen)
        if own is not None:
            assert torch.equal(of_bank[0] if name in ("a", "b") else of_bank, own)


def test_matrices_of_one_adapter_are_compiled_and_cast_like_a_bank() -> None:
    i = train_inputs(Shape(6, 8, 5, (16,)), torch.float32, seed=1)
    head, tail = [i[n] for n in ("x", "weight", "bias")], [i["adapter_ids"], i["scale"]]
    a, b = i["a"][0].requires_grad_(), i["b"][0].requires_grad_()

    def run() -> Tensor:
        return ops.lora_linear(*head, a, b, *tail)

    (expected := run()).sum().backward()
    wanted, a.grad, b.grad = (a.grad, b.grad), None, None
    (y := torch.compile(run, fullgraph=True, backend="aot_eager")()).sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(a.grad, wanted[0]) and torch.equal(b.grad, wanted[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(), ops.lora_linear(*head, a[None], b[None], *tail))
    with pytest.raises(ValueError, match=r"b: expected shape \(A, O, R\), found \[5, 16\]"):
        ops.lora_linear(*head, a[None], b, *tail)
    with pytest.raises(ValueError, match=r"a: expected shape \(A, R, I\), found \[16, 8\]"):
        ops.lora_linear(*head, a, b[None], *tail)
