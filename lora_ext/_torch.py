"""What torch is doing around a call, and ops in Python, which a compiler takes as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

AUTOCASTS = ("cpu", "cuda")  # torch.autocast refuses other devices, meta among them


def exactly(device: torch.device) -> AbstractContextManager[object]:
    """A block that autocast leaves alone: its products keep the dtype that they are given."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if kind in AUTOCASTS else nullcontext()


def compiles() -> bool:
    """Whether this code is compiled or exported.

    ``torch.compiler.is_compiling`` is true in every thread while one of them compiles: what another
    thread computes meanwhile must not be taken for a part of the graph.
    """
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which a model evaluates; then each of its modules has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def parameter(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)`` of what is a parameter as a rule, in a third of the time."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def zero_gradients(y: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """``y``, whose backward also gives each of these a gradient of zeros, and reads none of them:
    data parallel training waits for a gradient of every parameter."""
    return _ZeroGradients.apply(y, *parameters)  # pyright: ignore[reportReturnType]


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        # What zeros need, not the tensors: an optimizer may change these before the backward.
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return *grads, *(torch.zeros(s, dtype=t, device=d) for s, t, d in ctx.like)


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raise where a tensor carries a tangent, of ``torch.func.jvp`` too; no op has a forward mode.

    Backwards registered in Python need this: where no gradient is wanted, torch calls the op
    below autograd and would drop the tangent. Those in C++ look for themselves.
    """
    if compiles():
        return
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(f"{op} has no forward-mode derivative")


# -------------------------------------------------------------------------------------------------
# Ops in Python

_library = torch.library.Library("lora_ext", "FRAGMENT")

#: Of an op that reads what no argument shows: a replay of a CUDA graph would not read it again.
READS_MORE = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)


def traced(
    schema: str,
    fake: Callable[..., Any],
    backward: tuple[Callable[..., Any], Callable[..., None] | None] | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> Callable[[Callable[..., Any]], Any]:
    """Make an op of a function that a compiled graph is to call without looking into it.

    Args:
        schema: name, arguments and results, ``"experts_mm(Tensor x, Tensor ends) -> Tensor"``.
        fake: makes the empty result of the same arguments.
        backward: called as ``backward(ctx, *gradients)``, and what saves for it.
        tags: :data:`READS_MORE`, or none.
    """
    name = schema.partition("(")[0]

    def define(function: Callable[..., Any]) -> Any:
        _library.define(schema, tags=tags)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lora_ext::{name}", fake, lib=_library)
        if backward is not None:
            torch.library.register_autograd(
                f"lora_ext::{name}", backward[0], setup_context=backward[1], lib=_library
            )
        return getattr(torch.ops.lora_ext, name)

    return define
