"""Access to the weight and bias of layers that compute only a linear function."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_ext._torch import parameter

from ._modules import CONV1D
from ._packed_linear import PackedLinear
from ._packed_only import PackedOnlyLinear
from ._spacing import has_other_hooks

_PLAIN = (nn.Parameter, Tensor, type(None))  # quantised weights have other types

#: Module or function that maps ``I`` input features to ``O`` output features: ``(..., I)`` to
#: ``(..., O)``.
BaseLayer = nn.Module | Callable[[Tensor], Tensor]
DenseParameters = tuple[Tensor, Tensor | None]  # weight (O, I), bias (O,)


def dense_parameters(base: BaseLayer, divided: bool = False) -> DenseParameters | None:
    """Return weight ``(O, I)`` and bias if ``base(x)`` only computes ``x @ weight.T + bias``.

    Otherwise return None, for example if the layer is quantised or has hooks.

    Args:
        base: base layer.
        divided: whether the hooks of ZeRO-3 are allowed, see :func:`is_plain`.
    """
    kind = type(base)
    disguised = getattr(kind, "dense_parameters", None)  # defined by `_OnPatches`
    if disguised is not None:
        return disguised(base)
    if not isinstance(base, nn.Module):
        return None
    straight = kind is nn.Linear or kind is PackedLinear
    if not straight and (kind.__name__, kind.__module__) != CONV1D:
        return None
    weight = parameter(base, "weight", None)  # quantisers may delete it
    if weight is None or not _is_plain(base, weight, divided):
        return None
    return weight if straight else weight.t(), parameter(base, "bias")


def is_plain(module: nn.Module, divided: bool = False) -> bool:
    """Return whether a module has no hooks, no replaced forward and no quantised weight.

    Args:
        module: module to check.
        divided: whether to allow the hooks of DeepSpeed's ZeRO-3, which divides weights among
            processes. All processes gather a weight when it is read, and release it after the
            module's forward.
    """
    return _is_plain(module, parameter(module, "weight", None), divided)


def _is_plain(module: nn.Module, weight: object, divided: bool) -> bool:
    # accelerate replaces the forward of a module to offload its weights.
    if type(weight) not in _PLAIN or "forward" in module.__dict__:
        return False
    hooked = (
        has_other_hooks(module)
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )
    return not hooked or (divided and _of_zero3(module))


def readable_weight(base: nn.Module, purpose: str, fan_in_fan_out: bool = False) -> DenseParameters:
    """Return weight ``(O, I)`` and bias of a linear layer, even if it has hooks or is quantised.

    Args:
        base: linear layer, which may be an instance of a subclass or have hooks. If the layer is
            quantised (:func:`is_quantised`), each call dequantises the weight.
        purpose: start of the error message if the weight cannot be read.
        fan_in_fan_out: whether the layer stores its weight as ``(I, O)``.
    """
    dense = dense_parameters(base)
    if dense is not None:
        return dense
    weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    if isinstance(base, PackedOnlyLinear):
        return base.dequantised(), bias
    if is_quantised(base):
        return _dequantised(base, bias), bias
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2:
        return (weight.t() if fan_in_fan_out else weight), bias
    kind = "no weight" if weight is None else f"one of {getattr(weight, 'dtype', type(weight))}"
    expected, found = "a base layer with a floating-point matrix as weight", type(base).__name__
    raise ValueError(f"{purpose}: expected {expected}, found {found} with {kind}")


def is_quantised(base: nn.Module) -> bool:
    """Return whether a layer has a weight of a quantiser's type, or a method to dequantise it."""
    if type(getattr(base, "weight", None)) not in _PLAIN:
        return not inspect.ismethod(base.weight)  # a method of torch.ao.nn.quantized
    return any(hasattr(base, name) for name in ("dequantize", "dequantize_weight"))


@torch.no_grad()
def _dequantised(base: Any, bias: Tensor | None) -> Tensor:
    """Return the weight ``(O, I)`` with which a quantised layer multiplies, in float32.

    The weight is computed as the output for the identity matrix, so it does not depend on the
    quantiser's layout. A layer that also quantises its input rounds the identity matrix.
    """
    like = next(itertools.chain(base.parameters(), base.buffers()))
    y = base(torch.eye(base.in_features, device=like.device)).float()  # (I, O)
    return (y if bias is None else y - bias.float()).t()


def _of_zero3(module: nn.Module) -> bool:
    """Return whether all hooks of a module were set by DeepSpeed's ZeRO-3."""
    if not hasattr(module, "ds_id") or _has_any_global_hook():
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    others = module._backward_hooks or module._backward_pre_hooks
    return not others and all(hook.__module__.startswith("deepspeed.") for hook in hooks)
