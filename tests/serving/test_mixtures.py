"""Rows with weights and mixtures in an attached model: the formula, and every way to pass them."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from fake_graph import Device
from pool_support import SIZES, Base, config, state
from torch import Tensor, nn
from torch.nn import functional as F
from two_layers import IN, RANKS, Mlp, adapter, inputs, random_adapter

import lora_ext
from lora_ext.adapter import LoraAdapter, merge_adapters
from lora_ext.rows._entries import members_of

#: The weights are exact in float32, the dtype in which the ops receive them.
ENTRIES: list[Any] = [
    {"red": 0.5, "blue": -2.0},
    "red",
    ("green", 0.25),
    None,
    {"blue": 1.0, "green": 1.0, "red": 0.75},
    {"blue": 3.0, "red": 0.0},
]


def make(dtype: torch.dtype = torch.float64, biased: str = "", **fields: Any) -> Any:
    torch.manual_seed(0)
    model = Mlp().to(dtype).eval().requires_grad_(False)
    pool = lora_ext.AdapterPool(model, max_slots=8, max_rank=40)
    for name in RANKS:
        pool.load(name, adapter(name, lora_bias=name in biased))
    return lora_ext.attach(model, pool, **fields)


def formula(model: Any, x: Tensor, rows: list[Any], biased: str = "") -> Tensor:
    """Return ``base(x) + sum of weight * scale * (B A x + bias)`` of each row in float64."""
    out = []
    for row, entry in zip(x.reshape(-1, IN).double(), rows, strict=True):
        for module in ("up", "down"):
            layer = getattr(model, module)
            bias = None if layer.bias is None else layer.bias.double()
            y = F.linear(row, layer.weight.double(), bias)
            for name, weight in members_of(entry, "test"):
                _, tensors = adapter(name, lora_bias=name in biased)
                stem = f"base_model.model.{module}.lora_"
                a, b = (tensors[f"{stem}{k}.weight"].double() for k in "AB")
                update = b @ (a @ row)
                if name in biased:
                    update = update + tensors[f"{stem}B.bias"].double()
                y = y + weight * 6 / RANKS[name] * update
            row = torch.tanh(y) if module == "up" else y
        out.append(row)
    return torch.stack(out).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("biased", ["", "red", "red blue"])
@pytest.mark.parametrize("copies", [1, 3])
def test_mixtures_equal_the_formula(copies: int, biased: str) -> None:
    model, x = make(biased=biased), inputs(len(ENTRIES), copies, dtype=torch.float64)
    rows = [entry for entry in ENTRIES for _ in range(copies)]
    with torch.no_grad(), lora_ext.adapters(ENTRIES):
        torch.testing.assert_close(
            model(x), formula(model, x, rows, biased), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixture_rounds_once(dtype: torch.dtype) -> None:
    # The base is zero. A term is computed in float32, and the sum is rounded once.
    model = make(dtype)
    model.down.base.weight.zero_()
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(7)).to(dtype)
    entry = {"red": 0.5, "green": -2, "blue": 4}
    exact = magnitude = torch.zeros(64, 9, dtype=torch.float64)
    for name, weight in entry.items():
        _, tensors = adapter(name)
        a, b = (tensors[f"base_model.model.down.lora_{k}.weight"].to(dtype).double() for k in "AB")
        scale = weight * 6 / RANKS[name]
        exact = exact + scale * (x.double() @ a.T @ b.T)
        magnitude = magnitude + abs(scale) * (x.double().abs() @ a.T.abs() @ b.T.abs())
    with torch.no_grad(), lora_ext.adapters(entry):
        y = model.down(x).double()
    rounding = torch.finfo(dtype).eps / 2 * 2.0 ** exact.abs().clamp(min=1e-3).log2().floor()
    assert ((y - exact).abs() <= rounding + 16 * 2**-24 * magnitude).all()


def test_other_spellings_and_neighbours_change_no_bit() -> None:
    model, x = make(torch.float32), inputs(4, 5)
    same: list[Any] = [{"red": 0.5, "blue": 2.0}, "red", None, ("blue", 1)]
    with torch.no_grad():
        with lora_ext.adapters(["red", "red", None, "blue"]):
            plain = model(x)
        with lora_ext.adapters(same):
            mixed = model(x)
        with lora_ext.adapters([{"blue": 2.0, "red": 0.5}, "red", None, "blue"]):
            turned = model(x)
        with lora_ext.adapters(same[0]):
            alone = model(x)  # as many rows: torch's base product depends on their number
    assert torch.equal(mixed, turned) and torch.equal(mixed[1:], plain[1:])
    assert torch.equal(mixed[0], alone[0]) and not torch.equal(mixed[0], plain[0])


@pytest.mark.parametrize("how", ["token_ids", "per token", "nested", "one for all"])
def test_every_way_to_name_mixtures(how: str) -> None:
    model, x = make(), inputs(2, 3, dtype=torch.float64)
    rows = [ENTRIES[0], ENTRIES[1], None, ENTRIES[2], ENTRIES[4], ENTRIES[0]]
    given: dict[str, Any] = {"names": rows}
    if how == "token_ids":
        given = {"names": ENTRIES, "token_ids": torch.tensor([[0, 1, -1], [2, 4, 0]])}
    elif how == "nested":
        given = {"names": [rows[:3], rows[3:]]}
    elif how == "one for all":
        rows, given = [ENTRIES[4]] * 6, {"names": ENTRIES[4]}
    with torch.no_grad(), lora_ext.adapters(**given):
        torch.testing.assert_close(model(x), formula(model, x, rows), rtol=1e-12, atol=1e-12)


def test_gradients_of_mixtures_reach_the_input() -> None:
    model = make()
    x = inputs(len(ENTRIES), 2, dtype=torch.float64).requires_grad_()
    rows = [entry for entry in ENTRIES for _ in range(2)]
    with lora_ext.adapters(ENTRIES):
        (ours,) = torch.autograd.grad(model(x).square().sum(), x)
    (expected,) = torch.autograd.grad(formula(model, x, rows).square().sum(), x)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixture_equals_the_merged_adapter(dtype: torch.dtype) -> None:
    weights = {"red": 0.7, "green": -0.3, "blue": 1.9}
    parts = [LoraAdapter.load(adapter(name)) for name in weights]
    merged = merge_adapters(parts, weights=[*weights.values()], mode="delta")
    model, x = make(dtype), inputs(7, 5, dtype=dtype)
    model.up.pool.load("merged", merged)
    exact = formula(model, x, [weights] * 35)
    with torch.no_grad():
        with lora_ext.adapters("merged"):
            reference = model(x)
        with lora_ext.adapters(weights):
            mixed = model(x)
    errors = [float((y - exact).abs().max()) for y in (mixed, reference)]
    # A mixture rounds the weights to float32, and a merged adapter rounds the factors.
    assert errors[0] <= 2 * errors[1] + 1e-6 * float(exact.abs().max())
    assert errors[1] < 1e-4


@pytest.mark.parametrize("default", [ENTRIES[0], ENTRIES[2], {"red": 1, "blue": 0}])
def test_mixture_is_the_default_outside_every_block(default: Any) -> None:
    given = dict(default) if isinstance(default, dict) else default
    model, x = make(default=given), inputs(2, 3, dtype=torch.float64)
    pool = model.up.pool
    if isinstance(given, dict):
        given.clear()  # the model keeps a copy
    with torch.no_grad():
        whole, part = model(x), model.up(x)
        with lora_ext.adapters(default):
            assert torch.equal(whole, model(x)) and torch.equal(part, model.up(x))
        torch.testing.assert_close(whole, formula(model, x, [default] * 6))
        for names in (None, ["red", "blue"]):
            with lora_ext.adapters(names):
                assert not torch.equal(whole, model(x))
        assert torch.equal(copy.deepcopy(model)(x), whole)
    assert pool.stats()["pins"] == 0


@pytest.mark.parametrize(
    ("default", "error", "text"),
    [
        (["red"], ValueError, r"attach: default: .*found \['red'\]"),
        ({"red": float("nan")}, ValueError, "attach: default: 'red': .*found nan"),
        (("red", "1"), ValueError, r"attach: default: .*found \('red', '1'\)"),
        ({"red": True}, TypeError, "attach: default: 'red': .*found True"),
        ({"red": 1, "rde": 0.5}, KeyError, "attach: default: .*found {'red': 1, 'rde': 0.5}"),
        ({"red": 1, "rde": 0}, KeyError, "attach: default: .*found {'red': 1, 'rde': 0}"),
    ],
)
def test_invalid_default_changes_no_model(default: Any, error: Any, text: str) -> None:
    model = make()
    pool = model.up.pool
    lora_ext.detach(model)
    with pytest.raises(error, match=text):
        lora_ext.attach(model, pool, default=default)
    lora_ext.attach(model, pool, default={"red": 0})  # the base model
    with torch.no_grad(), lora_ext.adapters(None):
        base = model(inputs(2, dtype=torch.float64))
    with torch.no_grad():
        assert torch.equal(model(inputs(2, dtype=torch.float64)), base)


@pytest.mark.slow  # compiles
def test_compiled_model_with_a_mixture_as_default_requires_a_block() -> None:
    torch._dynamo.reset()
    model, x = make(torch.float32, default={"red": 0.5, "blue": 2.0}), inputs(2, 3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        with lora_ext.adapters("blue"):
            torch.testing.assert_close(compiled(x), model(x))
        message = "default={'blue': 2.0, 'red': 0.5}: expected a compiled forward inside"
        with pytest.raises(RuntimeError, match=message):
            compiled(x)


def test_plain_names_make_no_weights() -> None:
    model, x = make(torch.float32), inputs(3, 2)
    made: list[Any] = []
    own = lora_ext.ops.lora_apply_

    def watched(*args: Any, **how: Any) -> Tensor:
        made.append((args[5].dim(), how))
        return own(*args, **how)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(lora_ext.ops, "lora_apply_", watched)
        with lora_ext.adapters(["red", ("blue", 1), {"green": 1.0, "red": 0}]):
            model(x)
        assert made == [(1, {"weights": None, "groups": None})] * 2
        with lora_ext.adapters(["red", {"blue": 1, "green": 1}, None]):
            model(x)
        assert made[2:] == [(2, {"weights": None, "groups": None})] * 2


class Siblings(nn.Module):
    """Two layers that receive the same tensor, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.o = (nn.Linear(16, o, bias=False) for o in (16, 16, 40))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x) * self.k(x)))


