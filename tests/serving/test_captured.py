"""Captured decoding steps, whose replays use the current adapter names and pool contents."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from backends import Backend
from fake_graph import Device, FakeGraph, counted
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from two_layers import Adapter, random_adapter

import lora_ext

HIDDEN, WIDE, VOCABULARY = 16, 24, 40
SIZES = {
    **dict.fromkeys(("q", "k", "v", "o"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("gate", "up"), (HIDDEN, WIDE)),
    "down": (WIDE, HIDDEN),
}
LAYERS = 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (i, o) in SIZES.items():
            setattr(self, name, nn.Linear(i, o, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = layer_norm(x, (HIDDEN,))
        q, k, v = self.q(h), self.k(h), self.v(h)
        x = x + self.o(torch.tanh(q * k) + torch.tanh(v))
        h = layer_norm(x, (HIDDEN,))
        return x + self.down(torch.tanh(self.gate(h)) * torch.tanh(self.up(h)))


class Model(nn.Module):
    """Model with the linear layers of a SmolLM2 decoder, but without attention, so rows are
    independent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(layer_norm(x, (HIDDEN,)))


def adapter(seed: int, rank: int = 4, **fields: Any) -> Adapter:
    targets = fields.setdefault("target_modules", list(SIZES))
    chosen = [(name, size) for name, size in SIZES.items() if name in targets]
    sizes = {f"layers.{i}.{name}": size for i in range(LAYERS) for name, size in chosen}
    config, state = random_adapter(sizes, rank, seed, **fields)
    if fields.get("modules_to_save"):
        g = torch.Generator().manual_seed(seed)
        state["base_model.model.head.weight"] = torch.randn(VOCABULARY, HIDDEN, generator=g)
    return config, state


def make(**adapters: Any) -> tuple[Any, Any]:
    model = Model().eval().requires_grad_(False)
    pool = lora_ext.AdapterPool(model, max_slots=5, max_rank=16)
    for name, source in adapters.items():
        pool.load(name, source)
    return lora_ext.attach(model, pool, fuse_siblings=True), pool


def tokens(rows: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(5))


def row_by_row(model: Any, pool: Any, names: list[str | None], x: Tensor) -> Tensor:
    """Return the output of `model` for each row as a separate batch and block, without the captured
    step."""
    parts = []
    for row, name in enumerate(names):
        with lora_ext.adapters(name, pool=pool):
            parts.append(model(x[row : row + 1]))
    return torch.cat(parts)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def captured(
    device: Device, model: Any, step: Any, names: Any, x: Tensor
) -> tuple[FakeGraph, Tensor]:
    with step, lora_ext.adapters(names, pool=step.pool), torch.no_grad():
        model(x), model(x)  # The first call detects siblings and makes tables.
        with device.capture() as graph:
            y = model(x)
    return graph, y


def check(model: Any, step: Any, graph: FakeGraph, y: Tensor, x: Tensor, names: Any) -> None:
    with torch.no_grad():
        rows = [*names, *[None] * (len(x) - len(names))]
        expected = row_by_row(model, step.pool, rows, x)
        with step, lora_ext.adapters(names, pool=step.pool):
            graph.replay()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def emulated(backend: Backend) -> None:
    if backend.name != "emu":
        pytest.skip("only the emulator counts launches")


def test_replay_reads_float8_pages_of_the_current_adapters(
    device: Device, shared_on_cpu: None
) -> None:
    model = Model().eval().requires_grad_(False)
    pool = lora_ext.AdapterPool(model, max_slots=5, max_rank=16, dtype=torch.float8_e4m3fn)
    pool.load("a", adapter(1))
    pool.load("b", adapter(2, rank=12))
    lora_ext.attach(model, pool, fuse_siblings=True)
    step, x = lora_ext.capturable(pool, max_rows=4), tokens(4)
    graph, y = captured(device, model, step, ["a", "b", None, "a"], x)
    check(model, step, graph, y, x, ["b", None, "a", "b"])
    pool.update("a", adapter(3))
    check(model, step, graph, y, x, ["a", "a", None, "b"])


