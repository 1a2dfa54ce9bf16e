"""A training step of two models that should do the same, compared in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CLOSE = 1e-11  # of the largest entry: some hundred roundings of float64


def assert_close(got: Tensor, expected: Tensor, what: str = "") -> None:
    worst = (got - expected).abs().max().item()
    assert worst <= CLOSE * max(1.0, expected.abs().max().item()), f"{what}: {worst}"


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(
    ours: nn.Module, expected: dict[str, Tensor | None], moved: int = 1
) -> None:
    """At least ``moved`` of them are no zeros."""
    found = gradients(ours)
    assert found.keys() == expected.keys()
    assert sum(g is not None and bool(g.abs().max() > 1e-3) for g in expected.values()) >= moved
    for name, gradient in expected.items():
        got = found[name]
        assert (got is None) == (gradient is None), name
        if got is not None and gradient is not None:
            assert_close(got, gradient, name)


def step(model: Any, run: Callable[[Any], Tensor]) -> Tensor:
    model.zero_grad(set_to_none=True)
    value = run(model)
    weights = torch.randn(value.shape, generator=torch.manual_seed(7), dtype=value.dtype)
    (value * weights).sum().backward()
    return value.detach()
