"""`PrefixCache`: cached activations below the trained layers, equal updates, and errors."""

from __future__ import annotations

import pytest
import torch
from adapted_models import KINDS, adapted
from federated_rounds import same_bits
from torch import Tensor, nn

from lora_ext.federated import LayerPlan, LoraLayerManager
from lora_ext.methods.legend import PrefixCache
from lora_ext.nn import LoraLinear

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 3, 5], [2, 2, 4, 4]])
BATCHES = ([0, 1], [2, 3])


class Stack(nn.Module):
    """Residual blocks on vectors, with an optional extra module."""

    def __init__(self, block: nn.Module | None = None, in_tuple: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(in_tuple) for _ in range(3))
        self.extra = block

    def forward(self, x: Tensor) -> Tensor:
        if self.extra is not None:
            x = self.extra(x)
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


class Block(nn.Module):
    def __init__(self, in_tuple: bool):
        super().__init__()
        linear = nn.Linear(6, 6).requires_grad_(False)
        self.linear = LoraLinear(linear, r=2, init_lora_weights=False)
        self.in_tuple = in_tuple
        self.runs = 0

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, None]:
        self.runs += 1
        x = hidden_states + torch.tanh(self.linear(hidden_states))
        return (x, None) if self.in_tuple else x


def trained(
    model: nn.Module, plans: list[LayerPlan], cache_dtype: torch.dtype | None, cached: bool
) -> dict[str, Tensor]:
    """Train rounds of two epochs; return the state after them."""
    manager = LoraLayerManager(model)
    cache = PrefixCache(manager, cache_dtype)
    for plan in plans:
        manager.apply(plan, others="disabled")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for rows in BATCHES * 2:
            ids = IDS[rows]
            with manager.boundary():
                if cached:
                    with cache.batch(rows):
                        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                else:
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if cached:
        assert cache.hits > 0
    return manager.state_slice()


PLANS = [LayerPlan((2,)), LayerPlan((1, 2)), LayerPlan((2,)), LayerPlan((0, 1, 2)), LayerPlan((2,))]


@pytest.mark.parametrize("kind", KINDS)
def test_cache_changes_no_bit_of_the_updates(kind: str):
    with_cache, without = (trained(adapted(kind), PLANS, None, cached) for cached in (True, False))
    assert same_bits(with_cache, without)


def test_bfloat16_cache_takes_half_the_memory_and_changes_updates_little():
    with_cache, without = (
        trained(adapted("ours"), PLANS[:1], torch.bfloat16, cached) for cached in (True, False)
    )
    assert not same_bits(with_cache, without)
    assert max((with_cache[k] - without[k]).abs().max() for k in without) < 0.1
    sizes = []
    for dtype in (None, torch.bfloat16):
        manager = LoraLayerManager(Stack())
        manager.apply(LayerPlan((2,)), others="disabled")
        cache = PrefixCache(manager, dtype)
        with cache.batch("ab"):
            manager.model(torch.ones(2, 6))
        sizes.append(cache.nbytes)
    assert sizes == [2 * 6 * 4, 2 * 6 * 2]


@pytest.mark.parametrize("in_tuple", [False, True])
def test_cached_blocks_do_not_run_again_until_depth_grows(in_tuple: bool):
    model = Stack(in_tuple=in_tuple)
    manager = LoraLayerManager(model)
    cache = PrefixCache(manager)
    x = torch.randn(2, 6)
    expected = {}
    for plan, runs, counts in (
        (LayerPlan((2,)), (1, 1, 1), (0, 1)),
        (LayerPlan((2,)), (1, 1, 2), (1, 1)),
        (LayerPlan((1, 2)), (2, 2, 3), (1, 2)),  # One block fewer is below the trained layers.
        (LayerPlan((1, 2)), (2, 3, 4), (2, 2)),
        (LayerPlan((2,)), (2, 4, 5), (3, 2)),  # uses the activations cached for (1, 2)
        (LayerPlan((0, 1, 2)), (3, 5, 6), (3, 2)),  # No block is below the trained layers.
    ):
        manager.apply(plan, others="disabled")
        with cache.batch(["a", "b"]):
            found = model(x)
        assert torch.equal(expected.setdefault(plan.layers, found), found)
        assert tuple(block.runs for block in model.layers) == runs
        assert (cache.hits, cache.misses) == counts
        assert not any(block._forward_hooks for block in model.layers)


