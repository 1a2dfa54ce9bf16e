"""Ranks that CPU twins process in several spans: the bits of a row are equal in any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from backends import Backend
from cases import Inputs, Shape, make_inputs
from cases_train import LEAVES, train_inputs
from contract import assert_same_bits
from torch import Tensor

from lora_ext import ops

RANKS = (300, 0, 8, 40, 1024)
ROWS = (1, 3, 17, 256, 257, 1000)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def apply(i: Inputs, rows: Tensor | slice = slice(None)) -> Tensor:
    names = ("y", "x", "adapter_ids")
    y, x, ids = (i[k][rows] for k in names)
    tail = i["scale"], i["ranks"], i["page_table"]
    return ops.lora_apply_(y.clone(), x, i["a"], i["b"], ids, *tail)


def linear(i: Inputs, rows: Tensor | slice = slice(None)) -> dict[str, Tensor]:
    """Return y and all gradients of the update for the given rows."""
    x, dy, ids = (i[k][rows] for k in ("x", "dy", "adapter_ids"))
    x, a, b = (t.detach().requires_grad_() for t in (x, i["a"], i["b"]))
    tail = i["scale"], i["ranks"], i["dropout_p"], i["seed"]
    y = ops.lora_linear(x, None, None, a, b, ids, *tail)
    grads = torch.autograd.grad(y, (x, a, b), dy)
    return dict(zip(("y", "dx", "da", "db"), (y.detach(), *grads), strict=True))


# --- a row and its batch ------------------------------------------------------------------------
@pytest.mark.parametrize("paged", [False, True], ids=["bank", "paged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_row_is_bitwise_equal_in_any_batch(paged: bool, dtype: torch.dtype) -> None:
    i = make_inputs(Shape(1000, 40, 24, RANKS), dtype, seed=1, paged=paged)
    together = apply(i)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(2))
    for begin, end in pairwise((0, *ROWS[:3], 256, 600, 1000)):
        some = order[begin:end]
        assert_same_bits(apply(i, some), together[some], f"{end - begin} rows: ")
    for rows in ROWS:
        assert_same_bits(apply(i, slice(rows)), together[:rows], f"the first {rows}: ")
        for s in (0, 4):  # only rows of adapter s
            own = (i["adapter_ids"] == s).nonzero()[:rows, 0]
            assert_same_bits(apply(i, own), together[own], f"{rows} rows of adapter {s}: ")


@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
def test_training_row_is_bitwise_equal_in_any_batch(p: float) -> None:
    """Check only batches of the first rows: the dropout mask of a row depends on its index."""
    i = train_inputs(Shape(1000, 40, 24, RANKS), torch.float32, seed=3, dropout_p=p)
    together = linear(i)
    for rows in ROWS:
        some = linear(i, slice(rows))
        for name in ("y", "dx"):
            assert_same_bits(some[name], together[name][:rows], f"{name}, {rows} rows: ")


def test_gradient_of_an_adapter_does_not_depend_on_other_ranks() -> None:
    """Check that the rank of the bank changes no bit, although it determines how the work is split
    and whether dx needs a separate pass."""
    small = train_inputs(Shape(90, 70, 33, (8, 40), "interleaved"), torch.float32, seed=4)
    a, b = (small["a"].new_full(size, torch.nan) for size in ((3, 600, 70), (3, 33, 600)))
    a[:2, :40], b[:2, :, :40] = small["a"], small["b"]
    a[2], b[2] = torch.randn(600, 70), torch.randn(33, 600)
    ranks, scale = torch.tensor([8, 40, 600], dtype=torch.int32), torch.ones(3)
    scale[:2] = small["scale"]
    expected, got = linear(small), linear({**small, "a": a, "b": b, "ranks": ranks, "scale": scale})
    assert_same_bits(got["dx"], expected["dx"], "dx: ")
    assert_same_bits(got["y"], expected["y"], "y: ")
    assert_same_bits(got["da"][:2, :40], expected["da"], "da: ")
    assert_same_bits(got["db"][:2, :, :40], expected["db"], "db: ")
    assert not got["da"][:2, 40:].any() and not got["db"][:2, :, 40:].any()
    assert not got["da"][2].any() and not got["db"][2].any()


@pytest.mark.parametrize("tokens", [5, 130, 700])
def test_number_of_threads_changes_no_bit(tokens: int, threads: Callable[[int], None]) -> None:
    i = train_inputs(Shape(tokens, 200, 330, RANKS), torch.float32, seed=5, dropout_p=0.25)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append({"apply": apply(i), **linear(i)})
    for result in results[1:]:
        for name, value in result.items():
            assert_same_bits(value, results[0][name], f"{name}: ")


# --- rows without an adapter ----------------------------------------------------------------------
@pytest.mark.parametrize("paged", [False, True], ids=["bank", "paged"])
def test_nan_in_rows_without_an_adapter_is_not_read(backend: Backend, paged: bool) -> None:
    for dtype in backend.dtypes():
        i = make_inputs(Shape(40, 24, 17, (300, 0, 8)), dtype, seed=6, paged=paged)
        idle = (i["adapter_ids"] < 0) | (i["adapter_ids"] == 1)
        expected = apply(i)
        i["x"][idle] = torch.nan
        i["y"][idle] = -0.0
        got = apply(i)
        assert_same_bits(got[~idle], expected[~idle])
        assert_same_bits(got[idle], i["y"][idle])
        assert got[idle].signbit().all()


# --- dropout ------------------------------------------------------------------------------------
def test_dropout_drops_the_same_elements_as_at_small_ranks(backend: Backend) -> None:
    """Check rank 600 with 8 ranks that are not zero: y and all gradients must equal those of rank
    8."""
    common = {"seed": 7, "exact": True, "dropout_p": 0.5, "base": False}
    small = train_inputs(Shape(70, 65, 33, (8,)), torch.float32, **common)
    at = torch.tensor([0, 5, 255, 256, 300, 511, 512, 599])
    a, b = torch.zeros(1, 600, 65), torch.zeros(1, 33, 600)
    a[0, at], b[0, :, at] = small["a"][0], small["b"][0]
    ranks = torch.tensor([600], dtype=torch.int32)
    expected, got = linear(small), linear({**small, "a": a, "b": b, "ranks": ranks})
    assert_same_bits(got["y"], expected["y"], "y: ")
    assert_same_bits(got["dx"], expected["dx"], "dx: ")
    assert_same_bits(got["da"][0, at], expected["da"][0], "da: ")
    assert_same_bits(got["db"][0, :, at], expected["db"][0], "db: ")


# --- torch --------------------------------------------------------------------------------------
@pytest.mark.slow
def test_gradcheck_in_float64() -> None:
    i = train_inputs(Shape(4, 3, 2, (258, 5), "interleaved"), torch.float64, seed=8, dropout_p=0.3)
    leaves = [i[k].nan_to_num(0.25).requires_grad_() for k in LEAVES]
    tail = (i["adapter_ids"], i["scale"], i["ranks"], i["dropout_p"], i["seed"])
    assert torch.autograd.gradcheck(lambda *values: ops.lora_linear(*values, *tail), leaves)
    tail = tail[:3]
    assert torch.autograd.gradcheck(
        lambda x, a, b: ops.lora_apply(x, a, b, *tail), [leaves[0], *leaves[3:]]
    )


@pytest.mark.slow
def test_compiles_without_a_graph_break(backend: Backend) -> None:
    i = train_inputs(Shape(9, 16, 12, (300, 8)), torch.float32, seed=9, dropout_p=0.5)
    i |= {k: i[k].nan_to_num() for k in ("a", "b")}

    def step(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        tail = i["adapter_ids"], i["scale"], i["ranks"]
        y = ops.lora_linear(x, i["weight"], None, a, b, *tail, 0.5, i["seed"])
        return y * 2 + ops.lora_apply(x, a, b, *tail)

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [i[k].detach().requires_grad_() for k in ("x", "a", "b")]
        y = function(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, i["dy"])])
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)


def test_segments_and_single_rows_support_large_ranks(backend: Backend) -> None:
    i = make_inputs(Shape(12, 24, 17, (300, 512)), torch.float32, seed=10)
    i |= {"scale": torch.tensor([0.5, 2.0]), "ranks": None, "a": i["a"].nan_to_num()}
    i["b"] = i["b"].nan_to_num()
    i["adapter_ids"] = torch.tensor([1] * 5 + [-1] * 2 + [0] * 5)
    expected = apply(i)
    bank = i["x"], i["a"], i["b"]
    bgmv = ops.bgmv_(i["y"].clone(), *bank, i["adapter_ids"], i["scale"])
    assert_same_bits(bgmv, expected, "bgmv_: ")
    indptr, adapter = (torch.tensor(v, dtype=torch.int32) for v in ([0, 5, 7, 12], [1, -1, 0]))
    sgmv = ops.sgmv_(i["y"].clone(), *bank, indptr, adapter, i["scale"])
    assert_same_bits(sgmv, expected, "sgmv_: ")


def test_training_step_runs_only_ops_of_lora_ext() -> None:
    """Check that the step runs no index, nonzero or copy op of torch; rows are gathered inside the
    op."""
    i = train_inputs(Shape(300, 40, 24, RANKS), torch.float32, seed=11)
    a, b = i["a"].requires_grad_(), i["b"].requires_grad_()
    with torch.profiler.profile() as profile:
        y = ops.lora_linear(i["x"], None, None, a, b, i["adapter_ids"], i["scale"], i["ranks"])
        y.backward(i["dy"])
    names = {event.name for event in profile.events()}
    assert "lora_ext::lora_linear_forward" in names
    for name in ("nonzero", "index", "gather", "scatter", "aten::mm", "addmm", "bmm"):
        assert not [n for n in names if name in n], names
