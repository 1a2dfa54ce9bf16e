"""Adapters of ranks 1 to 1024 in one pool, mixed in a batch and replaced in an attached model."""

import pytest
import torch
from pool_support import Base, assert_holds, config, state
from torch import Tensor

import lora_ext
from lora_ext.pool import AdapterPool


class Model(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


RANKS = {"vision": 1024, "text": 8, "odd": 257}


def loaded(ranks: dict[str, int] = RANKS) -> tuple[Model, AdapterPool, dict[str, dict]]:
    torch.manual_seed(0)
    model = Model()
    pool = AdapterPool(model, max_slots=3, max_rank=1024)
    tensors = {name: state(seed, rank) for seed, (name, rank) in enumerate(ranks.items())}
    for name, rank in ranks.items():
        pool.load(name, (config(rank), tensors[name]))
    return lora_ext.attach(model, pool), pool, tensors


def formula(model: Model, x: Tensor, names: list[str | None], tensors: dict) -> Tensor:
    rows = []
    for row, name in zip(x.double(), names, strict=True):
        for layer in ("up", "down"):
            base = getattr(model, layer).base
            y = base.weight.double() @ row + base.bias.double()
            if name is not None:
                a, b = (
                    tensors[name][f"base_model.model.{layer}.lora_{f}.weight"].double()
                    for f in "AB"
                )
                y = y + 8 / len(a) * (b @ (a @ row))
            row = y
        rows.append(row)
    return torch.stack(rows)


@torch.no_grad()
def test_adapters_of_any_rank_share_a_batch() -> None:
    model, pool, tensors = loaded()
    x = torch.randn(7, 12)
    names = ["vision", None, "text", "odd", "vision", "text", None]
    with lora_ext.adapters(names, pool=pool):
        y = model(x)
    # The tolerance covers two layers of float32 sums of up to 1024 terms of order one.
    torch.testing.assert_close(y.double(), formula(model, x, names, tensors), rtol=1e-5, atol=2e-4)
    with lora_ext.adapters(["text", "odd", None, None, "vision", None, "vision"], pool=pool):
        assert torch.equal(model(x)[4], y[4])  # Row 4 does not depend on the other rows.
    with lora_ext.adapters([None] * 7, pool=pool):
        assert torch.equal(model(x)[1], y[1])


@torch.no_grad()
@pytest.mark.parametrize("order", [(8, 1024, 8), (1024, 8, 1024)], ids=str)
def test_replacing_small_by_large_ranks_equals_a_fresh_pool(order: tuple[int, ...]) -> None:
    model, pool, _ = loaded({"a": 16, "other": 300})
    x, names = torch.randn(6, 12), ["a", "other", "a", "a", "other", None]
    others = None
    for seed, rank in enumerate(order, 10):
        tensors = state(seed, rank)
        pool.update("a", (config(rank), tensors))
        assert_holds(pool, "a", tensors, 8 / rank)
        with lora_ext.adapters(names, pool=pool):
            y = model(x)
        # The new pool has the same base model and other adapters.
        fresh, fresh_pool, _ = loaded({"other": 300})
        fresh_pool.load("a", (config(rank), tensors))
        fresh_pool.update("other", (config(300), state(1, 300)))
        with lora_ext.adapters(names, pool=fresh_pool):
            assert torch.equal(fresh(x), y)
        assert others is None or torch.equal(y[[1, 4, 5]], others)
        others = y[[1, 4, 5]]