# --- launches -----------------------------------------------------------------------------------
def test_step_launches_one_copy_one_plan_and_its_ops(
    backend: Backend, device: Device, shared_on_cpu: None
) -> None:
    emulated(backend)
    model, pool = make(a=adapter(1), b=adapter(2, rank=12), c=adapter(3))
    step, x = lora_ext.capturable(pool, max_rows=8), tokens(8)
    names = ["a", "b", None, "c", "a", "b", "c", None]
    with step, lora_ext.adapters(names, pool=pool), torch.no_grad():
        model(x), model(x)
        before = backend.module.launches()
        with device.capture() as graph:
            model(x)
        kernels = backend.module.launches() - before
    groups = 4  # siblings: q, k and v; o; gate and up; down
    assert kernels == 1 + 2 * groups * LAYERS  # the plan, and shrink and expand of each group
    ours = {op for op in graph.launches if op.startswith("lora_")}
    assert ours == {"lora_plan", "lora_apply_", "lora_apply_siblings_"}
    assert graph.launches["lora_plan"] == 1
    # All other launches are those of the model. None fills, copies or gathers rows.
    with torch.no_grad(), counted() as own:
        Model().eval()(x)
    made = Model()
    with counted() as initial:
        made = Model()
    del made
    assert {k: n for k, n in graph.launches.items() if k not in ours} == dict(own - initial)
    with step, torch.no_grad(), counted() as launches, lora_ext.adapters(names[::-1], pool=pool):
        pass
    assert launches == {"copy_": 1}


def test_capture_without_a_step_makes_ids_and_plan_once(backend: Backend, device: Device) -> None:
    emulated(backend)
    model, pool = make(a=adapter(1), b=adapter(2))
    with lora_ext.adapters(["a", "b", None], pool=pool), torch.no_grad():
        model(tokens(3))
        for _ in range(2):  # The second graph reuses no value of the first.
            with device.capture() as graph:
                model(tokens(3))
            assert graph.launches["lora_plan"] == 1
            assert graph.launches["full"] == 3 and graph.launches["cat"] == 1


# --- replays ------------------------------------------------------------------------------------
def test_replay_uses_current_names_ranks_loads_and_unloads(
    backend: Backend, device: Device, shared_on_cpu: None
) -> None:
    if backend.name not in ("cpu", "emu"):
        pytest.skip("this test runs only on one CPU twin and the emulator")
    model, pool = make(a=adapter(1), b=adapter(2, rank=12))
    step, x = lora_ext.capturable(pool, max_rows=5), tokens(4)
    graph, y = captured(device, model, step, ["a", None, "b", "a"], x)
    for names in (["b", "a", None, None], ["a"], [None] * 4, ["b"] * 4):
        check(model, step, graph, y, x, names)
    pool.update("a", adapter(7, rank=16))
    pool.load("c", adapter(4, rank=1, target_modules=["q", "down"]))
    check(model, step, graph, y, x, ["c", "a", "b", "c"])
    pool.unload("a")
    check(model, step, graph, y, x, ["b", "c"])
    pool.load("a", adapter(8))
    check(model, step, graph, y, x, ["a", "b", "c", "a"])