def wide_adapter(seed: int, rank: int = 4, **fields: Any) -> Any:
    return random_adapter({"q": (16, 16), "k": (16, 16), "o": (16, 40)}, rank, seed, **fields)


def make_captured(**adapters: Any) -> tuple[Any, Any]:
    model = Siblings().eval().requires_grad_(False)
    pool = lora_ext.AdapterPool(model, max_slots=5, max_rank=16)
    for name, source in adapters.items():
        pool.load(name, source)
    return lora_ext.attach(model, pool, fuse_siblings=True), pool


def tokens(rows: int) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(5))


# --- other layers -------------------------------------------------------------------------------
def test_embeddings_use_mixtures() -> None:
    torch.manual_seed(0)
    model = Base().eval().requires_grad_(False)
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=16)
    g, factors = torch.Generator().manual_seed(3), {}
    for name, rank in (("a", 3), ("b", 8)):
        a, b = torch.randn(rank, 7, generator=g), torch.randn(12, rank, generator=g)
        stem = "base_model.model.embed.lora_embedding_"
        pool.load(name, (config(rank, ("embed",)), {stem + "A": a, stem + "B": b}))
        factors[name] = 8 / rank * (b @ a).T  # (7, 12)
    ids = torch.tensor([[1, 4], [0, 6], [3, 3], [5, 2]])
    with torch.no_grad():
        base = model.embed(ids)
        lora_ext.attach(model, pool)
        with lora_ext.adapters([{"a": 0.5, "b": -1}, ("b", 2), None, "a"]):
            y = model.embed(ids)
    expected = base.clone()
    expected[0] += 0.5 * factors["a"][ids[0]] - factors["b"][ids[0]]
    expected[1] += 2 * factors["b"][ids[1]]
    expected[3] += factors["a"][ids[3]]
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[2], base[2])


