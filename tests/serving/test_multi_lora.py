"""`MultiLoraLinear` compared with its formula, and blocks that select the adapters of its rows."""

import asyncio
import contextvars
import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from two_layers import IN, MID, OUT, RANKS, Mlp, adapter, formula, inputs, make, pins

import lora_ext
from lora_ext.nn import MultiLoraLinear
from lora_ext.rows import _context

PER_SEQUENCE = ["red", None, "blue", "green"]


@pytest.mark.parametrize("biased", ["", "blue"])
@pytest.mark.parametrize("leading", [(4,), (4, 1), (4, 5), (4, 2, 3)])
def test_names_per_sequence_equal_the_formula(leading: tuple[int, ...], biased: str) -> None:
    model, x = make(torch.float64, biased), inputs(*leading, dtype=torch.float64)
    copies = x[..., 0].numel() // 4
    rows = [name for name in PER_SEQUENCE for _ in range(copies)]
    with torch.no_grad(), lora_ext.adapters(PER_SEQUENCE):
        y = model(x)
    torch.testing.assert_close(y, formula(model, x, rows, biased), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spelling", ["flat", "nested", "flat on rows", "nested on rows"])
def test_names_per_token_equal_the_formula(spelling: str) -> None:
    model, x = make(torch.float64), inputs(2, 3, dtype=torch.float64)
    nested = [["red", None, "blue"], ["green", "red", "__base__"]]
    rows = ["red", None, "blue", "green", "red", None]
    names = nested if spelling.startswith("nested") else rows
    expected = formula(model, x, rows)
    if spelling.endswith("rows"):
        x, expected = x.flatten(0, 1), expected.flatten(0, 1)
    with torch.no_grad(), lora_ext.adapters(names):
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("compiled", [False, True])
def test_list_read_both_per_sequence_and_per_row_raises(order: int, compiled: bool) -> None:
    # In DeBERTa, the number of relative positions can equal the number of sequences in the batch.
    model: Any = make()
    run = torch.compile(model, backend="aot_eager") if compiled else model
    forwards = [inputs(4, 3), inputs(1, 4)][::order]
    message = r"one name per sequence for \(4, 3, features\), one per row for \(1, 4, feat"
    with torch.no_grad(), lora_ext.adapters(PER_SEQUENCE):
        run(inputs(4))  # This shape fits names per sequence and per row.
        run(forwards[0])
        with pytest.raises(ValueError, match=message):
            run(forwards[1])
        with lora_ext.adapters(PER_SEQUENCE):
            run(forwards[1])
    with torch.no_grad(), lora_ext.adapters(["red"]):
        run(inputs(1, 3))
        run(inputs(1))


def test_one_name_applies_to_every_row_and_to_one_vector() -> None:
    model = make(torch.float64)
    for leading in [(), (1,), (5,), (2, 3)]:
        x = inputs(*leading, dtype=torch.float64)
        rows = ["blue"] * x[..., 0].numel()
        with torch.no_grad(), lora_ext.adapters("blue"):
            torch.testing.assert_close(model(x), formula(model, x, rows), rtol=1e-12, atol=1e-12)


def test_empty_batch_is_accepted() -> None:
    model = make()
    with torch.no_grad(), lora_ext.adapters("red"):
        assert model(inputs(0, 3)).shape == (0, 3, OUT)


def test_rows_without_adapter_keep_every_bit() -> None:
    model, x = make(biased="red"), inputs(4, 5)
    with torch.no_grad():
        base = model(x)
        with lora_ext.adapters(PER_SEQUENCE):
            mixed = model(x)
        for names in (None, [None] * 4, "__base__"):
            with lora_ext.adapters(names):
                assert torch.equal(model(x), base)
        with lora_ext.adapters("red"), lora_ext.adapters(None):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
    assert torch.equal(mixed[1], base[1])
    assert all(not torch.equal(mixed[i], base[i]) for i in (0, 2, 3))


def test_gradients_reach_the_input() -> None:
    model, x = make(torch.float64), inputs(4, 2, dtype=torch.float64).requires_grad_()
    rows = [name for name in PER_SEQUENCE for _ in range(2)]
    weights = torch.randn(4, 2, OUT, dtype=torch.float64)
    with lora_ext.adapters(PER_SEQUENCE):
        with torch.inference_mode():
            model(x)  # This call caches tensors in the block, which autograd must be able to use.
        (ours,) = torch.autograd.grad((model(x) * weights).sum(), x)
    (expected,) = torch.autograd.grad((formula(model, x, rows) * weights).sum(), x)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["autocast", "model.bfloat16() after attach"])
