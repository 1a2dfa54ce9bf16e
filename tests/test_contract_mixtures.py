"""Laws of mixtures of adapters on one row, in addition to ``test_contract.py``."""

from typing import Any

import pytest
import torch
from backends import Backend
from cases import APPLY_, DEEP, SMALL, Inputs, Shape, make_inputs
from cases_mixtures import COLUMNS, KINDS, OPS, mixed_inputs, with_mixture
from cases_siblings import alone, family, together
from contract import assert_same_bits, same, shapes
from torch import Tensor

from lora_ext import ops, reference

OP = OPS[0]
SHAPE = Shape(20, 40, 24, (16, 3, 0, 24), "uniform")


def column(i: Inputs, k: int) -> Inputs:
    return {**i, "adapter_ids": i["adapter_ids"][:, k], "weights": i["weights"][:, k]}


@shapes(OP, SMALL, DEEP)
def test_weight_one_keeps_every_bit(backend: Backend, shape: Shape) -> None:
    for dtype in backend.dtypes():
        plain = make_inputs(shape, dtype, seed=1, device=backend.device)
        expected = OP.run(plain)
        ones = torch.ones(shape.tokens, device=backend.device)
        pages = -(-shape.max_rank // 8)
        scale = plain["scale"][:, None].expand(-1, pages).contiguous()
        groups = torch.zeros_like(scale, dtype=torch.int32)
        for changed in (
            {"weights": ones},
            {"weights": ones[:, None].expand(-1, 2), "groups": groups, "scale": scale},
            {"scale": scale},
        ):
            same(OP.run(plain | changed), expected, (dtype, *changed))
        one = plain | {"adapter_ids": plain["adapter_ids"][:, None], "weights": ones[:, None]}
        got = OP.run(one)
        got["lora_shrink"] = got["lora_shrink"].flatten(1)
        same(got, expected, (dtype, "one column"))


@shapes(OP, SMALL, DEEP)
def test_columns_are_calls_in_order(backend: Backend, shape: Shape) -> None:
    for dtype in backend.dtypes():
        how = {"paged": dtype == torch.float32, "device": backend.device}
        i = mixed_inputs(shape, dtype, kind="columns", seed=2, **how)
        got, y, v = OP.run(i), i["y"], []
        for k in range(COLUMNS):
            one = OP.run(column(i, k) | {"y": y})
            y = one["lora_apply_"]
            v.append(one["lora_shrink"])
        assert_same_bits(got["lora_apply_"], y)
        assert_same_bits(got["lora_shrink"], torch.stack(v, 1))
        plan = ops.lora_plan(i["adapter_ids"], len(shape.ranks))
        of_columns = [ops.lora_plan(ids, len(shape.ranks)) for ids in i["adapter_ids"].unbind(1)]
        assert torch.equal(plan, torch.cat(of_columns))
        same(OP.run(i | {"plan": plan, "adapter_ids": i["adapter_ids"].int()}), got)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_without_adapter_keep_bits_and_nan_weights_their_rows(
    backend: Backend, kind: str
) -> None:
    for dtype in backend.dtypes():
        i = mixed_inputs(SHAPE, dtype, kind=kind, seed=3, device=backend.device)
        ids = i["adapter_ids"].reshape(SHAPE.tokens, -1)
        ids[4] = -1
        i["y"][4] = -0.0
        y = APPLY_.call(i)
        assert torch.signbit(y[4]).all() and y.isfinite().all()
        if kind != "pages":
            row = int((ids[:, 0] == 0).nonzero()[0])
            i["weights"][row] = torch.nan
            bad = APPLY_.call(i)
            assert bad[row].isnan().all()
            bad[row] = y[row]
            assert_same_bits(bad, y)


def test_a_slot_of_several_adapters_is_their_weighted_sum(backend: Backend) -> None:
    """Check a slot whose pages are those of two adapters, with one group of weights each."""
    for dtype in backend.dtypes():
        i = make_inputs(Shape(9, 32, 24, (16, 8)), dtype, seed=4, exact=True, paged=True)
        table = torch.cat([i["page_table"][0], i["page_table"][1, :1]])[None]
        weights = torch.tensor([[0.5, 2.0], [1, -1], [0, 1]]).repeat(3, 1)
        scale = torch.tensor([[2.0, 2.0, 0.5]])
        i |= {
            "ranks": torch.tensor([24], dtype=torch.int32),
            "page_table": table,
            "adapter_ids": torch.zeros(9, dtype=torch.int32),
        }
        both = torch.tensor([[0, 1]]).expand(9, 2)
        a, b = (reference_bank(i, k) for k in "ab")
        factors = torch.tensor([2.0, 0.5])
        expected = i["y"].double() + reference.lora_mixture(
            i["x"].double(), a, b, both, weights, factors, torch.tensor([16, 8])
        )
        i |= {"weights": weights, "scale": scale, "groups": torch.tensor([[0, 0, 1]]).int()}
        moved = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in i.items()}
        assert_same_bits(APPLY_.call(moved), expected.to(dtype))