def test_siblings_share_an_op_with_weights(shared_on_cpu: None) -> None:
    model, pool = make_captured(a=wide_adapter(1), b=wide_adapter(2, rank=8))
    x, names = tokens(3), [{"a": 0.5, "b": 2.0}, ("b", -1), "a"]
    with torch.inference_mode():
        with lora_ext.adapters(names, pool=pool):
            model(x), model(x)
            together = model(x)
        for row, name in enumerate(names):
            with lora_ext.adapters(name, pool=pool):
                torch.testing.assert_close(together[row : row + 1], model(x[row : row + 1]))


# --- graphs -------------------------------------------------------------------------------------
@pytest.mark.slow  # compiles
def test_compiled_graph_follows_weights_and_mixtures() -> None:
    model: Any = make(torch.float32)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = inputs(3, 2)
    with torch.no_grad():
        for names in (
            ["red", None, "blue"],
            [("red", 0.5), None, "blue"],
            [{"red": 0.5, "blue": 2.0}, ("green", -1), None],
            [{"red": -1, "blue": 1.0}, "green", {"red": 2, "green": 3, "blue": 1}],
            ["red", None, "blue"],
        ):
            with lora_ext.adapters(names):
                torch.testing.assert_close(run(x), model(x))
        torch.testing.assert_close(run(x), model(x))


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("mixed", [1, 2, 4])
def test_compiled_model_reads_all_weights_of_a_step(mixed: int) -> None:
    torch._dynamo.reset()
    model, x = make(torch.float32), inputs(3)
    step = lora_ext.capturable(model.up.pool, max_rows=3, mixed=mixed)
    assert model.up.slab.mixed == mixed  # a graph that is captured now can use any later weights
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), step:
        for one in ("red", ("red", 0.5), {"red": 0.5, "blue": 2.0})[: 1 + mixed]:
            with lora_ext.adapters([one, None, "green"]):
                torch.testing.assert_close(run(x), model(x))