def test_activations_of_another_dtype_than_the_pool_are_served(how: str) -> None:
    model, x = make(), inputs(4, 5)
    exact = formula(copy.deepcopy(model).double(), x.double(), PER_SEQUENCE_ROWS)
    if how == "autocast":
        scope = torch.autocast("cpu", torch.bfloat16)
    else:
        model, x, scope = model.bfloat16(), x.bfloat16(), torch.no_grad()
    with torch.no_grad(), scope, lora_ext.adapters(PER_SEQUENCE):
        y = model(x)
    assert y.dtype == torch.bfloat16
    # The bound is relative to the largest output. x, both weights, and both outputs of up and down
    # are rounded once or twice, each with a relative error of 2**-9. The two layers propagate these
    # errors with a gain of about one.
    assert (y - exact).abs().max() <= 8 * 2**-9 * exact.abs().max()


PER_SEQUENCE_ROWS = [name for name in PER_SEQUENCE for _ in range(5)]


def test_layers_of_a_step_share_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make(), []
    plan = lora_ext.ops.lora_plan
    monkeypatch.setattr(lora_ext.ops, "lora_plan", lambda *a: calls.append(a) or plan(*a))
    with torch.no_grad(), lora_ext.adapters(PER_SEQUENCE):
        for _ in range(3):
            model(inputs(4, 1))
        model(inputs(4, 6))
        assert len(calls) == 2
        for length in range(2, 100):  # The cache of shapes has a maximum size.
            model(inputs(4, length))
        assert len(_context.current(model.up.handle).assignment.kept) <= 32


def test_blocks_nest_and_pin() -> None:
    model, x = make(), inputs(2, 3)
    with torch.no_grad():
        with lora_ext.adapters("red"):
            red = model(x)
        with lora_ext.adapters("blue"):
            blue = model(x)
        with lora_ext.adapters("red"):
            assert pins(model) == 1
            with pytest.raises(ZeroDivisionError), lora_ext.adapters(["blue", "blue"]):
                assert pins(model) == 2
                assert torch.equal(model(x), blue)
                _ = 1 / 0
            assert pins(model) == 1
            model.up.pool.unload("red")  # pinned until the block is exited
            assert torch.equal(model(x), red)
    assert pins(model) == 0
    assert model.up.pool.stats()["slots_used"] == 2


def test_blocks_of_two_pools_are_independent() -> None:
    one, other, x = make(), make(), inputs(2, 3)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"pool: expected one of the 2 pools .*, found None"):
            lora_ext.adapters("red").__enter__()
        base = one(x)
        with lora_ext.adapters("red", pool=one.up.pool):
            red = one(x)
            assert torch.equal(other(x), base)
            with lora_ext.adapters("blue", pool=other.up.pool):
                assert torch.equal(one(x), red)
                assert not torch.equal(other(x), base)


ERRORS: list[tuple[Any, type[Exception], str]] = [
    (["red", "gren"], KeyError, r"adapter 'gren' is not loaded; close matches: \['green'\]"),
    ([], ValueError, r"names: expected a name or a non-empty list of names, found \[\]"),
    (7, ValueError, "names: expected a name or a non-empty list of names, found 7"),
    (iter(["red"]), ValueError, r"list of names, found <list_it.*; convert .* list\(names\)"),
    (["red", 3], ValueError, r"names: expected names \(str or None\), found \['red', 3\]"),
    ([["red"], ["red", "red"]], ValueError, r"same number of names for every seq.*\[1, 2\]"),
    (["red"] * 3, ValueError, r"expected a batch of 3 sequences, or 3 rows, found .*\(4, 5, feat"),
    (["red"] * 8, ValueError, r"expected a batch of 8 sequences, or 8 rows, found .*\(4, 5, feat"),
    (["red"] * 2, ValueError, r"expected a batch of 2 sequences, or 2 rows, found .*\(4, 5, feat"),
    ([["red"] * 4] * 5, ValueError, r"expected 5 sequences of 4 tokens, found .*\(4, 5, feat"),
]


@pytest.mark.parametrize(("names", "kind", "message"), ERRORS)
def test_wrong_names_raise_and_leave_nothing_pinned_or_open(
    names: Any, kind: type[Exception], message: str
) -> None:
    model = make()
    with torch.no_grad(), pytest.raises(kind, match=message), lora_ext.adapters(names):
        model(inputs(4, 5))
    assert pins(model) == 0
    with torch.no_grad():
        model(inputs(4, 5))


def test_without_an_attached_model_the_pool_must_be_given() -> None:
    model = lora_ext.detach(make())
    with pytest.raises(RuntimeError, match=r"expected an attached model, found none"):
        lora_ext.adapters("red").__enter__()
    pool = lora_ext.AdapterPool(model)
    with lora_ext.adapters(None, pool=pool):
        pass