def reference_bank(i: Inputs, name: str) -> Tensor:
    """Return factor "a" (2, 16, I) or "b" (2, O, 16): adapter 0 has pages 0 and 1, adapter 1 has
    page 2."""
    pages = i[name][i["page_table"][0].long()].double()
    if name == "a":
        return torch.stack([pages[:2].flatten(0, 1), pages[[2, 2]].flatten(0, 1)])
    return torch.stack([torch.cat([*pages[:2]], 1), torch.cat([pages[2], pages[2]], 1)])


@pytest.mark.parametrize("kind", KINDS)
def test_siblings_equal_separate_calls(backend: Backend, kind: str) -> None:
    for dtype in backend.dtypes():
        for tokens in (9, 300) if backend.is_twin else (9,):
            shape = Shape(tokens, 64, 48, (16, 8), "uniform")
            modules = family(shape, dtype, seed=5, paged=True, device=backend.device)
            modules = [with_mixture(m, shape, kind, n, False) for n, m in enumerate(modules)]
            shared = {k: modules[0][k] for k in ("adapter_ids", "weights") if k in modules[0]}
            modules = [m | shared for m in modules]
            for got, module in zip(together(modules), modules, strict=True):
                assert_same_bits(got, alone(module))


@pytest.mark.parametrize(("tokens", "launches"), [(1, 2), (256, 2), (257, 6)])
@pytest.mark.parametrize("kind", ["rows", "groups", "pages"])
def test_weights_of_rows_add_no_launch(
    backend: Backend, tokens: int, launches: int, kind: str
) -> None:
    if backend.is_twin or backend.device == "cuda":
        pytest.skip("only the emulator counts launches")
    shape = Shape(tokens, 64, 64, (16, 8))
    modules = family(shape, torch.bfloat16, seed=6, paged=True)
    modules = [with_mixture(m, shape, kind, n, False) for n, m in enumerate(modules)]
    shared = {k: modules[0][k] for k in ("weights",) if k in modules[0]}
    modules = [m | shared for m in modules]
    plan = ops.lora_plan(modules[0]["adapter_ids"], 2)
    before = backend.module.launches()
    together(modules, plan)
    assert backend.module.launches() - before == launches


def test_kernels_with_a_plan_copy_no_ids(backend: Backend) -> None:
    if backend.is_twin:
        pytest.skip("twins compare the plan with the ids")
    i = mixed_inputs(SHAPE, torch.float32, kind="columns", seed=8, device=backend.device)
    plan = ops.lora_plan(i["adapter_ids"], len(SHAPE.ranks))
    bank, tail = (i["x"], i["a"], i["b"]), (i["adapter_ids"], i["scale"], i["ranks"])
    with torch.profiler.profile() as profile:
        ops.lora_apply_(i["y"], *bank, *tail, None, plan, weights=i["weights"])
        ops.lora_linear(i["x"], None, None, i["a"], i["b"], *tail, plan=plan, weights=i["weights"])
    names = {event.key for event in profile.key_averages()}
    assert any("lora_linear" in name for name in names)
    assert not {"aten::clone", "aten::copy_"} & names


def test_debug_mode_raises_for_groups_of_used_slots_only(backend: Backend) -> None:
    i = mixed_inputs(SHAPE, torch.float32, kind="groups", seed=8, device=backend.device)
    i["adapter_ids"].clamp_(max=1)
    i["groups"][2:] = 99
    i["groups"][0, 2:] = -7  # rank 16 has two pages
    bank, tail = (i["x"], i["a"], i["b"]), (i["adapter_ids"], i["scale"], i["ranks"])
    mixed = {"weights": i["weights"], "groups": i["groups"]}
    message = r"groups\[1, 0\]: expected a column in \[0, 3\), found 3"
    backend.module.set_debug(True)
    try:
        ops.lora_apply_(i["y"], *bank, *tail, **mixed)
        ops.lora_linear(i["x"], None, None, *bank[1:], *tail, **mixed)
        i["groups"][1, 0] = 3
        with pytest.raises(ValueError, match="lora_apply_: " + message):
            ops.lora_apply_(i["y"], *bank, *tail, **mixed)
        with pytest.raises(ValueError, match="lora_linear: " + message):
            ops.lora_linear(i["x"], None, None, *bank[1:], *tail, **mixed)
    finally:
        backend.module.set_debug(False)


def test_segments_have_ids_and_weights(backend: Backend) -> None:
    i = make_inputs(SHAPE, torch.float32, seed=7, device=backend.device)
    i |= {k: i[k].nan_to_num(0.5) for k in "ab"}
    bounds = torch.tensor([2, 5, 5, 14], dtype=torch.int32, device=backend.device)
    of_segments = torch.tensor([[0, 3], [1, 1], [3, -1]], dtype=torch.int32).to(backend.device)
    weights = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).to(backend.device)
    rows = torch.tensor([-1] * 2 + [0] * 3 + [2] * 9 + [-1] * 6, device=backend.device)
    out = (rows < 0)[:, None]
    ids, of_rows = torch.where(out, -1, of_segments[rows]), torch.where(out, 1, weights[rows])
    bank = i["x"], i["a"], i["b"]
    for k in (slice(0, 2), 0):
        y = ops.sgmv_(
            i["y"].clone(), *bank, bounds, of_segments[:, k], i["scale"], weights=weights[:, k]
        )
        mixed = {"weights": of_rows[:, k].contiguous()}
        expected = ops.bgmv_(i["y"].clone(), *bank, ids[:, k], i["scale"], **mixed)
        assert_same_bits(y, expected)
        assert_same_bits(
            expected, APPLY_.call(i | {"ranks": None, "adapter_ids": ids[:, k]} | mixed)
        )
    with pytest.raises(ValueError, match=r"sgmv_: weights: expected the shape .* found \(2, 2\)"):
        ops.sgmv_(i["y"], *bank, bounds, of_segments, weights=weights[:2])


