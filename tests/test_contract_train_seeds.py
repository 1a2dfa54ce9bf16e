"""Dropout with one seed per adapter: the mask of an adapter's rows does not depend on other
rows."""

from typing import Any

import torch
from backends import Backend
from cases import Inputs, Shape
from cases_train import DEEP, GEMM, LARGE, MEDIUM, OPS, SMALL, run, train_inputs
from contract import Outputs, assert_same_bits, same, shapes
from torch import Tensor

from lora_ext import ops, reference

ROWS = ("x", "dy", "adapter_ids")


def inputs(shape: Shape, dtype: torch.dtype = torch.float32, **options: Any) -> Inputs:
    options = {"dropout_p": 0.5, "own_seeds": True} | options
    return train_inputs(shape, dtype, **options)


def one_adapter(i: Inputs, s: int, rows: Tensor) -> Inputs:
    """Return these rows with a bank that contains only adapter ``s``."""
    i = {**i, **{k: i[k][rows] for k in ROWS}}
    i |= {k: i[k][s : s + 1].clone() for k in ("a", "b", "scale", "ranks", "seed")}
    i["adapter_ids"] = torch.where(i["adapter_ids"] == s, 0, -1)
    return i


def test_mask_counts_only_the_rows_of_the_adapter() -> None:
    ids, seed = torch.tensor([1, -1, 0, 1, 0, 1]), torch.tensor([7, 2**40 + 5])
    keep = reference.dropout_keep_of_adapters(ids, 20, 0.5, seed)
    assert keep[1].all()
    for s, rows in ((0, [2, 4]), (1, [0, 3, 5])):
        alone = reference.dropout_keep(len(rows), 20, 0.5, int(seed[s]))
        assert torch.equal(keep[rows], alone) and not alone.all() and alone.any()
    x, eye = torch.ones(6, 20), torch.eye(20).expand(2, 20, 20)
    y = ops.lora_linear(x, None, None, eye, eye, ids, None, None, 0.5, seed)
    assert torch.equal(y, torch.where(ids[:, None] < 0, 0, 2.0 * keep))


@shapes(OPS[1], SMALL, DEEP, MEDIUM, LARGE[1:2], [GEMM])
def test_adapter_in_a_batch_equals_it_alone_bitwise(backend: Backend, shape: Shape) -> None:
    i = inputs(shape, seed=3, base=False, device=backend.device)
    together = run(i)
    for s in range(min(len(shape.ranks), 3)):
        own = (i["adapter_ids"] == s).nonzero()[:, 0]
        everywhere = torch.arange(shape.tokens, device=own.device)
        # The adapter's rows are alone, or among rows without an adapter.
        for rows in (own, everywhere):
            i_s = one_adapter(i, s, rows)
            for seed in (i_s["seed"], i_s["seed"][0])[: 1 + (rows is own)]:
                alone = run({**i_s, "seed": seed})
                for name in ("y", "dx"):
                    got = alone[name] if rows is own else alone[name][own]
                    assert_same_bits(got, together[name][own], f"{name}: ")
                for name in ("da", "db"):
                    assert_same_bits(alone[name][0], together[name][s], f"{name}: ")


def test_slots_and_other_rows_change_no_bit(backend: Backend) -> None:
    shape = Shape(48, 70, 37, (8, 20, 4), "interleaved")
    for dtype in backend.dtypes():
        i = inputs(shape, dtype, seed=4, base=False, device=backend.device)
        first = run(i)
        order = torch.tensor([2, 0, 1], device=backend.device)
        moved = {**i, **{k: i[k][order] for k in ("a", "b", "scale", "ranks", "seed")}}
        moved["adapter_ids"] = order.argsort()[i["adapter_ids"]]
        out = run(moved)
        for name in ("da", "db"):
            assert_same_bits(out[name], first[name][order], f"{dtype} {name}: ")
        for name in ("y", "dx"):
            assert_same_bits(out[name], first[name], f"{dtype} {name}: ")
        own = (i["adapter_ids"] == 1).nonzero()[:, 0]
        fewer = torch.cat([own, (i["adapter_ids"] == 2).nonzero()[:, 0][:3]])
        out = run({**i, **{k: i[k][fewer] for k in ROWS}})
        assert_same_bits(out["y"][: len(own)], first["y"][own], f"{dtype} y: ")
        assert_same_bits(out["da"][1], first["da"][1], f"{dtype} da: ")


def test_mask_of_one_seed_for_all_counts_the_rows_of_the_batch(backend: Backend) -> None:
    """With one adapter, a seed of shape `()` numbers the rows of the whole batch, and a seed of
    shape `(1,)` numbers only the rows of the adapter."""
    i = inputs(Shape(40, 48, 24, (8,), "half"), seed=5, device=backend.device)
    of_adapter, of_batch = run(i), run({**i, "seed": i["seed"][0]})
    own = i["adapter_ids"] == 0
    assert 0 < own.sum() < 40 and not own[: int(own.sum())].all()
    same(of_batch, run({**i, "seed": i["seed"][0].expand(1, 1)}))
    assert not torch.equal(of_batch["y"][own], of_adapter["y"][own])
    keep = reference.dropout_keep(40, 48, 0.5, i["seed"][0])
    masked = torch.where(keep.to(backend.device), i["x"], 0)
    update = ops.lora_linear(masked, i["weight"] * 0, None, *(i[k] for k in ("a", "b")),
                             i["adapter_ids"], 2 * i["scale"])  # fmt: skip
    base = torch.nn.functional.linear(i["x"], i["weight"], i["bias"])
    torch.testing.assert_close(of_batch["y"], base + update, rtol=1e-4, atol=1e-4)


def test_seed_is_not_read_without_dropout_or_rows(backend: Backend) -> None:
    i = inputs(SMALL[5], seed=8, device=backend.device)
    expected = run({**i, "dropout_p": 0.0, "seed": None})
    same(run({**i, "dropout_p": 0.0}), expected)
    idle = {**i, "adapter_ids": torch.full_like(i["adapter_ids"], -1)}
    same(run(idle), formula_of_base(idle))
    empty = inputs(Shape(0, 8, 8, ()), device=backend.device)
    assert run(empty)["y"].shape == (0, 8)


def formula_of_base(i: Inputs) -> Outputs:
    y = torch.nn.functional.linear(i["x"], i["weight"], i["bias"])
    zeros = {f"d{k}": torch.zeros_like(i[k]) for k in ("a", "b")}
    weight, bias = i["dy"].t().mm(i["x"]), i["dy"].sum(0)
    return {"y": y, "dx": i["dy"] @ i["weight"], "dweight": weight, "dbias": bias, **zeros}


def test_separate_calls_per_adapter_equal_a_bank_with_the_same_seeds(backend: Backend) -> None:
    shape = Shape(33, 40, 31, (8, 8, 8))
    i = inputs(shape, seed=9, device=backend.device)
    expected = run(i)
    a, b = ([t.clone().requires_grad_() for t in i[k].unbind(0)] for k in ("a", "b"))
    y = ops.lora_linear_apart(i["x"], i["weight"], i["bias"], a, b, i["adapter_ids"], i["scale"],
                              i["ranks"], 0.5, i["seed"])  # fmt: skip
    assert_same_bits(y, expected["y"], "y: ")
    y.backward(i["dy"])
    for name, parts in (("da", a), ("db", b)):
        assert_same_bits(torch.stack([p.grad for p in parts]), expected[name], f"{name}: ")