@pytest.mark.parametrize("biased", [False, True])
def test_replay_follows_weights_and_mixtures(biased: bool, monkeypatch: Any) -> None:
    device = Device(monkeypatch)
    fields = {"lora_bias": biased}
    model, pool = make_captured(
        a=wide_adapter(1, **fields), b=wide_adapter(2, rank=8, **fields), c=wide_adapter(3)
    )
    pool.unload("c")
    step, x = lora_ext.capturable(pool, max_rows=4, mixed=2), tokens(4)
    with step, lora_ext.adapters(["a", None, "b", "a"], pool=pool), torch.no_grad():
        model(x), model(x)
        with device.capture() as graph:
            y = model(x)
    sets: list[Any] = [
        [{"a": 0.5, "b": -2.0}, ("b", 3.0), None, "a"],
        ["b", {"a": 1, "b": 1}],
        ["a", "b", None, "a"],
        {"b": 4, "a": -1},
    ]
    for names in sets:
        rows = [*names, *[None] * (4 - len(names))] if isinstance(names, list) else [names] * 4
        expected = []
        with torch.no_grad():
            for row, name in enumerate(rows):
                with lora_ext.adapters(name, pool=pool):
                    expected.append(model(x[row : row + 1]))
            with step, lora_ext.adapters(names, pool=pool):
                graph.replay()
        torch.testing.assert_close(y, torch.cat(expected), rtol=1e-4, atol=1e-4)
    pool.load("c", wide_adapter(3))
    with (
        step,
        pytest.raises(ValueError, match=r"mixed: expected at least 3 .*found 2; pass mixed=3"),
    ):
        with lora_ext.adapters({"a": 1, "b": 1, "c": 1}, pool=pool):
            pass