def test_replay_outside_its_block_uses_the_names_written_last(device: Device) -> None:
    # The adapters of the names written last stay pinned, even if a name is unloaded and the pool is
    # full.
    model, pool = make(a=adapter(1), b=adapter(2))
    step, x = lora_ext.capturable(pool, max_rows=2), tokens(2)
    graph, y = captured(device, model, step, None, x)
    with torch.no_grad():
        expected = row_by_row(model, pool, ["a", "b"], x)
        with step, lora_ext.adapters(["a", "b"], pool=pool):
            pass
        pool.unload("a")
        for seed in range(5):
            pool.load(f"other {seed}", adapter(20 + seed))
        graph.replay()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(lora_ext.rows.UnknownAdapterError, match="'a' is not loaded"):
            with step, lora_ext.adapters(["a", "b"], pool=pool):
                pass
        base = row_by_row(model, pool, [None, None], x)
        graph.replay()  # After the error, all rows use the base model.
        torch.testing.assert_close(y, base, rtol=1e-4, atol=1e-4)
        check(model, step, graph, y, x, ["other 4", "b"])
        step.close()
        graph.replay()
        torch.testing.assert_close(y, base, rtol=1e-4, atol=1e-4)
    assert pool.stats()["pins"] == 0
    with pytest.raises(RuntimeError, match="expected an open step"), step:
        pass


def test_dora_rows_and_replaced_heads_are_captured(device: Device) -> None:
    whole = {"modules_to_save": ["head"]}
    model, pool = make(
        plain=adapter(1),
        dora=adapter(2, rank=8, use_dora=True),
        head=adapter(3, **whole),
        both=adapter(4, use_dora=True, target_modules=["q", "up"], **whole),
    )
    step, x = lora_ext.capturable(pool, max_rows=4, replaced=2), tokens(4)
    graph, y = captured(device, model, step, ["plain", "dora", None, "head"], x)
    for names in (["both", "dora", "head", None], ["head", "both", "plain", "dora"], ["dora"]):
        check(model, step, graph, y, x, names)
    pool.update("dora", adapter(5, rank=3, use_dora=True))
    pool.update("head", adapter(6, **whole))
    check(model, step, graph, y, x, ["head", "dora", "both", "plain"])
    pool.unload("both")
    pool.load("other", adapter(9, **whole))  # a third replaced head; a step uses at most two
    check(model, step, graph, y, x, ["other", "head", "dora", None])