def test_errors_name_wrong_layers_and_shapes() -> None:
    model = make()
    pool = model.up.pool
    with pytest.raises(ValueError, match="name: expected a module of the pool, found 'side'"):
        MultiLoraLinear(model.up.base, pool, "side")
    with pytest.raises(
        ValueError, match=r"down: expected in and out .*\(40, 9\).*found \(24, 40\)"
    ):
        MultiLoraLinear(model.up.base, pool, "down")
    model.up.base.weight = nn.Parameter(torch.zeros(MID + 1, IN))
    model.up.base.bias = None
    with torch.no_grad(), lora_ext.adapters("red"):
        with pytest.raises(ValueError, match=r"MultiLoraLinear: up: .*y.shape\[1\] = 41, found 40"):
            model(inputs(4, 5))


def test_forward_after_its_block_was_exited_raises() -> None:
    model = make()
    with lora_ext.adapters("red"):
        kept = contextvars.copy_context()
    with pytest.raises(RuntimeError, match="the block was left while tasks or threads"):
        kept.run(model, inputs(4, 5))


def test_asyncio_tasks_and_threads_have_separate_blocks() -> None:
    model, x = make(), inputs(2, 3)
    expected = {}
    with torch.no_grad():
        for name in (*RANKS, None):
            with lora_ext.adapters(name):
                expected[name] = model(x)

    async def serve(name: str | None) -> None:
        for _ in range(20):
            with lora_ext.adapters(name):
                await asyncio.sleep(0)
                assert torch.equal(model(x), expected[name])
                inside = await asyncio.to_thread(model, x)  # copies the context of the task
                torch.testing.assert_close(inside.detach(), expected[name])
            assert torch.equal(model(x), expected[None])

    async def main() -> None:
        await asyncio.gather(*(serve(name) for name in (*RANKS, None)))

    with torch.no_grad():  # around all tasks, because grad mode is a property of the thread
        asyncio.run(main())
    seen = []
    with lora_ext.adapters("red"), pytest.warns(UserWarning, match="without a block"):
        thread = threading.Thread(target=lambda: seen.append(model(x).detach()))
        thread.start()
        thread.join()
    # Results are close, not equal, because a library may split a GEMM differently in a new thread.
    torch.testing.assert_close(seen[0], expected[None])
    assert not torch.allclose(expected["red"], expected[None])
    assert pins(model) == 0


def test_layer_has_the_state_and_attributes_of_its_base() -> None:
    plain = Mlp()
    model = make()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.up.base.weight, plain.up.weight)
    assert model.up.weight is model.up.base.weight
    assert (model.up.in_features, model.up.out_features) == (IN, MID)
    with pytest.raises(AttributeError, match="no attribute 'in_feature'"):
        _ = model.up.in_feature
    model.up.weight = nn.Parameter(torch.zeros(MID, IN))
    assert model.up.base.weight is model.up.weight
    model.train()
    assert model.up.base.training
    assert "base=Linear(in_features=24, out_features=40" in repr(model)


def test_deep_copy_is_attached_to_the_same_pool() -> None:
    model, x = make(), inputs(2, 3)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.down.weight)
    with torch.no_grad(), lora_ext.adapters("red"):
        assert twin.down.pool is model.down.pool
        assert not torch.equal(twin(x), model(x))
    lora_ext.detach(twin)
    assert type(twin.up) is nn.Linear and isinstance(model.up, MultiLoraLinear)


class Counted:
    """torch.compile backend that counts the graphs that it compiles."""

    def __init__(self, name: str) -> None:
        from torch._dynamo.backends.registry import lookup_backend

        self.inner: Callable[..., Any] = lookup_backend(name)
        self.graphs = 0

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        self.graphs += 1
        return self.inner(graph, example_inputs)


@pytest.mark.parametrize(
    "target", ["aot_eager model", pytest.param("inductor layer", marks=pytest.mark.slow)]
)
def test_one_compiled_graph_serves_every_assignment(target: str) -> None:
    torch._dynamo.reset()
    backend = Counted(target.split()[0])
    model, x = make(), inputs(4, 5)
    eager: nn.Module = model if target.endswith("model") else model.up
    compiled = torch.compile(eager, backend=backend, fullgraph=True)
    steps = [PER_SEQUENCE, PER_SEQUENCE[::-1], "blue", [None] * 4, [["red"] * 3 + [None] * 2] * 4]
    with torch.no_grad():
        for names in steps:
            with lora_ext.adapters(names):
                torch.testing.assert_close(compiled(x), eager(x))
        torch.testing.assert_close(compiled(x), eager(x))
        model.up.pool.update("red", (adapter("green")[0], adapter("green")[1]))  # changes its rank
        with lora_ext.adapters("red"):
            torch.testing.assert_close(compiled(x), eager(x))
        with pytest.raises(ValueError, match="expected a batch of 2 sequences"):
            with lora_ext.adapters(["red", "blue"]):
                compiled(x)
    assert backend.graphs == 1


def test_compiled_layer_is_differentiable() -> None:
    torch._dynamo.reset()
    model, x = make(), inputs(4, 5).requires_grad_()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with lora_ext.adapters(PER_SEQUENCE):
        grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, model)]
    torch.testing.assert_close(*grads)
