"""Laws of the training of mixtures of adapters, in addition to ``test_contract.py``."""

from typing import Any

import pytest
import torch
from backends import Backend
from cases import Inputs, Shape, to_pages
from cases_mixtures import (
    COLUMNS,
    KINDS,
    OPS,
    mixed_train_inputs,
    train,
    train_formula,
    unrounded,
    with_mixture,
)
from cases_train import DEEP, LEAVES, SMALL, train_inputs
from contract import assert_same_bits, same, shapes
from torch import Tensor

from lora_ext import ops, reference

OP = OPS[2]
SHAPE = Shape(20, 40, 24, (16, 3, 0, 24), "uniform")
kinds = pytest.mark.parametrize("kind", KINDS)


@shapes(OP, SMALL, DEEP[:-1])
def test_weight_one_keeps_every_bit(backend: Backend, shape: Shape) -> None:
    for dtype in backend.dtypes():
        plain = train_inputs(shape, dtype, seed=1, dropout_p=0.5, device=backend.device)
        expected = train(plain)
        ones = torch.ones(shape.tokens, device=backend.device)
        pages = -(-shape.max_rank // 8)
        scale = plain["scale"][:, None].expand(-1, pages).contiguous()
        groups = torch.zeros_like(scale, dtype=torch.int32)
        ids = plain["adapter_ids"][:, None]
        for changed in (
            {"weights": ones},
            {"weights": ones[:, None].expand(-1, 2), "groups": groups, "scale": scale},
            {"scale": scale},
            {"adapter_ids": ids, "weights": ones[:, None]},
            {"adapter_ids": ids},
        ):
            got = train(plain | changed)
            got.pop("dweights", None)
            same(got, expected, (dtype, *changed))


def test_a_scale_per_page_adds_one_launch_to_each_pass(backend: Backend) -> None:
    if backend.is_twin or backend.device == "cuda":
        pytest.skip("only the emulator counts launches")
    counts = []
    for i in (
        train_inputs(SHAPE, torch.float32, seed=1, base=False),
        mixed_train_inputs(SHAPE, torch.float32, kind="pages", seed=1, base=False),
        mixed_train_inputs(SHAPE, torch.float32, kind="groups", seed=1, base=False),
    ):
        before = backend.module.launches()
        train(i)
        counts.append(backend.module.launches() - before)
    plain, pages, groups = counts
    assert (pages - plain, groups - plain) == (2, 3)  # with weights: db also needs v times weight


@kinds
def test_serving_and_training_have_the_same_bits(backend: Backend, kind: str) -> None:
    for dtype in backend.dtypes():
        i = mixed_train_inputs(SHAPE, dtype, kind=kind, seed=2, base=False, device=backend.device)
        tail = (i["adapter_ids"], i["scale"], i["ranks"])
        mixed = {k: i.get(k) for k in ("weights", "groups")}
        served = ops.lora_apply(i["x"], i["a"], i["b"], *tail, **mixed)
        assert_same_bits(train(i)["y"], served)


@kinds
def test_gradients_of_apply_equal_those_of_linear(backend: Backend, kind: str) -> None:
    for dtype in backend.dtypes():
        i = mixed_train_inputs(SHAPE, dtype, kind=kind, seed=3, base=False, device=backend.device)
        names = [k for k in ("x", "a", "b", "weights") if i.get(k) is not None]
        leaves = {k: i[k].clone().requires_grad_() for k in names}
        tail = (i["adapter_ids"], i["scale"], i["ranks"])
        mixed = {"weights": leaves.get("weights"), "groups": i.get("groups")}
        y = ops.lora_apply(*(leaves[k] for k in "xab"), *tail, **mixed)
        grads = torch.autograd.grad(y, list(leaves.values()), i["dy"])
        expected = train(i)
        for name, grad in zip(names, grads, strict=True):
            assert_same_bits(grad, expected[f"d{name}"], f"{dtype} {name}: ")


def test_the_gradient_of_a_weight_without_adapter_is_zero(backend: Backend) -> None:
    for kind in ("rows", "columns"):
        i = mixed_train_inputs(SHAPE, torch.float32, kind=kind, seed=4, device=backend.device)
        i["dy"].fill_(torch.nan)
        found = train(i)["dweights"]
        none = (i["adapter_ids"] < 0) | (i["ranks"][i["adapter_ids"].clamp(min=0)] == 0)
        assert (found[none] == 0).all() and found[~none].isnan().all() and none.any()


def test_weight_zero_has_a_gradient(backend: Backend) -> None:
    i = mixed_train_inputs(SHAPE, torch.float32, kind="rows", exact=True, device=backend.device)
    i["weights"] = torch.zeros_like(i["weights"])
    assert train_formula(i)["dweights"].count_nonzero() > 4
    assert_same_bits(train(i)["dweights"], train_formula(i)["dweights"].float())


@kinds
def test_only_needed_gradients_are_computed_with_the_same_bits(backend: Backend, kind: str) -> None:
    i = mixed_train_inputs(SHAPE, torch.float32, kind=kind, seed=5, device=backend.device)
    expected = train(i)
    rest = [i[k] for k in ("adapter_ids", "scale", "ranks", "dropout_p", "seed")]
    for name in ("x", "a", "b", "weights"):
        if i.get(name) is None:
            continue
        leaf = i[name].clone().requires_grad_()
        values = i | {name: leaf}
        mixed = {k: values.get(k) for k in ("weights", "groups")}
        y = ops.lora_linear(*(values[k] for k in LEAVES), *rest, **mixed)
        assert_same_bits(torch.autograd.grad(y, leaf, i["dy"])[0], expected[f"d{name}"], name)


@kinds
def test_gradcheck_in_float64(kind: str) -> None:
    shape = Shape(6, 7, 6, (3, 0, 16))
    i = mixed_train_inputs(shape, torch.float64, kind=kind, seed=6)
    leaves = [i[k].nan_to_num(0.25).requires_grad_() for k in LEAVES]
    rest = (i["adapter_ids"], i["scale"], i["ranks"])
    mixed = {k: i.get(k) for k in ("weights", "groups")}
    assert torch.autograd.gradcheck(lambda *v: ops.lora_linear(*v, *rest, **mixed), leaves)


@shapes(OP, SMALL, DEEP[:-1])
def test_columns_have_the_gradients_of_calls_in_order(backend: Backend, shape: Shape) -> None:
    for dtype in unrounded(backend):
        how = {"base": False, "device": backend.device}
        i = mixed_train_inputs(shape, dtype, kind="columns", seed=13, **how)
        columns = zip(i["adapter_ids"].unbind(1), i["weights"].unbind(1), strict=True)
        calls = [train(i | {"adapter_ids": ids, "weights": w}) for ids, w in columns]
        expected = {name: sum(c[name] for c in calls) for name in calls[0]}
        same(train(i), expected | {"dweights": torch.stack([c["dweights"] for c in calls], 1)})


def test_each_column_has_a_separate_dropout_mask(backend: Backend) -> None:
    """Check that column k has the mask whose Philox counter contains k."""
    i = mixed_train_inputs(SHAPE, torch.float32, kind="columns", seed=7, exact=True, dropout_p=0.5)
    keep = [reference.dropout_keep(20, 40, 0.5, i["seed"], k) for k in range(COLUMNS)]
    assert not torch.equal(keep[0], keep[1])
    moved = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in i.items()}
    same(train(moved), train_formula(i))


