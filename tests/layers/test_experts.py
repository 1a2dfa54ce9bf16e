"""The forward of routed experts, compared with transformers and with values computed by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from lora_ext.layers._experts import (
    Routing,
    experts_forward,
    experts_update,
    projections,
    route,
    slots_of,
)
from lora_ext.layers._lora_forward import LoraFactors

EXPERTS, HIDDEN, INNER = 3, 8, 4  # torch's grouped product requires rows of 16 bytes.
FLAGS: list[dict[str, bool]] = [
    {},
    {"has_gate": False},
    {"is_transposed": True, "has_bias": True},
    {"has_post_expert_norm": True},
    {"has_gate": False, "is_transposed": True, "has_bias": True, "has_post_expert_norm": True},
]


def experts(how: str = "grouped_mm", **flags: bool) -> Any:
    """Return a module of experts like those of transformers. ``flags`` select its layout."""

    @use_experts_implementation(**flags)
    class Experts(nn.Module):
        def __init__(self, config: Any):
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, nn.functional.silu
            wide = INNER if flags.get("has_gate") is False else 2 * INNER
            up = "up_proj" if wide == INNER else "gate_up_proj"
            for name, out, inner in ((up, wide, HIDDEN), ("down_proj", HIDDEN, INNER)):
                shape = (inner, out) if flags.get("is_transposed") else (out, inner)
                self.register_parameter(name, nn.Parameter(torch.randn(EXPERTS, *shape)))
                if flags.get("has_bias"):
                    bias = nn.Parameter(torch.randn(EXPERTS, out))
                    self.register_parameter(f"{name}_bias", bias)

        def post_expert_norm(self, x: Tensor) -> Tensor:
            return x / x.norm(dim=-1, keepdim=True)

        def forward(self, *_: Any) -> None:
            raise AssertionError("expected a call of transformers' functions")

    torch.manual_seed(0)
    return Experts(SimpleNamespace(_experts_implementation=how)).requires_grad_(False)


def unchanged(_: str, y: Tensor, __: Tensor, ___: Routing) -> Tensor:
    return y


def batch(rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, indices of their experts, and routing weights. No row is sent to expert 1."""
    generator = torch.manual_seed(1)
    x = torch.randn(rows, HIDDEN, generator=generator)
    index = torch.tensor([[0, 2], [2, 0]])[torch.arange(rows) % 2]
    return x, index, torch.rand(rows, 2, generator=generator)


@pytest.mark.parametrize("how", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("flags", FLAGS)
def test_forward_without_adapters_equals_transformers(flags: Any, how: str) -> None:
    module = experts(how, **flags)
    x, index, weights = batch()
    expected = module(x, index, weights)
    assert torch.equal(experts_forward(module, x, index, weights, unchanged), expected)


@pytest.mark.parametrize("flags", FLAGS)
def test_gradient_of_the_rows_is_correct(flags: Any) -> None:
    module = experts(**flags).double()
    x, index, weights = batch()
    args = x.double().requires_grad_(), index, weights.double().requires_grad_()
    torch.autograd.gradcheck(
        lambda x, w: experts_forward(module, x, index, w, unchanged), (args[0], args[2])
    )


def test_batch_without_rows_is_empty() -> None:
    x, index, weights = batch(0)
    assert experts_forward(experts(), x, index, weights, unchanged).shape == (0, HIDDEN)


def test_projections_have_the_same_sizes_in_both_layouts() -> None:
    plain, turned = projections(experts()), projections(experts(is_transposed=True))
    assert plain == turned == {"gate_up_proj": (HIDDEN, 2 * INNER), "down_proj": (INNER, HIDDEN)}
    assert list(projections(experts(has_gate=False))) == ["up_proj", "down_proj"]
    assert projections(nn.Linear(3, 4)) == {}
    assert projections(experts().to(torch.float8_e4m3fn)) == {}


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
def test_routing_contains_every_pair_once(how: str) -> None:
    index = torch.tensor([[2, 0], [0, 1], [2, 1]])
    found = route(index, 4, how)
    assert sorted(found.order.tolist()) == list(range(6))
    assert found.token.tolist() == (found.order // 2).tolist()
    assert found.expert.tolist() == index.flatten()[found.order].tolist()
    if found.ends is not None:
        assert found.expert.tolist() == sorted(found.expert.tolist())
        assert found.ends.tolist() == [2, 4, 6, 6]
    if how == "eager":  # First choices of all rows come before second ones.
        assert found.order.tolist() == [2, 1, 3, 5, 0, 4]


def test_slots_count_the_experts_of_each_adapter() -> None:
    routing = route(torch.tensor([[2, 0], [0, 1], [2, 1]]), 3, "batched_mm")
    rows = torch.tensor([1, -1, 0], dtype=torch.int32)
    assert slots_of(routing, rows, 2, 3).ids.tolist() == [5, 3, -1, -1, 2, 1]
    assert slots_of(routing, None, 1, 3).ids.tolist() == [2, 0, 0, 1, 2, 1]


def test_update_uses_the_factors_of_adapter_and_expert() -> None:
    """Check an update of small integers, with two experts and factors stacked as by PEFT."""
    first = LoraFactors(
        # two rows for expert 0, then two rows for expert 1
        a=torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 3]]),
        # columns: rank 0 of both experts, then rank 1 of both
        b=torch.tensor([[1.0, 10, 100, 1000]]),
        scaling=2.0,
    )
    second = LoraFactors(torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[5.0, 7]]), 1.0)
    routing = route(torch.tensor([[0], [1], [0], [1], [1]]), 2, "batched_mm")
    slots = slots_of(routing, torch.tensor([0, 0, 1, 1, -1], dtype=torch.int32), 2, 2)
    x = torch.tensor([[3.0, 4]]).expand(5, 2)
    y = experts_update(torch.ones(5, 1), x, [first, second], slots, 2)
    assert y.flatten().tolist() == [
        1 + 2 * (1 * 3 + 100 * 4),
        1 + 2 * (10 * 6 + 1000 * 12),
        1 + 5 * 7,
        1 + 7 * -1,
        1,
    ]
