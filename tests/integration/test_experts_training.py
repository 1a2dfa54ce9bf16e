"""Adapters on routed experts in training: from_peft against PEFT itself, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixtures import CONFIGS, DOWN, FAMILIES, UP, make_mixture, make_peft, tokens
from torch import Tensor, nn

import lora_ext
from lora_ext.interop.peft import report, to_peft

CLOSE = 1e-11  # of the largest entry: some hundred roundings of float64
NAMES = ["red", "green", "__base__", "blue", "green"]


def pair(family: str, configs: Any = CONFIGS, **extra: Any) -> tuple[Any, Any]:
    """The same adapters twice: PEFT's own layers, and ours."""
    theirs = make_peft(make_mixture(family), configs, **extra).double()
    return theirs, lora_ext.from_peft(copy.deepcopy(theirs))


def assert_close(got: Tensor, expected: Tensor, what: str = "") -> None:
    worst = (got - expected).abs().max().item()
    assert worst <= CLOSE * max(1.0, expected.abs().max().item()), f"{what}: {worst}"


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(ours: nn.Module, expected: dict[str, Tensor | None]) -> None:
    found = gradients(ours)
    assert found.keys() == expected.keys()
    assert sum(g is not None and bool(g.abs().max() > 1e-3) for g in expected.values()) >= 8
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


def logits(model: Any, **kwargs: Any) -> Tensor:
    return model(input_ids=tokens(5, 6), **kwargs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_wrapper_is_taken(family: str) -> None:
    _, ours = pair(family)
    found = report(ours)
    assert not found.left
    assert sum(".experts" in name for name in found.taken) == 4  # two parameters, two layers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", CONFIGS)
def test_forward_and_gradients_are_those_of_peft(family: str, adapter: str) -> None:
    theirs, ours = pair(family)
    for model in (theirs, ours):
        model.set_adapter(adapter)
        model.train()
    assert_close(step(ours, logits), step(theirs, logits))
    assert_same_gradients(ours, gradients(theirs))


@pytest.mark.parametrize("parameter", [UP, DOWN])
def test_one_parameter_alone(parameter: str) -> None:
    configs = {"red": {"r": 4, "target_parameters": [parameter]}}
    for family in FAMILIES:
        theirs, ours = pair(family, configs)
        assert_close(step(ours, logits), step(theirs, logits))
        expected = gradients(theirs)
        assert sum(g is not None for g in expected.values()) == 4
        for name, gradient in expected.items():
            if gradient is not None:
                assert_close(ours.get_parameter(name).grad, gradient, name)


def test_several_active_adapters_add_up() -> None:
    theirs, ours = pair("gpt_oss")
    for model in (theirs, ours):
        model.base_model.set_adapter(["red", "green", "blue"])
    assert_close(step(ours, logits), step(theirs, logits))
    assert_same_gradients(ours, gradients(theirs))


def trained_alone(theirs: Any, ids: Tensor, names: list[str]) -> tuple[Tensor, dict[str, Any]]:
    """Each row by its adapter alone: what a loop over PEFT's adapters gives."""
    theirs.zero_grad(set_to_none=True)
    weights = torch.randn((*ids.shape, 61), generator=torch.manual_seed(7), dtype=torch.float64)
    rows = []
    for row, name in enumerate(names):
        if name == "__base__":
            with theirs.disable_adapter():
                rows.append(theirs(input_ids=ids[row : row + 1]).logits)
            continue
        theirs.set_adapter(name)
        rows.append(theirs(input_ids=ids[row : row + 1]).logits)
        (rows[-1] * weights[row]).sum().backward()
    return torch.cat(rows).detach(), gradients(theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_per_row_trains_as_each_alone(family: str, checkpointing: bool) -> None:
    theirs, ours = pair(family)
    theirs.train()
    ours.train()
    ours.set_requires_grad([name for name in CONFIGS])
    if checkpointing:
        ours.enable_input_require_grads()
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    got = step(ours, lambda model: logits(model, adapter_names=NAMES))
    expected, wanted = trained_alone(theirs, tokens(5, 6), NAMES)
    assert_close(got, expected)
    assert_same_gradients(ours, wanted)