def test_separate_factors_equal_a_bank() -> None:
    shape = Shape(70, 33, 21, (16, 16, 16), "interleaved")
    for kind in KINDS:
        i = mixed_train_inputs(shape, torch.float32, kind=kind, seed=8)
        expected = train(i)
        leaves = [t.clone().requires_grad_() for name in "ab" for t in i[name]]
        x = i["x"].clone().requires_grad_()
        weights = i.get("weights")
        leaf = weights if weights is None else weights.clone().requires_grad_()
        packed = ops.pack_weight(i["weight"])
        for given in (None, packed):
            rest = (i["adapter_ids"], i["scale"], i["ranks"], 0.0, None, None, given)
            y = ops.lora_linear_apart(
                *(x, i["weight"], i["bias"], leaves[:3], leaves[3:], *rest),
                weights=leaf,
                groups=i.get("groups"),
            )
            if given is None:
                assert_same_bits(y, expected["y"])
            wanted = [x, *leaves] if leaf is None else [x, leaf, *leaves]
            dx, *grads = torch.autograd.grad(y, wanted, i["dy"])
            assert_same_bits(dx, expected["dx"])
            if leaf is not None:
                assert_same_bits(grads.pop(0), expected["dweights"])
            assert_same_bits(torch.stack(grads[:3]), expected["da"])
            assert_same_bits(torch.stack(grads[3:]), expected["db"])