def test_token_ids_select_adapters_in_a_captured_step(device: Device) -> None:
    model, pool = make(a=adapter(1), b=adapter(2))
    step, x = lora_ext.capturable(pool, max_rows=3), tokens(3)
    graph, y = captured(device, model, step, ["a", "b", None], x)
    ids = torch.tensor([[1], [-1], [0]])
    with torch.no_grad(), step, lora_ext.adapters(["a", "b"], ids, pool=pool):
        graph.replay()
    with torch.no_grad():
        expected = row_by_row(model, pool, ["b", None, "a"], x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_graph_keeps_its_pool_alive(device: Device) -> None:
    model, pool = make(a=adapter(1), b=adapter(2))
    step, x = lora_ext.capturable(pool, max_rows=2), tokens(2)
    graph, y = captured(device, model, step, ["a", "b"], x)
    with torch.no_grad():
        expected = row_by_row(model, pool, ["a", "b"], x)
    lora_ext.detach(model)
    alive = weakref.ref(pool)
    del pool, step, model
    gc.collect()
    assert alive() is not None
    graph.replay()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    del graph
    gc.collect()
    assert alive() is None


# --- faults -------------------------------------------------------------------------------------
def write(step: Any, names: Any) -> None:
    with step, lora_ext.adapters(names, pool=step.pool):
        pass


def test_more_rows_than_max_rows_or_than_captured_are_refused(device: Device) -> None:
    model, pool = make(a=adapter(1))
    step = lora_ext.capturable(pool, max_rows=3)
    with pytest.raises(ValueError, match="names: expected at most max_rows=3, found 4"):
        write(step, ["a"] * 4)
    captured(device, model, step, ["a", None], tokens(2))
    with pytest.raises(ValueError, match="names: expected at most the 2 rows captured, found 3"):
        write(step, ["a"] * 3)
    with pytest.raises(ValueError, match=r"captured forward of at most 3 rows .* \(4, 1"):
        captured(device, model, step, "a", tokens(4))


@pytest.mark.parametrize(
    ("source", "lacks"),
    [
        (adapter(2, target_modules=["o"]), r"factors at 'layers.0.o'"),
        (adapter(2, target_modules=["q"], lora_bias=True), r"a bias at 'layers.0.q'"),
        (adapter(2, target_modules=["q"], use_dora=True), r"scales of outputs at 'layers.0.q'"),
        (
            adapter(2, target_modules=["q"], modules_to_save=["head"]),
            r"a replaced module at 'head'",
        ),
    ],
)
def test_adapter_that_needs_parts_missing_in_the_graph_is_refused(
    device: Device, source: Any, lacks: str
) -> None:
    model, pool = make(a=adapter(1, target_modules=["q"]))
    step, x = lora_ext.capturable(pool, max_rows=2), tokens(2)
    graph, y = captured(device, model, step, ["a", None], x)
    pool.load("late", source)
    with pytest.raises(ValueError, match=rf"'late': .* found {lacks}.* capture again"):
        write(step, ["a", "late"])
    check(model, step, graph, y, x, ["a", "a"])
    again = lora_ext.capturable(pool, max_rows=2)
    check(model, again, *captured(device, model, again, ["a", None], x), x, ["late", "a"])


def test_graph_captured_without_adapters_refuses_adapters(device: Device) -> None:
    model, pool = make()
    step = lora_ext.capturable(pool, max_rows=2)
    captured(device, model, step, None, tokens(2))
    pool.load("late", adapter(2))
    with pytest.raises(ValueError, match="found factors at"):
        write(step, ["late"])


def test_captures_whose_replays_could_not_use_other_adapters_are_refused(device: Device) -> None:
    model, pool = make(a=adapter(1), dora=adapter(2, use_dora=True))
    step, x = lora_ext.capturable(pool, max_rows=2), tokens(2)
    with step, torch.no_grad():
        with (
            device.capture(),
            pytest.raises(RuntimeError, match=r"a block of .* around the capture"),
        ):
            model(x)
        with device.capture(), pytest.raises(RuntimeError, match="found one entered inside it"):
            write_inside(pool)
        with lora_ext.adapters(["a", "a"], pool=pool):
            with device.capture(), pytest.raises(RuntimeError, match="runs once with these"):
                model(x)
            with lora_ext.adapters(["a", None], pool=pool):
                pass
            with device.capture(), pytest.raises(ValueError, match="the names written last"):
                model(x)


def write_inside(pool: Any) -> None:
    with lora_ext.adapters("a", pool=pool):
        pass


def test_more_replaced_modules_than_reserved_are_refused(device: Device) -> None:
    whole = {"modules_to_save": ["head"]}
    _, pool = make(one=adapter(1, **whole), two=adapter(2, **whole))
    step = lora_ext.capturable(pool, max_rows=2)
    write(step, ["one", "one"])
    with pytest.raises(ValueError, match=r"replaced: expected at most 1 .* found .'one', 'two'"):
        write(step, ["one", "two"])
    assert pool.stats()["pins"] == 0


def test_prefill_inside_the_step_equals_prefill_without_it() -> None:
    model, pool = make(a=adapter(1), b=adapter(2))
    x = torch.randint(VOCABULARY, (2, 5))
    with torch.no_grad():
        expected = row_by_row(model, pool, ["a", "b"], x)
        with lora_ext.capturable(pool, max_rows=2), lora_ext.adapters(["a", "b"], pool=pool):
            found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_invalid_arguments_are_refused() -> None:
    _, pool = make(a=adapter(1))
    with pytest.raises(TypeError, match="pool: expected an AdapterPool"):
        lora_ext.capturable(None, 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="max_rows: expected an integer, at least 1"):
        lora_ext.capturable(pool, 0)
    step = lora_ext.capturable(pool, 4)
    with step, pytest.raises(RuntimeError, match="one `with step` at a time"), step:
        pass
