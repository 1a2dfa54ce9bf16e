"""Rows of a client need no autograd graph below the lowest layer that the client trains."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted_models import KINDS, adapted
from client_models import (
    PLANS,
    Classifier,
    assert_as_alone,
    assert_close,
    next_token,
    tokens,
    vectors,
)
from federated_rounds import same_bits
from torch import Tensor, nn

from lora_ext.federated import BatchedClients, ClientSpec, LayerPlan, LoraLayerManager, Update
from lora_ext.nn import LoraLinear

ALL = (0, 1, 2)
ROWS = 8  # rows of the first step, summed over the four clients


def trained(model: nn.Module, clients, plans, state, **options) -> list[Update]:
    """Return a round's updates; a warning that the staircase cannot split a block is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return BatchedClients(model, clients, **options).run_round(plans, state)


def saved_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the number of bytes that ``run`` saves for the backward, without the weights."""
    total = 0
    weights = {p.data_ptr() for p in model.parameters()}

    def pack(t: Tensor) -> Tensor:
        nonlocal total
        total += 0 if t.data_ptr() in weights else t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return total


@pytest.mark.parametrize("others", ["frozen", "disabled"])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_depths_equal_the_loop(kind: str, others: str):
    model = adapted(kind).double()
    state = LoraLayerManager(model).state_slice()
    plans = [LayerPlan((2,)), LayerPlan((0, 2)), LayerPlan(()), LayerPlan((1, 2)), LayerPlan((2,))]
    lengths = [[4, 6], [7], [3, 3, 5], [5], [6, 6]]
    clients = [
        ClientSpec(i, tokens(lengths[i], i, rows=1 + i % 3), lr=0.05) for i in range(len(plans))
    ]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = trained(model, clients, plans, state, others=others)
    assert same_bits(dict(model.state_dict()), before)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert getattr(model, "config", None) is None or model.config.use_cache
    assert_as_alone(found, model, state, clients, plans, others, loss_of=next_token)
    assert found[2].tensors == {}
    assert found[2].num_examples == 9


def rows_with_a_graph(model: nn.Module, run: Callable[[], object]) -> list[list[tuple[int, bool]]]:
    """Return the number of rows, and whether gradients were enabled, in each call of each block."""
    calls: list[list[tuple[int, bool]]] = [[] for _ in ALL]
    for index, layer in enumerate(model.model.layers):

        def watch(module: nn.Module, args: Any, index: int = index) -> None:
            calls[index].append((args[0].shape[0], torch.is_grad_enabled()))

        layer.mlp.register_forward_pre_hook(watch)
    run()
    return calls


def test_block_runs_rows_of_deep_clients_with_a_graph_and_others_without():
    model = adapted("ours").double()
    state = LoraLayerManager(model).state_slice()
    clients = [ClientSpec(i, tokens([5], i, rows=2), lr=0.1) for i in range(3)]
    plans = [LayerPlan((2,)), LayerPlan((1, 2)), LayerPlan((1,))]
    calls = rows_with_a_graph(model, lambda: trained(model, clients, plans, state))
    assert calls == [[(6, False)], [(4, True), (2, False)], [(6, True)]]


def test_saved_bytes_decrease_with_each_clients_depth():
    model = adapted("ours")
    state = LoraLayerManager(model).state_slice()
    clients = [ClientSpec(i, tokens([9], i, rows=16), lr=0.1) for i in range(2)]

    def saved(first: int, second: int, **options) -> int:
        plans = [LayerPlan(ALL[-depth:]) for depth in (first, second)]
        return saved_bytes(model, lambda: trained(model, clients, plans, state, **options))

    whole, two, one = (saved(depth, depth) for depth in (3, 2, 1))
    assert one < two < whole
    assert one + whole == pytest.approx(2 * two, rel=0.05)  # All layers save equally many bytes.
    assert saved(3, 1) == pytest.approx((whole + one) / 2, rel=0.05)
    assert saved(3, 1, staircase=False) > 0.95 * whole


# transformers passes deprecated argument names and warns.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpoint_recomputes_the_same_rows():
    model = adapted("ours").double().train()
    state = LoraLayerManager(model).state_slice()
    clients = [ClientSpec(i, tokens([4 + i, 6], i), lr=0.05) for i in range(4)]
    plans = [LayerPlan((2,)), LayerPlan((0, 2)), LayerPlan((1,)), LayerPlan(())]
    wanted = trained(model, clients, plans, state)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert saved_bytes(model, lambda: trained(model, clients, plans, state)) > 0
    for update, other in zip(trained(model, clients, plans, state), wanted, strict=True):
        assert_close(update, other, 1e-12)


def test_submodule_with_its_own_config_uses_no_cache():
    model = adapted("ours").double()
    model.model.config = copy.deepcopy(model.config)
    state = LoraLayerManager(model).state_slice()
    clients = [ClientSpec(i, tokens([4], i), lr=0.05) for i in range(2)]
    trained(model, clients, [LayerPlan((2,)), LayerPlan((0,))], state)
    assert model.config.use_cache and model.model.config.use_cache


class Block(nn.Module):
    """Layer whose output is passed, with any further inputs, to ``compute``."""

    def __init__(self, q: LoraLinear, compute: Callable[..., Any]):
        super().__init__()
        self.q, self.compute = q, compute

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.compute(x + torch.tanh(self.q(x)), *args, **kwargs)


class Writing(Block):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x.mul_(0.5), *args, **kwargs)


class Stack(nn.Module):
    """Model that calls its blocks with ``run(blocks, x)``."""

    def __init__(self, run: Callable[..., Tensor], compute: Callable[..., Any] = lambda y: y):
        super().__init__()
        inner = Classifier()
        self.layers = nn.ModuleList(Block(layer, compute) for layer in inner.layers)
        self.head, self.run = inner.head, run

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.layers, x))


def in_order(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def twice(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return in_order(blocks, blocks[0](x))


def upside_down(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return in_order(reversed(blocks), x)


def with_an_object(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, cache=object())
    return x


def with_a_table(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, torch.arange(ROWS, dtype=x.dtype))
    return x


def first_of(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)[0]
    return x


def of_stack(*arguments: Any, writes: bool = False, rows: tuple[int, int] = (2, 2)) -> Any:
    """Return a stack, its global adapter, and its clients."""
    model = Stack(*arguments).double()
    for block in model.layers if writes else ():
        block.__class__ = Writing
    clients = [ClientSpec(c, vectors([*rows], i), lr=0.05) for i, c in enumerate(PLANS)]
    return model, LoraLayerManager(model).state_slice(), clients


def check_equal(model: Stack, clients: list[ClientSpec], updates: list[Update]) -> None:
    assert not any("forward" in module.__dict__ for module in model.modules())
    state = LoraLayerManager(model).state_slice()
    assert_as_alone(updates, model, state, clients, PLANS)


def test_blocks_with_nested_inputs_and_outputs_are_split():
    def run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x, shared, (again, factor) = block(x, [x], scale={"by": 2.0, "rows": x[:, :1]})
            assert shared is None and factor == 2.0 and again.shape == x.shape
        return x

    def compute(y: Tensor, others: list[Tensor], scale: dict[str, Any]) -> Any:
        y = y + scale["by"] * others[0] * scale["rows"]
        return y, None, [y, 2.0]

    model, state, clients = of_stack(run, compute, rows=(3, 4))
    check_equal(model, clients, trained(model, clients, PLANS, state))


def only_with_a_graph(y: Tensor) -> Tensor:
    return y * (1 // int(torch.is_grad_enabled()))


@pytest.mark.parametrize(
    ("run", "compute", "found"),
    [
        (twice, lambda y: y, "block 0 runs after block 0"),
        (upside_down, lambda y: y, "block 1 runs after block 2"),
        (with_an_object, lambda y, cache: y, "a block has an argument of type object"),
        (with_a_table, lambda y, table: y + table.mean(), "a block computes other values"),
        (first_of, lambda y: (y, y.new_ones(3)), r"returns tensors of \[3\], \[3\]"),
        (first_of, lambda y: {0: y}, "a block returns a dict"),
        (in_order, only_with_a_graph, "division or modulo by zero"),
    ],
)
def test_blocks_that_cannot_be_split_run_whole_with_a_warning(run, compute, found):
    model, state, clients = of_stack(run, compute)
    with pytest.warns(UserWarning, match=f"^BatchedClients: staircase: .*{found}") as caught:
        updates = BatchedClients(model, clients).run_round(PLANS, state)
    assert len(caught) == 1  # The staircase warns only in the first step of a round.
    check_equal(model, clients, updates)


def test_blocks_that_write_into_their_inputs_run_whole():
    model, state, clients = of_stack(in_order, writes=True)
    with pytest.warns(UserWarning, match="rows: a block changes an argument of shape"):
        updates = BatchedClients(model, clients).run_round(PLANS, state)
    check_equal(model, clients, updates)


def test_error_raised_once_outside_the_blocks_is_raised():
    calls: list[int] = []

    def run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 1:
            raise OSError("the token file is missing")
        return in_order(blocks, x)

    model, state, clients = of_stack(run)
    with pytest.raises(OSError, match="the token file is missing"):
        BatchedClients(model, clients).run_round(PLANS, state)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_out_of_memory_in_a_block_is_raised():
    calls: list[int] = []

    def compute(y: Tensor) -> Tensor:
        calls.append(len(y))
        if len(calls) == 1:
            raise MemoryError("out of device memory")
        return y

    model, state, clients = of_stack(in_order, compute)
    with pytest.raises(MemoryError, match="out of device memory"):
        BatchedClients(model, clients).run_round(PLANS, state)
