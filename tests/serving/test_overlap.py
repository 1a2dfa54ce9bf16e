"""Updates on a second stream: off by default, and bitwise equal for every allowed order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import Backend
from contract import assert_same_bits
from fake_cuda import FakeCuda
from torch import Tensor, nn
from two_layers import Adapter, random_adapter

import lora_ext
from lora_ext import ops
from lora_ext.serving.layers._overlap import MOST_ROWS, Overlap

NAMES = ["red", None, "blue"]


def adapter(rank: int) -> Adapter:
    return random_adapter({"q": (24, 16)}, rank, rank)


def attached(**how: Any) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(24, 16)}).eval()
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=16)
    pool.load("red", adapter(3))
    pool.load("blue", adapter(12))
    return lora_ext.attach(model, pool, **how)["q"]


def outputs(layer: Any, tokens: int = 5) -> Tensor:
    x = torch.randn(3, tokens, 24, generator=torch.Generator().manual_seed(7))
    with torch.no_grad(), lora_ext.adapters(NAMES, pool=layer.pool):
        return layer(x)


class Queues:
    """Replacement of linear, shrink and expand by functions that queue their work on the current
    stream of a fake device."""

    def __init__(self, world: FakeCuda, monkeypatch: pytest.MonkeyPatch):
        self.seen: list[tuple[str, Any]] = []  # name and stream of each queued function
        self._world = world
        self._linear, self._shrink, self._expand = F.linear, ops.lora_shrink, ops.lora_expand_
        monkeypatch.setattr(F, "linear", self.linear)
        monkeypatch.setattr(ops, "lora_shrink", self.shrink)
        monkeypatch.setattr(ops, "lora_expand_", self.expand)

    def _queue(self, name: str, work: Any) -> None:
        self.seen.append((name, self._world.active))
        self._world.launch(torch.no_grad()(work))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = x.new_full((*x.shape[:-1], len(weight)), torch.nan)
        self._queue("base", lambda: y.copy_(self._linear(x, weight, bias)))
        return y

    def shrink(self, x: Tensor, *rest: Any) -> Tensor:
        v = x.new_full((len(x), 16), torch.nan)
        self._queue("shrink", lambda: v.copy_(self._shrink(x, *rest)))
        return v

    def expand(self, *args: Any) -> None:
        self._queue("expand", lambda: self._expand(*args))


@pytest.mark.parametrize("seed", range(4))
def test_every_allowed_order_is_bitwise_equal_to_one_stream(
    backend: Backend, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = attached()
    expected = outputs(layer)
    world = FakeCuda(seed)
    layer.overlap = Overlap(world, devices=("cpu",))
    queues = Queues(world, monkeypatch)
    found = [outputs(layer), outputs(layer)]  # The second call must wait for the first.
    world.run()
    for y in found:
        assert_same_bits(y, expected)
    here = world.streams[0]
    assert [name for name, _ in queues.seen] == ["shrink", "base", "expand"] * 2
    assert [stream is here for _, stream in queues.seen] == [False, True, True] * 2
    assert len(world.streams) == 2  # the current stream and one more


def test_some_order_is_wrong_if_streams_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_cuda.Stream.wait_stream", lambda *_: None)
    wrong = 0
    for seed in range(8):
        with monkeypatch.context() as patch:
            layer, world = attached(), FakeCuda(seed)
            layer.overlap = Overlap(world, devices=("cpu",))
            Queues(world, patch)
            y = outputs(layer)
            world.run()
            wrong += bool(y.isnan().any())
    assert wrong


def test_overlap_is_off_by_default_and_on_a_cpu() -> None:
    assert attached().overlap is None
    layer = attached(overlap=True)
    assert_same_bits(outputs(layer), outputs(attached()))
    assert layer.overlap._sides == {}


def test_many_rows_and_gradients_use_one_stream() -> None:
    layer, world = attached(), FakeCuda(0)
    layer.overlap = Overlap(world, devices=("cpu",))
    outputs(layer, MOST_ROWS // 3 + 1)
    with lora_ext.adapters(NAMES, pool=layer.pool):
        layer(torch.ones(3, 5, 24, requires_grad=True)).sum().backward()
        layer(torch.ones(3, 5, 24))
    with torch.no_grad():
        layer(torch.ones(3, 5, 24))  # Outside of a block, this call uses the base model only.
    assert len(world.streams) == 1
    outputs(layer, MOST_ROWS // 3)
    assert len(world.streams) == 2


def test_overlap_with_fused_siblings_is_refused() -> None:
    model = nn.ModuleDict({"q": nn.Linear(24, 16)})
    pool = lora_ext.AdapterPool(model, max_slots=1, max_rank=8)
    expected = "attach: overlap: expected False if fuse_siblings is True, found True"
    with pytest.raises(ValueError, match=expected):
        lora_ext.attach(model, pool, fuse_siblings=True, overlap=True)
    lora_ext.attach(model, pool)
