"""A training step of two models that must be equal, compared in float64."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from tiny import CONFIGS, VOCAB, make_model, make_peft
from torch import Tensor, nn

import lora_ext

CLOSE = 1e-11  # relative to the largest entry: a few hundred float64 roundings


def assert_close(got: Tensor, expected: Tensor, what: str = "") -> None:
    worst = (got - expected).abs().max().item()
    assert worst <= CLOSE * max(1.0, expected.abs().max().item()), f"{what}: {worst}"


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(
    ours: nn.Module, expected: dict[str, Tensor | None], moved: int = 1
) -> None:
    """Check that gradients are equal, and that at least ``moved`` of them are not zero."""
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


def pair(
    family: str = "llama", configs: dict[str, dict[str, Any]] | None = None
) -> tuple[Any, Any]:
    """Return the same float64 model and adapters twice: with PEFT's layers, and with ours."""
    theirs = make_peft(make_model(family), configs or CONFIGS[family]).double()
    return theirs, lora_ext.from_peft(copy.deepcopy(theirs))


def tokens(rows: int = 5, length: int = 7) -> Tensor:
    """Return the same tokens at every call; this seeds torch, so dropout masks are equal too."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.manual_seed(3))


def logits(model: Any, **kwargs: Any) -> Tensor:
    return model(input_ids=tokens(), **kwargs).logits


def checkpointed(model: Any, reentrant: bool | None) -> None:
    """Make a model recompute its activations in the backward, unless ``reentrant`` is None."""
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