def test_second_derivatives_and_unsupported_arguments_raise() -> None:
    i = mixed_train_inputs(SHAPE, torch.float32, kind="columns", seed=9)
    weights = i["weights"].nan_to_num(1.0).requires_grad_()
    rest = (i["adapter_ids"], i["scale"], i["ranks"])
    values = [i[k] for k in LEAVES]
    for y in (
        ops.lora_linear(*values, *rest, weights=weights),
        ops.lora_apply(i["x"], i["a"], i["b"], *rest, weights=weights),
    ):
        with pytest.raises(RuntimeError, match="not itself differentiable"):
            (grad,) = torch.autograd.grad(y.sum(), weights, create_graph=True)
            torch.autograd.grad(grad.sum(), weights)
    seeds = torch.arange(4)
    with pytest.raises(
        ValueError, match="lora_linear: seed: expected one int64 number with several"
    ):
        ops.lora_linear(*(i[k] for k in LEAVES), *rest, 0.5, seeds, weights=i["weights"])
    with pytest.raises(RuntimeError, match="lora_apply_ has no backward"):
        ops.lora_apply_(torch.zeros(20, 24), i["x"], i["a"], i["b"], *rest, weights=weights)
    g = torch.Generator().manual_seed(0)
    a, b, table = to_pages(i["a"], i["b"], i["ranks"], g)
    y = ops.lora_apply(i["x"], a, b, *rest, table, weights=weights)
    with pytest.raises(NotImplementedError, match="pages receive no gradient, nor"):
        y.sum().backward()


@kinds
def test_pages_have_the_gradient_of_a_bank_in_x(backend: Backend, kind: str) -> None:
    i = mixed_train_inputs(
        SHAPE, torch.float32, kind=kind, seed=10, exact=True, base=False, device=backend.device
    )
    g = torch.Generator().manual_seed(0)
    a, b, table = to_pages(*(i[k].cpu() for k in ("a", "b", "ranks")), g)
    a, b, table = (t.to(backend.device) for t in (a, b, table))
    x = i["x"].clone().requires_grad_()
    mixed = {k: i.get(k) for k in ("weights", "groups")}
    y = ops.lora_apply(x, a, b, i["adapter_ids"], i["scale"], i["ranks"], table, **mixed)
    assert_same_bits(torch.autograd.grad(y, x, i["dy"])[0], train(i)["dx"])


def test_compiles_without_a_graph_break(backend: Backend) -> None:
    for kind in ("groups", "columns"):
        i = mixed_train_inputs(SHAPE, torch.float32, kind=kind, seed=11, device=backend.device)

        def step(i: Inputs, weights: Tensor) -> Tensor:
            rest = (i["adapter_ids"], i["scale"], i["ranks"])
            y = ops.lora_linear(
                *(i[k] for k in LEAVES), *rest, weights=weights, groups=i.get("groups")
            )
            return (y * i["dy"]).sum()

        weights = i["weights"].clone().requires_grad_()
        compiled: Any = torch.compile(step, fullgraph=True, backend="aot_eager")
        (got,) = torch.autograd.grad(compiled(i, weights), weights)
        assert_same_bits(got, train(i)["dweights"])