@pytest.mark.parametrize("mixed", [0, 1])
def test_step_names_the_argument_that_it_lacks(mixed: int) -> None:
    model, pool = make_captured(a=wide_adapter(1), b=wide_adapter(2))
    step, x = lora_ext.capturable(pool, max_rows=2, mixed=mixed), tokens(2)
    with step, torch.no_grad():
        for names in ([("a", 0.5), "b"], {"a": 1, "b": 1}):
            width = 1 if isinstance(names, list) else 2
            wrong = pytest.raises(
                ValueError, match=f"mixed: expected at least {width} .*mixed={width}"
            )
            fits = width <= mixed
            with contextlib.nullcontext() if fits else wrong, lora_ext.adapters(names, pool=pool):
                y = model(x)
                with lora_ext.adapters(None, pool=pool):
                    assert not torch.equal(y, model(x))
    for value in (-1, 1.5, True):
        with pytest.raises((ValueError, TypeError), match="capturable: mixed: "):
            lora_ext.capturable(pool, max_rows=2, mixed=value)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_weights_are_float32_whatever_the_default_dtype(default: torch.dtype) -> None:
    names, ids = [{"red": 0.3, "blue": 0.7}, ("green", 0.3)], torch.tensor([0, 1, -1])
    x, found = inputs(3, dtype=torch.float32), []
    for dtype in (torch.float32, default):
        model = make(torch.float32)
        torch.set_default_dtype(dtype)
        try:
            step = lora_ext.capturable(model.up.pool, max_rows=3, mixed=2)
            with torch.no_grad():
                with lora_ext.adapters([*names, None]):
                    found += [model(x)]
                with lora_ext.adapters(names, ids):
                    found += [model(x)]
                with step, lora_ext.adapters([*names, None]):
                    found += [model(x)]
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(y, found[0]) for y in found)


def test_embedding_of_base_rows_ignores_a_wider_mixture_in_slot_0() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 12)}).eval().requires_grad_(False)
    pool = lora_ext.AdapterPool(model, max_slots=5, max_rank=32)
    for seed, name in enumerate(("gone", "a", "b", "c")):
        g = torch.Generator().manual_seed(seed)
        stem = "base_model.model.embed.lora_embedding_"
        tensors = {
            f"{stem}A": torch.randn(4, 7, generator=g),
            f"{stem}B": torch.randn(12, 4, generator=g),
        }
        pool.load(name, (config(targets=("embed",)), tensors))
    pool.unload("gone")
    lora_ext.attach(model, pool)
    with pool.acquire([{"a": 1.0, "b": 1.0, "c": 1.0}]) as slots:
        assert list(slots) == [0]
        ids = torch.tensor([[1, 2], [3, 4]])
        with torch.no_grad(), lora_ext.adapters([{"a": 0.5, "b": 2.0}, None]):
            y = model["embed"](ids)
        with torch.no_grad(), lora_ext.adapters(None):
            assert torch.equal(y[1], model["embed"](ids)[1])


# --- activated adapters -------------------------------------------------------------------------
def test_activated_adapter_has_a_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12)).eval().requires_grad_(False)
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=8)
    renamed = {k.replace("up", "0").replace("down", "1"): v for k, v in state(1).items()}
    pool.load("late", (config(targets=("0", "1"), alora_invocation_tokens=[2, 3]), renamed))
    pool.load("same", (config(targets=("0", "1")), renamed))
    lora_ext.attach(model, pool)
    x = torch.randn(2, 5, SIZES["up"][0])
    ids = torch.tensor([[2, 3, 1, 1, 1], [1, 1, 2, 3, 1]])
    names: list[Any] = [("late", 0.5), ("late", -2.0)]
    with torch.no_grad():
        with lora_ext.adapters(names, input_ids=ids):
            y = model(x)
        rows: list[Any] = [[("same", 0.5)] * 5, [None, None, *[("same", -2.0)] * 3]]
        with lora_ext.adapters(rows):
            torch.testing.assert_close(y, model(x))
