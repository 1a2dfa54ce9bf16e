"""Laws of the training ops, in addition to ``test_contract.py``, on every available backend."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import Backend
from cases import Inputs, Shape, make_inputs, to_pages
from cases_train import DEEP, LARGE, LEAVES, MEDIUM, OPS, SMALL, formula, run, train_inputs
from contract import assert_same_bits, off_grid, same, shapes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lora_ext
from lora_ext import ops, reference

pytestmark = pytest.mark.hosts


DROPOUT = {"dropout_p": 0.5}
dropouts = pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
seeds = pytest.mark.parametrize("own_seeds", [False, True], ids=["one seed", "a seed each"])


def with_dropout(backend: Backend, shape: Shape) -> Iterator[tuple[torch.dtype, float]]:
    """Yield each dtype with dropout 0 or 0.5 in turn; the next shape begins with the other one."""
    turn = (SMALL + DEEP).index(shape)
    return ((dtype, 0.5 * ((turn + n) % 2)) for n, dtype in enumerate(backend.dtypes()))


@pytest.mark.parametrize("shape", [*SMALL, *DEEP, *MEDIUM], ids=str)
def test_explicit_backward_equals_autograd_of_the_formula(shape: Shape) -> None:
    i = train_inputs(shape, torch.float64, seed=3, dropout_p=0.25)
    leaves = {k: i[k].nan_to_num(0.5).requires_grad_() for k in LEAVES}
    tail = (i["adapter_ids"], i["scale"], i["ranks"], i["dropout_p"], i["seed"])
    y = reference.lora_linear(*leaves.values(), *tail)
    grads = torch.autograd.grad(y, leaves.values(), i["dy"], allow_unused=True)
    for name, grad, leaf in zip(leaves, grads, leaves.values(), strict=True):
        expected = torch.zeros_like(leaf) if grad is None else grad
        torch.testing.assert_close(formula(i)[f"d{name}"], expected, rtol=1e-12, atol=1e-12)


@seeds
def test_gradcheck_in_float64(own_seeds: bool) -> None:
    how: dict[str, Any] = {"dropout_p": 0.3, "own_seeds": own_seeds}
    i = train_inputs(Shape(6, 7, 6, (3, 0, 8)), torch.float64, seed=4, **how)
    leaves = [i[k].nan_to_num(0.25).requires_grad_() for k in LEAVES]
    tail = (i["adapter_ids"], i["scale"], i["ranks"], i["dropout_p"], i["seed"])
    assert torch.autograd.gradcheck(lambda *values: ops.lora_linear(*values, *tail), leaves)
    x = i["x"].requires_grad_()
    seed = i["seed"][:1]
    assert torch.autograd.gradcheck(lambda x: ops.lora_dropout(x, 0.3, seed), x)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 5, -(2**63)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999, 1 - 2**-40])
def test_dropout_equals_the_formula_bit_for_bit(backend: Backend, seed: int, p: float) -> None:
    word = torch.tensor(seed, device=backend.device)
    g = torch.Generator().manual_seed(5)
    for rows, columns in [(0, 5), (1, 1), (3, 31), (5, 64), (2, 130), (1, 1027)]:
        for dtype in backend.dtypes():
            x = torch.randn(rows, columns, generator=g).to(dtype)
            expected = reference.lora_dropout(x, p, seed)
            assert_same_bits(
                ops.lora_dropout(x.to(backend.device), p, word), expected, f"{dtype}: "
            )


@pytest.mark.parametrize("isa", ["scalar", ""])
def test_float64_dropout_scales_by_the_keep_probability_in_float64(isa: str) -> None:
    """Check p = 0.1 and 0.3: rounding 1 / (1 - p) to float32 would change it by 5e-8 and 3e-8."""
    lora_ext._C.set_cpu_isa(isa)
    try:
        x = torch.randn(5, 33, dtype=torch.float64)
        for p in (0.1, 0.3):
            keep = reference.dropout_keep(5, 33, p, 7)
            dropped = ops.lora_dropout(x, p, torch.tensor(7))
            assert torch.equal(dropped, torch.where(keep, x * (1 / (1 - p)), 0))
            i = train_inputs(Shape(5, 33, 6, (3, 8)), torch.float64, seed=4, dropout_p=p)
            i |= {k: i[k].nan_to_num() for k in ("a", "b")}
            scale, ids = i["scale"], i["adapter_ids"]
            for name, got in run(i).items():
                torch.testing.assert_close(got, formula(i)[name], rtol=1e-13, atol=1e-13)
            masked = torch.where(reference.dropout_keep(5, 33, p, int(i["seed"])), i["x"], 0)
            y = ops.lora_linear(i["x"], None, None, i["a"], i["b"], ids, scale, None, p, i["seed"])
            update = torch.stack(
                [
                    scale[s].double() / (1 - p) * (i["b"][s] @ (i["a"][s] @ row))
                    if s >= 0
                    else row.new_zeros(6)
                    for s, row in zip(ids.tolist(), masked, strict=True)
                ]
            )
            torch.testing.assert_close(y, update, rtol=1e-13, atol=1e-13)
    finally:
        lora_ext._C.set_cpu_isa("")


def test_philox_gives_its_published_values_and_dropout_keeps_the_expected_share() -> None:
    kept = ops.lora_dropout(torch.ones(512, 2048), 0.1, torch.tensor(7)) != 0
    expected = 0.9 * kept.numel()
    assert abs(int(kept.sum()) - expected) < 5 * (expected * 0.1) ** 0.5
    other = ops.lora_dropout(torch.ones(512, 2048), 0.1, torch.tensor(8)) != 0
    both = 0.81 * kept.numel()
    assert abs(int((kept & other).sum()) - both) < 5 * (both * 0.19) ** 0.5
    from lora_ext.reference.lora_train import _philox4x32_10

    known = [
        "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
        "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
    ]
    for line in known:
        words = [int(word, 16) for word in line.split()]
        got = _philox4x32_10(torch.tensor(words[:4]), (words[4], words[5]))
        assert got.tolist() == words[6:]


def test_dropped_elements_do_not_affect_results_even_if_nan(backend: Backend) -> None:
    i = train_inputs(SMALL[4], torch.float32, seed=6, dropout_p=0.5, device=backend.device)
    i["weight"] = i["bias"] = None
    expected = run(i)
    dropped = ~reference.dropout_keep(*i["x"].shape, 0.5, i["seed"]).to(backend.device)
    i["x"] = torch.where(dropped, torch.nan, i["x"])
    same(run(i), expected)


@shapes(OPS[0], SMALL, DEEP)
def test_rows_without_adapter_or_rank_equal_the_base_bit_for_bit(
    backend: Backend, shape: Shape
) -> None:
    for dtype, p in with_dropout(backend, shape):
        i = train_inputs(shape, dtype, seed=7, dropout_p=p, device=backend.device)
        ids = i["adapter_ids"]
        idle = (ids < 0) | (i["ranks"][ids.clamp(min=0)] == 0)
        i["dy"][idle] = -0.0
        i["x"][idle] = -0.0  # Adding zero would turn -0.0 into +0.0.
        out = run(i)
        base = {
            "y": torch.nn.functional.linear(i["x"], i["weight"], i["bias"]),
            "dx": i["dy"] @ i["weight"],
        }
        for name, expected in base.items():
            assert_same_bits(out[name][idle], expected[idle], f"{dtype} {name}: ")
            assert torch.equal(torch.signbit(out[name][idle]), torch.signbit(expected[idle]))


@pytest.mark.parametrize("idle", ["no adapter", "rank 0"])
def test_idle_row_of_a_large_call_is_bitwise_equal_to_the_base(idle: str) -> None:
    i = train_inputs(LARGE[2], torch.float32, seed=17)
    if idle == "rank 0":
        i["ranks"] = torch.tensor([0, 16], dtype=torch.int32)
        rows = i["adapter_ids"] == 0
    else:
        rows = torch.arange(66) == 40
        i["adapter_ids"][rows] = -1
    out = run(i)
    expected = torch.nn.functional.linear(i["x"], i["weight"], i["bias"])
    assert_same_bits(out["y"][rows], expected[rows], "y: ")
    assert_same_bits(out["dx"][rows], (i["dy"] @ i["weight"])[rows], "dx: ")


def test_large_call_accepts_a_bias_of_any_stride() -> None:
    i = train_inputs(LARGE[2], torch.float32, seed=18)
    for bias in (torch.randn(2 * LARGE[2].out)[::2], torch.randn(1).expand(LARGE[2].out)):
        i["bias"] = bias.clone()
        expected = run(i)["y"]
        i["bias"] = bias
        assert_same_bits(run(i)["y"], expected, "y: ")


def test_adapters_without_rows_and_entries_beyond_a_rank_get_no_gradient(
    backend: Backend,
) -> None:
    shape = Shape(9, 40, 24, (8, 16, 8, 5))
    for dtype in backend.dtypes():
        i = train_inputs(shape, dtype, seed=8, device=backend.device)
        i["adapter_ids"] = torch.where(i["adapter_ids"] < 2, 1, -1)
        for _ in range(3):  # The allocator reuses memory that contained NaN.
            out = run(i)
            assert not out["da"][[0, 2, 3]].any() and not out["db"][[0, 2, 3]].any()
            assert out["da"][1].any() and out["db"][1].any()
            del out
            _ = torch.full((4, 24, 16), torch.nan, dtype=dtype, device=backend.device)
    for shape in SMALL:
        i = train_inputs(shape, torch.float32, seed=9, device=backend.device)
        out = run(i)
        beyond = torch.arange(shape.max_rank, device=backend.device) >= i["ranks"][:, None]
        assert not out["da"][beyond].any() and not out["db"].transpose(1, 2)[beyond].any()
        if shape.tokens:  # These gradients are 0 even if sums are not finite.
            i["x"][0, 0] = i["dy"][0, 0] = torch.inf
            out = run(i)
            assert not out["da"][beyond].any() and not out["db"].transpose(1, 2)[beyond].any()


@shapes(OPS[0], SMALL, DEEP, MEDIUM)
def test_plans_and_int32_ids_change_no_bit(backend: Backend, shape: Shape) -> None:
    hows: list[dict[str, Any]] = [{}, DROPOUT, {**DROPOUT, "own_seeds": True}]
    how = hows[(SMALL + DEEP + MEDIUM).index(shape) % len(hows)]
    i = train_inputs(shape, torch.float32, seed=10, device=backend.device, **how)
    first = run(i)
    plan = ops.lora_plan(i["adapter_ids"], len(shape.ranks))
    same(run({**i, "plan": plan}), first)
    same(run({**i, "adapter_ids": i["adapter_ids"].int()}), first)


@shapes(OPS[0], SMALL, DEEP, MEDIUM)
def test_gradient_of_an_adapter_does_not_depend_on_other_rows(
    backend: Backend, shape: Shape
) -> None:
    i = train_inputs(shape, torch.float32, seed=12, base=False, device=backend.device)
    together = run(i)
    for s in range(min(len(shape.ranks), 4)):
        own = (i["adapter_ids"] == s).nonzero()[:, 0]
        alone = run({**i, **{k: i[k][own] for k in ("x", "dy", "adapter_ids")}})
        assert_same_bits(alone["da"][s], together["da"][s], "da: ")
        assert_same_bits(alone["db"][s], together["db"][s], "db: ")
        assert_same_bits(alone["dx"], together["dx"][own], "dx: ")


# The first two shapes have slices of 256 and of 512 outputs, of which the last is partial. The
# third shape has more than one range of 512 rows.
PASSES = [
    Shape(35, 24, 600, (8, 16), "interleaved"),
    Shape(40, 40, 1030, (64, 5, 0), "interleaved"),
    Shape(530, 24, 40, (20,)),
]


@pytest.mark.parametrize("shape", PASSES, ids=str)
def test_one_pass_over_dy_is_bitwise_equal_to_two_passes(backend: Backend, shape: Shape) -> None:
    for dtype in backend.dtypes():
        i = train_inputs(shape, dtype, seed=23, base=False, device=backend.device)
        together = run(i)
        for leaf in ("a", "b"):  # For da alone, no db is computed; for db alone, no dv.
            alone = run(i, (leaf,))[f"d{leaf}"]
            assert_same_bits(alone, together[f"d{leaf}"], f"{dtype} d{leaf}: ")


@dropouts
def test_nan_in_rows_of_an_adapter_leaves_others_unchanged(backend: Backend, p: float) -> None:
    for dtype in backend.dtypes():
        shape = Shape(48, 70, 37, (8, 20, 4), "interleaved")
        i = train_inputs(shape, dtype, seed=13, dropout_p=p, base=False, device=backend.device)
        clean = run(i)
        own = i["adapter_ids"] == 1
        i["x"][own], i["dy"][own] = torch.nan, torch.nan
        out = run(i)
        for name in ("da", "db"):
            assert out[name][1, :4, :4].isnan().all()
            assert_same_bits(out[name][[0, 2]], clean[name][[0, 2]], f"{dtype} {name}: ")
        for name in ("y", "dx"):
            assert_same_bits(out[name][~own], clean[name][~own], f"{dtype} {name}: ")


@shapes(OPS[0], SMALL, DEEP)
def test_rows_may_be_strided_and_unaligned(backend: Backend, shape: Shape) -> None:
    for dtype, p in with_dropout(backend, shape):
        i = train_inputs(shape, dtype, seed=14, exact=True, dropout_p=p, device=backend.device)
        expected = run(i)
        same(run({**i, "x": off_grid(i["x"]), "dy": off_grid(i["dy"])}), expected, dtype)
        same(run({**i, "x": i["x"].T.contiguous().T, "dy": i["dy"].T.contiguous().T}), expected)


def test_upstream_gradient_may_be_expanded(backend: Backend) -> None:
    i = train_inputs(SMALL[4], torch.float32, seed=15, exact=True, device=backend.device)
    # the gradient of y.sum()
    i["dy"] = torch.ones(1, 1, device=backend.device).expand(i["dy"].shape)
    same(run(i), formula(i))
    i["dy"] = i["x"][:1, :40].expand(i["dy"].shape)
    same(run(i), formula(i))


@pytest.mark.parametrize("leaf", LEAVES)
def test_only_leaves_that_require_gradients_get_a_gradient(backend: Backend, leaf: str) -> None:
    i = train_inputs(SMALL[4], torch.float32, seed=16, dropout_p=0.5, device=backend.device)
    every, one = run(i), run(i, (leaf,))
    assert one.keys() == {"y", f"d{leaf}"}
    same(one, {k: every[k] for k in one})


def test_without_requires_grad_no_graph_is_built_and_double_backward_raises() -> None:
    i = train_inputs(SMALL[4], torch.float32, seed=17, dropout_p=0.5)
    args = [i[k] for k in (*LEAVES, "adapter_ids", "scale", "ranks", "dropout_p", "seed")]
    y = ops.lora_linear(*args)
    assert y.grad_fn is None and not y.requires_grad
    args[3] = args[3].requires_grad_()
    with torch.no_grad():
        assert ops.lora_linear(*args).grad_fn is None
    with torch.inference_mode():
        assert_same_bits(ops.lora_linear(*args), y)
    assert ops.lora_linear(*args).grad_fn is not None
    i = train_inputs(SMALL[4], torch.float32, seed=18)
    x = i["x"].requires_grad_()
    a = i["a"].nan_to_num(0).requires_grad_()
    y = ops.lora_linear(x, i["weight"], i["bias"], a, i["b"], i["adapter_ids"])
    with pytest.raises(RuntimeError, match="the gradient of lora_linear is not itself differentia"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="scale receives no gradient"):
        ops.lora_linear(x, None, None, a, i["b"], i["adapter_ids"], i["scale"].requires_grad_())


@seeds
def test_autocast_casts_as_linear_does(backend: Backend, own_seeds: bool) -> None:
    how = {"dropout_p": 0.5, "own_seeds": own_seeds, "device": backend.device}
    i = train_inputs(SMALL[4], torch.float32, seed=19, **how)
    half = {k: v.bfloat16() if k in (*LEAVES, "dy") else v for k, v in i.items()}
    expected = run(half)
    with torch.autocast(backend.device, torch.bfloat16):
        out = run({**i, "dy": half["dy"]})
    assert out["y"].dtype == torch.bfloat16
    for name in expected:
        if name != "y":
            assert out[name].dtype == torch.float32
        assert_same_bits(out[name].bfloat16(), expected[name], f"{name}: ")
    leaves = [i[k].requires_grad_() for k in LEAVES]
    y = ops.lora_linear(*leaves, i["adapter_ids"], i["scale"], i["ranks"])
    with torch.autocast(backend.device, torch.bfloat16):  # Autocast must not affect the backward.
        (dx,) = torch.autograd.grad(y, leaves[:1], i["dy"])
    assert dx.dtype == torch.float32


@seeds
def test_checkpointing_drops_the_same_elements(backend: Backend, own_seeds: bool) -> None:
    how = {"dropout_p": 0.5, "own_seeds": own_seeds, "device": backend.device}
    i = train_inputs(SMALL[4], torch.float32, seed=20, **how)
    leaves = [i[k].requires_grad_() for k in LEAVES]
    tail = (i["adapter_ids"], i["scale"], i["ranks"], i["dropout_p"], i["seed"])
    expected = run(i)
    for reentrant in (False, True):
        y: Any = checkpoint(lambda *v: ops.lora_linear(*v, *tail), *leaves, use_reentrant=reentrant)
        for leaf in leaves:
            leaf.grad = None
        y.backward(i["dy"])
        for name, leaf in zip(LEAVES, leaves, strict=True):
            assert_same_bits(leaf.grad, expected[f"d{name}"], f"{name}: ")


@pytest.mark.parametrize(("dynamic", "own_seeds"), [(False, False), (True, False), (True, True)])
def test_compiles_without_a_graph_break(backend: Backend, dynamic: bool, own_seeds: bool) -> None:
    how = {"dropout_p": 0.5, "own_seeds": own_seeds, "device": backend.device}
    i = train_inputs(SMALL[4], torch.float32, seed=21, **how)

    def step(x: Tensor, ids: Tensor, seed: Tensor, i: Inputs) -> Tensor:
        y = ops.lora_linear(
            *(x, *(i[k] for k in LEAVES[1:])), ids, i["scale"], i["ranks"], 0.5, seed
        )
        return y * 2 + ops.lora_dropout(y, 0.5, seed[0])

    torch._dynamo.reset()  # All backends compile `step`, which has a recompilation limit.
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (17, 9):
        seed = i["seed"] + rows
        results = []
        for function in (step, compiled):
            leaves = {k: i[k].detach().clone().requires_grad_() for k in LEAVES}
            x = leaves["x"][:rows]
            y = function(x, i["adapter_ids"][:rows], seed, {**i, **leaves})
            y.backward(i["dy"][:rows])
            results.append({"y": y.detach(), **{k: v.grad for k, v in leaves.items()}})
        same(results[1], results[0])


@pytest.mark.parametrize(
    "shape",
    [
        Shape(70, 333, 41, (4, 16, 1, 8)),
        Shape(70, 333, 41, (64, 256)),
        Shape(70, 333, 41, (300, 8)),
        Shape(300, 1100, 24, (4, 16, 1)),  # for the kernels: decode and prefill with several slices
        Shape(300, 8200, 8, (4,)),  # slices of 768 input features
        Shape(4_100, 520, 8, (8,)),  # tiles of 128 rows
        Shape(8_500, 520, 8, (72,)),  # Each block iterates over all slices.
    ],
    ids=str,
)
def test_update_without_dropout_is_bitwise_equal_to_a_pool(backend: Backend, shape: Shape) -> None:
    if backend.small:
        pytest.skip("this backend runs only small shapes")
    if not backend.is_twin and max(shape.ranks) > 256:
        pytest.skip("above rank 256 the kernels split sums by the number of rows: docs/exact.md")
    for dtype in backend.dtypes():
        i = make_inputs(shape, dtype, seed=3)
        ids, scale = i["adapter_ids"], i["scale"]
        rest = ids, scale, i["ranks"]
        trained = ops.lora_linear(i["x"], None, None, i["a"], i["b"], *rest)
        pages = to_pages(i["a"], i["b"], i["ranks"], torch.Generator().manual_seed(1))
        for rows in (slice(0, shape.tokens), slice(0, 1), slice(31, 32), slice(40, 64)):
            x, own, y = i["x"][rows], ids[rows], torch.zeros_like(trained[rows])
            ops.lora_apply_(y, x, *pages[:2], own, scale, i["ranks"], pages[2])
            assert_same_bits(trained[rows], y, f"{dtype} {rows}: ")
            again = ops.lora_linear(x, None, None, i["a"], i["b"], own, scale, i["ranks"])
            assert_same_bits(again, y, f"{dtype} {rows}: ")
