"""DoRA in `MultiLoraLinear`, compared with its formula; norms are updated with slots and
weights."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ext
from lora_ext import ops
from lora_ext.nn import MultiLoraLinear

IN, OUT = 24, 19
# With these ranks, the scales 6 / rank are exact in float32.
RANKS = {"red": 3, "green": 8, "blue": 12, "gold": 6}
DORA = ("red", "gold")


def adapter(name: str, seed: int = 0, dora: bool | None = None) -> tuple[dict[str, Any], Any]:
    rank, dora = RANKS[name], name in DORA if dora is None else dora
    generator = torch.Generator().manual_seed(100 * seed + rank)
    state = {
        "layer.lora_A.weight": torch.randn(rank, IN, generator=generator) / 5,
        "layer.lora_B.weight": torch.randn(OUT, rank, generator=generator),
    }
    magnitude = torch.randn(OUT, generator=generator)
    if dora:
        state["layer.lora_magnitude_vector"] = magnitude
    fields = {"r": rank, "lora_alpha": 6, "target_modules": ["layer"], "use_dora": dora}
    return {"peft_type": "LORA", **fields}, state


def make(dtype: torch.dtype = torch.float64, bias: bool = True, **arguments: Any) -> Any:
    """Return a model of one layer, and load two plain and two DoRA adapters into its pool."""
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"layer": nn.Linear(IN, OUT, bias=bias)}).to(dtype).eval()
    model.requires_grad_(False)
    pool = lora_ext.AdapterPool(model, **{"max_slots": 4, "max_rank": 16, **arguments})
    for name in RANKS:
        pool.load(name, adapter(name))
    return lora_ext.attach(model, pool)


def formula(layer: Any, x: Tensor, names: list[str | None], seed: int = 0) -> Tensor:
    """Return the reference output in the dtype of ``x``, with ``W + scale B A`` computed for each
    row."""
    bias = 0 if layer.bias is None else layer.bias.to(x)
    out = []
    for row, name in zip(x, names, strict=True):
        weight = layer.weight.to(x)
        if name is not None:
            config, state = adapter(name, seed)
            a, b = (state[f"layer.lora_{k}.weight"].to(x) for k in "AB")
            weight = weight + config["lora_alpha"] / config["r"] * b @ a
            if config["use_dora"]:
                magnitude = state["layer.lora_magnitude_vector"].to(x)
                weight = (magnitude / weight.norm(dim=1))[:, None] * weight
        out.append(weight @ row + bias)
    return torch.stack(out)


def inputs(*leading: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*leading, IN, generator=torch.Generator().manual_seed(7)).to(dtype)


NAMES = ["red", None, "blue", "gold", "green", "red"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(6,), (6, 1), (6, 5), (6, 2, 3)])
def test_names_per_sequence_equal_the_formula(leading: tuple[int, ...], bias: bool) -> None:
    model, x = make(bias=bias), inputs(*leading)
    rows = [name for name in NAMES for _ in range(x[..., 0].numel() // 6)]
    with torch.no_grad(), lora_ext.adapters(NAMES):
        y = model.layer(x)
    expected = formula(model.layer, x.reshape(-1, IN), rows)
    torch.testing.assert_close(y.reshape(-1, OUT), expected, rtol=1e-12, atol=1e-12)


def test_names_per_token_and_a_single_name_equal_the_formula() -> None:
    model, x = make(), inputs(2, 3)
    for names in ([NAMES[:3], NAMES[3:]], "gold", "blue"):
        rows = [names] * 6 if isinstance(names, str) else NAMES
        with torch.no_grad(), lora_ext.adapters(names):
            y = model.layer(x).reshape(-1, OUT)
        expected = formula(model.layer, x.reshape(-1, IN), rows)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad(), lora_ext.adapters("gold"):
        assert model.layer(inputs(0, 3)).shape == (0, 3, OUT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_without_dora_keep_every_bit(dtype: torch.dtype) -> None:
    # Rows without DoRA must be bitwise equal to those of a pool that never contained a DoRA
    # adapter.
    model, plain, x = make(dtype), make(dtype), inputs(6, 5, dtype=dtype)
    other = lora_ext.AdapterPool(lora_ext.detach(plain), max_slots=4, max_rank=16)
    for name in RANKS:
        other.load(name, adapter(name, dora=False))
    lora_ext.attach(plain, other)
    assert other.modules["layer"].after is None
    # Updates are in place only without gradients, so both cases are tested.
    for context in (torch.no_grad, torch.enable_grad):
        leaf = x.clone().requires_grad_(context is torch.enable_grad)
        results = []
        for m in (model, plain):
            with context(), lora_ext.adapters(NAMES, pool=m.layer.pool):
                results.append(m.layer(leaf).detach())
        for row, name in enumerate(NAMES):
            same = torch.equal(results[0][row], results[1][row])
            assert same == (name not in DORA), name


def test_bfloat16_error_is_bounded_by_its_roundings() -> None:
    model, x = make(torch.bfloat16), inputs(6, 5, dtype=torch.bfloat16)
    with torch.no_grad(), lora_ext.adapters(NAMES):
        y = model.layer(x)
    rows = [name for name in NAMES for _ in range(5)]
    layer, x = model.layer, x.double().reshape(-1, IN)
    exact = formula(layer, x, rows).view(y.shape)
    # The base output, its sum with the update, and the scaled sum are each rounded once, by half of
    # 2**-8 of their values. The factor c multiplies the first two errors. It also multiplies the
    # error of A and B, which the pool rounds to bfloat16, unlike the formula: at most 2 * 2**-9 of
    # the sum of |B| |A| |x|, and the same again through the norm. The bound uses the largest value
    # of each.
    for t, name in enumerate(NAMES):
        if name not in DORA:
            continue
        config, state = adapter(name)
        a, b = (state[f"layer.lora_{k}.weight"].double() for k in "AB")
        scale, weight = config["lora_alpha"] / config["r"], layer.weight.double()
        c = state["layer.lora_magnitude_vector"].double() / (weight + scale * b @ a).norm(dim=1)
        terms = weight.abs() @ x.abs().T + scale * (b.abs() @ (a.abs() @ x.abs().T))
        size = (c.abs()[:, None] * terms).max() + layer.bias.abs().max() * (1 + c.abs().max())
        assert (y[t] - exact[t]).abs().max() <= 7 * 2**-9 * size
        assert (y[t] - exact[t]).abs().max() > 0


def test_autocast_and_a_model_moved_after_attach_are_served() -> None:
    model, x = make(torch.float32), inputs(6, 5, dtype=torch.float32)
    rows = [name for name in NAMES for _ in range(5)]
    exact = formula(model.layer, x.double().reshape(-1, IN), rows).view(6, 5, OUT)
    with torch.no_grad(), lora_ext.adapters(NAMES):
        assert (model.layer(x) - exact).abs().max() < 1e-4
        with torch.autocast("cpu", torch.bfloat16):
            y = model.layer(x)
        assert y.dtype == torch.bfloat16
        assert (y - exact).abs().max() <= 8 * 2**-9 * exact.abs().max()
        factors = model.layer.after
        before = factors.factor(0)
        model.double()
        assert model.layer(x.double()).dtype == torch.float64
        assert (model.layer(x.double()) - exact).abs().max() < 1e-5
        torch.testing.assert_close(factors.factor(0), before)


def test_gradients_reach_the_input_after_a_step_in_inference_mode() -> None:
    model, x = make(), inputs(6, 2).requires_grad_()
    rows = [name for name in NAMES for _ in range(2)]
    weights = torch.randn(12, OUT, dtype=torch.float64)
    with lora_ext.adapters(NAMES):
        with torch.inference_mode():
            model.layer(x)
        y = model.layer(x).reshape(-1, OUT)
        (ours,) = torch.autograd.grad((y * weights).sum(), x)
    expected = formula(model.layer, x.reshape(-1, IN), rows)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def count_norms(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    norm = ops.lora_dora_norm
    monkeypatch.setattr(ops, "lora_dora_norm", lambda *a: calls.append(a) or norm(*a))
    return calls


def test_norm_is_computed_once_per_slot_and_again_after_a_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, model, x = count_norms(monkeypatch), make(), inputs(6)
    pool = model.layer.pool

    def check(expected: int, names: list[str | None] = NAMES, seed: int = 0) -> None:
        calls.clear()
        with torch.no_grad():
            for _ in range(2):
                with lora_ext.adapters(names):
                    y = model.layer(x)
        torch.testing.assert_close(y, formula(model.layer, x, names, seed), rtol=1e-12, atol=1e-12)
        assert len(calls) == expected

    check(0, ["blue", None, "green"] * 2)
    check(2)
    pool.load("extra", adapter("green"))  # evicts red, the least recently used
    check(0, ["gold"] * 6)
    pool.unload("extra")
    check(1)
    with torch.no_grad():
        model.layer.weight.mul_(1.5)
    check(2)
    model.load_state_dict({k: v / 2 for k, v in model.state_dict().items()})
    check(2)
    for name in RANKS:
        pool.update(name, adapter(name, seed=1))
    check(2, seed=1)
    for name in ("blue", "green"):
        pool.load(f"{name} again", adapter(name, seed=1))
    for name in ("red", "gold", "blue", "green"):
        with pool.acquire([name]):
            pass
    check(2, seed=1)
    pool.update("red", adapter("red", seed=1, dora=False))
    with torch.no_grad(), lora_ext.adapters("red"):
        y = model.layer(x)
    config, state = adapter("red", 1)
    a, b = (state[f"layer.lora_{k}.weight"].double() for k in "AB")
    base = nn.functional.linear(x, model.layer.weight, model.layer.bias)
    torch.testing.assert_close(y, base + config["lora_alpha"] / 3 * x @ a.T @ b.T)


def test_attaching_again_detects_changes_made_through_data() -> None:
    model, x = make(), inputs(6)
    with torch.no_grad(), lora_ext.adapters(NAMES):
        model.layer(x)
        model.layer.weight.data.mul_(1.5)  # does not increment the version counter
        pool = model.layer.pool
        lora_ext.attach(lora_ext.detach(model), pool)
        y = model.layer(x)
    torch.testing.assert_close(y, formula(model.layer, x, NAMES), rtol=1e-12, atol=1e-12)


def test_open_block_keeps_its_version_of_an_adapter() -> None:
    model, x = make(max_slots=5), inputs(6)
    with torch.no_grad(), lora_ext.adapters(NAMES):
        before = model.layer(x)
        model.layer.pool.update("red", adapter("red", seed=1))
        assert torch.equal(model.layer(x), before)
        with lora_ext.adapters("red"):
            after = model.layer(x)
    torch.testing.assert_close(after, formula(model.layer, x, ["red"] * 6, 1))


def test_base_without_a_readable_weight_is_refused_by_name() -> None:
    for dtype, found in (
        (torch.int8, "found Linear with one of torch.int8"),
        (torch.float8_e4m3fn, "found torch.float8_e4m3fn on cpu"),
    ):
        model, x = make(torch.float32), inputs(6, dtype=torch.float32)
        layer, dense = model.layer, model.layer.weight.clone()
        layer.base.forward = lambda x, dense=dense: x @ dense.T  # like a quantised layer
        quantised = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
        layer.base.weight = quantised
        with torch.no_grad():
            with lora_ext.adapters(["blue", None] * 3):
                layer(x)
            with pytest.raises(ValueError, match=rf"^MultiLoraLinear: layer: DoRA: .*{found}$"):
                with lora_ext.adapters(NAMES):
                    layer(x)
        assert layer.pool.stats()["pins"] == 0


def test_threads_give_the_same_outputs() -> None:
    model, x = make(), inputs(6)
    expected = formula(model.layer, x, NAMES)
    start, wrong = threading.Barrier(8), []

    def serve() -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(20):
                with lora_ext.adapters(NAMES):
                    if not torch.allclose(model.layer(x), expected, rtol=1e-12, atol=1e-12):
                        wrong.append(True)

    threads = [threading.Thread(target=serve) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_one_compiled_graph_serves_dora_and_other_assignments(compiler: str) -> None:
    torch._dynamo.reset()
    model, x = make(torch.float32), inputs(6, 2, dtype=torch.float32)
    compiled = torch.compile(model.layer, backend=compiler, fullgraph=True)
    for grad in (False, True):
        x.requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            for names in (NAMES, NAMES[::-1], [None] * 6, "gold", ["blue"] * 6):
                with lora_ext.adapters(names):
                    ours, eager = compiled(x), model.layer(x)
                torch.testing.assert_close(ours, eager)
                if grad:
                    g = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, eager)]
                    torch.testing.assert_close(*g)
            torch.testing.assert_close(compiled(x), model.layer(x))


def test_graph_is_recompiled_when_the_first_dora_adapter_is_loaded() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"layer": nn.Linear(IN, OUT)}).eval().requires_grad_(False)
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=16)
    pool.load("blue", adapter("blue"))
    layer, x = lora_ext.attach(model, pool).layer, inputs(6, dtype=torch.float32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        with lora_ext.adapters("blue"):
            torch.testing.assert_close(compiled(x), layer(x))
        pool.load("red", adapter("red"))
        with lora_ext.adapters(["red", "blue"] * 3):
            torch.testing.assert_close(compiled(x), layer(x))


def test_deep_copy_has_separate_norms() -> None:
    model, x = make(), inputs(6)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layer.weight.mul_(3)
        with lora_ext.adapters(NAMES):
            for m in (model, twin):
                assert isinstance(m.layer, MultiLoraLinear)
                torch.testing.assert_close(m.layer(x), formula(m.layer, x, NAMES))