def wrong(**changed: Any) -> Any:
    return changed


ROWS: list[tuple[str, str, Any]] = [
    (
        "weights: expected Float, found Double",
        "rows",
        lambda i: wrong(weights=i["weights"].double()),
    ),
    (r"weights: expected shape \(20,\) or", "rows", lambda i: wrong(weights=i["weights"][1:])),
    (r"weights: expected shape", "rows", lambda i: wrong(weights=i["weights"].reshape(20, 1, 1))),
    (r"weights: expected shape", "rows", lambda i: wrong(weights=i["weights"].new_ones(20, 0))),
    (
        r"weights: expected the shape of adapter_ids, \[20, 3\], found \[20, 2\]",
        "columns",
        lambda i: wrong(weights=i["weights"][:, 1:]),
    ),
    ("weights: expected the shape of", "columns", lambda i: wrong(weights=i["weights"][:, 0])),
    (
        r"groups: expected None with adapter_ids \(T, K\)",
        "columns",
        lambda i: wrong(groups=torch.zeros(4, 3, dtype=torch.int32)),
    ),
    ("groups: expected None without weights", "groups", lambda i: wrong(weights=None)),
    ("groups: expected None without", "groups", lambda i: wrong(weights=i["weights"][:, 0])),
    ("groups: expected Int, found Long", "groups", lambda i: wrong(groups=i["groups"].long())),
    (
        r"groups: expected shape \(A, R / 8\) = \[4, 3\], found \[4, 2\]",
        "groups",
        lambda i: wrong(groups=i["groups"][:, :2]),
    ),
    (
        r"groups\[0, 1\]: expected a column in \[0, 3\), found 3",
        "groups",
        lambda i: wrong(groups=torch.tensor([[0, 3, 0]] * 4, dtype=torch.int32)),
    ),
    (
        r"groups\[0, 0\]: expected a column in \[0, 3\), found -1",
        "groups",
        lambda i: wrong(groups=torch.tensor([[-1, 0, 0]] * 4, dtype=torch.int32)),
    ),
    (r"scale: expected shape \(A, R / 8\)", "pages", lambda i: wrong(scale=i["scale"][:, :2])),
    ("scale: expected Float, found Double", "pages", lambda i: wrong(scale=i["scale"].double())),
    (
        r"adapter_ids.shape\[1\]: expected 1 to 64 ids per row, found 65",
        "columns",
        lambda i: wrong(adapter_ids=i["adapter_ids"].repeat(1, 22)[:, :65], weights=None),
    ),
    (
        r"adapter_ids.shape\[1\]: expected 1 to 64 ids per row, found 0",
        "columns",
        lambda i: wrong(adapter_ids=i["adapter_ids"][:, :0], weights=None),
    ),
    (
        r"adapter_ids\[2, 1\]: expected an id in \[-1, 4\), found 4",
        "columns",
        lambda i: wrong(
            adapter_ids=i["adapter_ids"].index_put(
                (torch.tensor(2), torch.tensor(1)), torch.tensor(4)
            )
        ),
    ),
    (
        "plan: expected lora_plan",
        "columns",
        lambda i: wrong(plan=ops.lora_plan(i["adapter_ids"][:, 0], 4)),
    ),
    (
        "plan: expected lora_plan.. of these adapter_ids",
        "columns",
        lambda i: wrong(plan=ops.lora_plan(i["adapter_ids"].flip(1), 4)),
    ),
]


@pytest.mark.parametrize(("message", "kind", "change"), ROWS, ids=[row[0] for row in ROWS])
def test_wrong_mixtures_raise_and_change_nothing(message: str, kind: str, change: Any) -> None:
    i = mixed_inputs(SHAPE, torch.float32, kind=kind, seed=8)
    i["adapter_ids"].reshape(20, -1)[0] = 0
    i |= change(i)
    before = i["y"].clone()
    rest = (i["adapter_ids"], i["scale"], i["ranks"], None, i.get("plan"))
    mixed = {k: i.get(k) for k in ("weights", "groups")}
    with pytest.raises(ValueError, match="lora_apply_: " + message):
        ops.lora_apply_(i["y"], i["x"], i["a"], i["b"], *rest, **mixed)
    assert torch.equal(i["y"], before)
    with pytest.raises(ValueError, match="lora_apply: " + message):
        ops.lora_apply(i["x"], i["a"], i["b"], *rest, **mixed)