def test_samples_are_cached_separately_and_found_in_any_order():
    model = Stack()
    manager = LoraLayerManager(model)
    manager.apply(LayerPlan((2,)), others="disabled")
    cache = PrefixCache(manager)
    x = torch.randn(4, 6)
    with cache.batch([0, 1]):
        model(x[:2])
    with cache.batch([2, 3]):
        model(x[2:])
    assert len(cache) == 4
    with cache.batch([3, 0, 3]):
        found = model(x[[3, 0, 3]])
    assert (cache.hits, cache.misses) == (1, 2)
    assert torch.allclose(found, model(x[[3, 0, 3]]), atol=1e-6)
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_suffix_gradients_equal_those_of_the_whole_graph():
    model, x = Stack(), torch.randn(2, 6)
    manager = LoraLayerManager(model)
    manager.apply(LayerPlan((1, 2)), others="disabled")
    seen: list[Tensor] = []
    model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x.clone().requires_grad_()).square().sum().backward()
    expected = gradients(model)
    assert len(expected) == 4
    assert seen.pop().grad_fn is not None  # without a boundary, the graph reaches the input
    cache = PrefixCache(manager)
    for _ in ("computed", "recalled"):
        with manager.boundary(), cache.batch([0, 1]):
            model(x.clone().requires_grad_()).square().sum().backward()
        assert seen.pop().grad_fn is None
        assert same_bits(gradients(model), expected)
    assert (cache.hits, cache.misses) == (1, 1)


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        (nn.Dropout(0.1), "extra: .* found p = 0.1"),
        (nn.BatchNorm1d(6), "extra: .* found batch normalisation"),
        (nn.MultiheadAttention(6, 2, dropout=0.2), "extra: .* found dropout = 0.2"),
    ],
)
def test_random_modules_below_are_refused_in_training(extra: nn.Module, found: str):
    model = Stack(extra)
    manager = LoraLayerManager(model)
    manager.apply(LayerPlan((2,)), others="disabled")
    model.eval()
    with PrefixCache(manager).batch([0]):
        pass
    model.train()
    with pytest.raises(ValueError, match=f"PrefixCache: {found}"), PrefixCache(manager).batch([0]):
        pass


def test_dropout_is_accepted_in_trained_layers_and_disabled_adapters():
    model = Stack()
    model.layers[2].drop = nn.Dropout(0.5)
    # The plan below disables this adapter.
    model.layers[0].linear.lora_dropout["default"] = nn.Dropout(0.5)
    manager = LoraLayerManager(model.train())
    manager.apply(LayerPlan((2,)), others="disabled")
    with PrefixCache(manager).batch([0]):
        model(torch.ones(1, 6))
    model.layers[1].drop = nn.Dropout(0.5)
    with pytest.raises(ValueError, match=r"layers\.1\.drop"), PrefixCache(manager).batch([0]):
        pass


def test_active_adapter_below_is_refused():
    manager = LoraLayerManager(Stack())
    manager.apply(LayerPlan((2,)))  # frozen, not disabled
    wanted = r"layers.0.linear: expected no active adapter below .*apply\(plan, others='disabled'\)"
    with pytest.raises(ValueError, match=wanted), PrefixCache(manager).batch([0]):
        pass


def test_sample_names_that_do_not_fit_the_rows_are_refused():
    model = Stack()
    manager = LoraLayerManager(model)
    manager.apply(LayerPlan((2,)), others="disabled")
    cache = PrefixCache(manager)
    with pytest.raises(ValueError, match="samples: expected 2 names"), cache.batch([0, 1, 2]):
        model(torch.ones(2, 6))
    assert len(cache) == 0
    with cache.batch([0]):
        model(torch.ones(1, 4, 6))
    before = dict(model.named_modules())
    with (
        pytest.raises(ValueError, match=r"cached shape \[1, 4\], found \[1, 5\]"),
        cache.batch([0]),
    ):
        model(torch.ones(1, 5, 6))
    assert dict(model.named_modules()) == before  # The blocks are restored after an error.
