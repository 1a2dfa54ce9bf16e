"""Dropout seeds per adapter: the masks of an adapter do not depend on other adapters in the
batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_ext.nn import LoraConv, LoraFactors, LoraLinear, lora_forward
from lora_ext.reference.lora_train import dropout_keep

pytestmark = pytest.mark.hosts

IDS = torch.tensor([1, -1, 0, 1, 2, 0, 1, -1, 2, 1])


def adapters(seeds: list[Tensor | None], p: float = 0.5, **options: Any) -> list[LoraFactors]:
    g = torch.Generator().manual_seed(1)
    ranks = (3, 2, 4)
    return [
        LoraFactors(
            torch.randn(r, 20, generator=g).requires_grad_(),
            torch.randn(12, r, generator=g).requires_grad_(),
            float(1 + i), p, None, seed,
        )
        for i, (r, seed) in enumerate(zip(ranks, seeds, strict=False))
    ]  # fmt: skip


def grads(y: Tensor, f: LoraFactors, dy: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, (f.a, f.b), dy, retain_graph=True))


@pytest.mark.parametrize("plain_base", [True, False])
def test_adapter_among_others_equals_the_adapter_alone(plain_base: bool) -> None:
    base = nn.Linear(20, 12)
    nn.init.zeros_(base.weight)
    if not plain_base:
        base.register_forward_hook(lambda *_: None)
    parts = adapters([torch.tensor(5), torch.tensor([6]), torch.tensor(-7)])
    x, dy = torch.randn(10, 20), torch.randn(10, 12)
    y = lora_forward(x, base, parts, IDS)
    for i, f in enumerate(parts):
        own = IDS == i
        alone = lora_forward(x[own], base, [f])
        assert torch.equal(alone, y[own])
        assert all(map(torch.equal, grads(alone, f, dy[own]), grads(y, f, dy)))
        among_base = lora_forward(x, base, parts[i : i + 1], torch.where(own, 0, -1))
        assert torch.equal(among_base[own], y[own])


def test_layer_uses_the_seed_of_its_adapter() -> None:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(20, 12), r=3, lora_dropout=0.5, init_lora_weights=False)
    x = torch.randn(6, 20)
    before = torch.get_rng_state()
    layer.dropout_seed["default"] = torch.tensor(2**40 + 5)
    y = layer(x)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(layer(x), y)
    a, b, scaling, p, *_ = layer.factors("default")
    kept = torch.where(dropout_keep(6, 20, p, 2**40 + 5), x / (1 - p), 0)
    torch.testing.assert_close(y, layer.base_layer(x) + scaling * kept @ a.T @ b.T)
    layer.add_adapter("other", 2, lora_dropout=0.5, init_lora_weights=False)
    layer.dropout_seed["other"] = torch.tensor(1)
    mixed = layer(x.repeat_interleave(2, 0), ["other", "default"] * 6)
    torch.testing.assert_close(mixed[1::2], y)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train().delete_adapter("default")
    assert list(layer.dropout_seed) == ["other"]


def test_adapter_without_a_seed_draws_one_if_others_have_seeds() -> None:
    base, x = nn.Linear(20, 12), torch.randn(10, 20)
    parts = adapters([torch.tensor(5), None, torch.tensor(7)])
    first, second = (lora_forward(x, base, parts, IDS) for _ in range(2))
    drawn = IDS == 1
    assert torch.equal(first[~drawn], second[~drawn])
    assert not torch.equal(first[drawn], second[drawn])
    torch.manual_seed(3)
    first = lora_forward(x, base, parts, IDS)
    torch.manual_seed(3)
    assert torch.equal(first, lora_forward(x, base, parts, IDS))


def test_adapters_of_different_dropout_keep_their_seeds() -> None:
    base, x = nn.Linear(20, 12), torch.randn(10, 20)
    parts = adapters([torch.tensor(5), torch.tensor(6), torch.tensor(7)])
    parts[1] = parts[1]._replace(p=0.25)
    y = lora_forward(x, base, parts, IDS)
    for i, f in enumerate(parts):
        torch.testing.assert_close(y[IDS == i], lora_forward(x[IDS == i], base, [f]))


def test_dora_uses_the_seed() -> None:
    torch.manual_seed(0)
    options = {"lora_dropout": 0.5, "init_lora_weights": False, "use_dora": True}
    layer = LoraLinear(nn.Linear(20, 12), "a", 3, **options)
    layer.add_adapter("b", 2, **options)
    layer.dropout_seed |= {"a": torch.tensor(5), "b": torch.tensor(6)}
    x = torch.randn(8, 20)
    y = layer(x, ["b", None, "a", "b", "a", "a", None, "b"])
    for name, rows in (("a", [2, 4, 5]), ("b", [0, 3, 7])):
        layer.set_adapter(name)
        torch.testing.assert_close(y[rows], layer(x[rows]))


def test_convolution_uses_the_seed() -> None:
    layer = LoraConv(nn.Conv2d(3, 5, 2, 2), r=2, lora_dropout=0.5, init_lora_weights=False)
    x = torch.randn(2, 3, 8, 8)
    layer.dropout_seed["default"] = torch.tensor(5)
    assert torch.equal(layer(x), layer(x))
    del layer.dropout_seed["default"]
    assert not torch.equal(layer(x), layer(x))


def test_seed_may_change_under_checkpoints_and_compiled_graphs() -> None:
    layer = LoraLinear(nn.Linear(20, 12), r=3, lora_dropout=0.5, init_lora_weights=False)
    layer.set_adapter("default")
    x = torch.randn(6, 20, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = (x, *(p for p in layer.parameters() if p.requires_grad))
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False), compiled):
        for seed in (3, 4):
            layer.dropout_seed["default"] = torch.tensor(seed)
            found.append(torch.autograd.grad(run(x).square().sum(), wanted))
    for i in (2, 4):
        for first, other in zip(found[:2], found[i : i + 2], strict=True):
            assert all(map(torch.equal, first, other))
    assert not torch.equal(found[0][0], found[1][0])


def test_invalid_seed_raises() -> None:
    base, x = nn.Linear(20, 12), torch.randn(10, 20)
    for seed, found in ((torch.tensor(5.0), "Float"), (torch.tensor(5, dtype=torch.int32), "Int")):
        with pytest.raises(ValueError, match=f"lora_linear: seed: expected .*Long.* {found}"):
            lora_forward(x, base, adapters([seed]))
    two = [torch.tensor([1, 2]), torch.tensor(1), torch.tensor(2)]
    with pytest.raises(ValueError, match="lora_linear: seed: expected"):
        lora_forward(x, base, adapters(two), IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapter_in_mixtures_has_the_masks_of_the_adapter_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer: Any = LoraLinear(nn.Linear(20, 12), "a", r=3, lora_dropout=0.5, init_lora_weights=False)
    for name, p in (("b", 0.5), ("c", 0.25)):
        layer.add_adapter(name, r=4, lora_dropout=p, init_lora_weights=False, lora_bias=True)
        nn.init.normal_(layer.lora_B[name].bias)
    layer.to(dtype).train().requires_grad_(True)
    layer.dropout_seed |= {"a": torch.tensor(1), "b": torch.tensor(2), "c": torch.tensor(3)}
    x, ids = torch.randn(4, 20, dtype=dtype), torch.tensor([[0, 2], [1, 0], [-1, 1], [1, 1]])
    weights = torch.rand(4, 2, dtype=dtype, requires_grad=True)
    for w in (weights, None):
        y = expected = layer.base_layer(x)
        for i in range(3):
            of_it = torch.where(ids == i, 1 if w is None else w, 0).sum(1, keepdim=True)
            alone = layer(x, torch.where((ids == i).any(1), i, -1))
            expected = expected + of_it * (alone - y)
        found = layer(x, ids, adapter_weights=w)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        inputs = [p for p in (weights, *layer.parameters()) if p is not weights or w is not None]
        grads = [torch.autograd.grad(each.sum(), inputs) for each in (found, expected)]
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    entries = [{"a": 0.5, "b": -2.0}, "b", ("c", 3.0), None]
    torch.testing.assert_close(layer(x, entries)[1], layer(x, ["b", "b", None, None])[1])