def test_autocast_keeps_weights() -> None:
    i = train_inputs(SHAPE, torch.float32, seed=12)
    i = with_mixture(i, SHAPE, "columns", 12, False)
    rest = (i["adapter_ids"], i["scale"], i["ranks"])
    narrow = {k: i[k].bfloat16() for k in LEAVES}
    expected = ops.lora_linear(*narrow.values(), *rest, weights=i["weights"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.lora_linear(*(i[k] for k in LEAVES), *rest, weights=i["weights"])
    assert_same_bits(got, expected)


# Small integers and powers of two, so every result is exact; `dy` has the gradient of y.
KNOWN: dict[str, Any] = {
    "x": [
        [-2.0, 0.0, -1.0, -1.0],
        [1.0, 0.0, 0.0, 2.0],
        [1.0, -1.0, 1.0, -1.0],
        [1.0, 0.0, 0.0, -2.0],
        [-1.0, 0.0, 1.0, 1.0],
    ],
    "weight": [[-1.0, -2.0, -2.0, -1.0], [1.0, 1.0, 1.0, 0.0], [-2.0, 1.0, -1.0, -2.0]],
    "bias": [-1.0, 1.0, -2.0],
    "a": [
        [[-1.0, -1.0, 1.0, 1.0], [1.0, 0.0, 1.0, -1.0]],
        [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, -1.0]],
        [[1.0, 1.0, -1.0, -1.0], [-1.0, 1.0, 0.0, 0.0]],
    ],
    "b": [
        [[-1.0, 0.0], [-1.0, 1.0], [1.0, 1.0]],
        [[-1.0, 0.0], [1.0, 1.0], [1.0, 1.0]],
        [[1.0, 1.0], [1.0, 1.0], [0.0, -1.0]],
    ],
    "scale": [1.0, 0.5, 2.0],
    "dy": [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, -1.0, -1.0], [1.0, 1.0, 0.0], [0.0, -1.0, -1.0]],
    "weights": [[1.0, 0.5], [2.0, -1.0], [0.0, 1.0], [0.5, 0.25], [1.0, 1.0]],
    "ids": [[0, 1], [2, -1], [1, 2], [-1, -1], [2, 2]],
    "y": [
        [4.5, -4.75, 2.25],
        [-12.0, -6.0, -4.0],
        [-5.0, -2.0, 0.0],
        [0.0, 2.0, 0.0],
        [-11.0, -7.0, -7.0],
    ],
    "dx": [
        [3.25, 1.25, -2.0, -4.25],
        [0.0, 0.0, 0.0, 0.0],
        [-2.0, -2.0, -2.0, 1.0],
        [0.0, -1.0, -1.0, -1.0],
        [-3.0, -6.0, 4.0, 6.0],
    ],
    "da": [
        [[4.0, 0.0, 2.0, 2.0], [-2.0, 0.0, -1.0, -1.0]],
        [[0.0, 0.0, 0.0, 0.0], [-0.5, 0.0, -0.25, -0.25]],
        [[4.0, 0.0, -4.0, -4.0], [2.0, -2.0, 2.0, -2.0]],
    ],
    "db": [
        [[0.0, -2.0], [0.0, -2.0], [0.0, 0.0]],
        [[-0.5, -0.25], [-0.5, -0.25], [0.0, 0.0]],
        [[0.0, -4.0], [12.0, 0.0], [12.0, 0.0]],
    ],
    "dweights": [[-2.0, -0.5], [0.0, 0.0], [-1.0, -4.0], [0.0, 0.0], [6.0, 6.0]],
}


def test_small_mixture_has_the_results_computed_by_hand(backend: Backend) -> None:
    for dtype in backend.dtypes():
        if dtype.itemsize < 4:
            continue
        i = {k: torch.tensor(v, dtype=dtype) for k, v in KNOWN.items()}
        i |= {k: torch.tensor(KNOWN[k]) for k in ("weights", "scale")}
        i["adapter_ids"] = torch.tensor(KNOWN["ids"], dtype=torch.int32)
        i = {k: v.to(backend.device) for k, v in i.items()}
        found = train(i | {"ranks": None, "dropout_p": 0.0, "seed": None})
        for name in ("y", "dx", "da", "db", "dweights"):
            assert torch.equal(found[name].double(), i[name].double()), (dtype, name)
