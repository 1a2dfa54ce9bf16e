"""Hooks that prevent a NaN in one row of a batch from reaching the products of other rows.

Some products of torch read beyond the end of a row, into the next row.
:func:`lora_ext._torch.spaced` describes these products, and copies their left operand with zeros
after each row (spaced rows). The ops and layers of this package call ``spaced`` directly. The hooks
in this file call it for linear layers of a model that are not layers of this package, and for base
layers that are called as modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._torch import (
    TILE_COLUMNS,
    autocast_dtype,
    product_of_rows,
    spaced,
    with_spaced_gradient,
)

from ._modules import CONV1D, base_modules, linear_size
from ._packed_linear import PackedLinear

_WIDE = (torch.float32, torch.float64)
_LEADING = "_lora_ext_leading"  # attribute of flattened inputs: their leading dimensions


def space_products(model: nn.Module) -> list[nn.Module]:
    """Register hooks that put zeros between the input rows of linear layers (spaced rows).

    A layer of ``model`` gets the hooks if it is an ``nn.Linear`` or ``Conv1D``, its weight has 16
    bits or is quantised, and its number of input or output features is not a multiple of 32.
    Subclasses with their own forward get no hooks, because they may call ``view``, which may fail
    for spaced rows. The factors of adapters get no hooks either.

    Returns:
        The layers on which this call registered hooks, to be passed to :func:`unspace_products`.
    """
    found: list[nn.Module] = []
    for _, base in base_modules(model):
        size = linear_size(base)
        if size is None or not _takes_spaced_rows(base) or _has_hooks(base):
            continue
        wide = getattr(getattr(base, "weight", None), "dtype", None) in _WIDE
        if not wide and any(width % TILE_COLUMNS for width in size):
            base.register_forward_pre_hook(_space_input)
            base.register_forward_hook(_space_gradient, prepend=True)  # before other hooks
            found.append(base)
    return found


def base_product(base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``base(x)``; if ``base`` is a linear layer, put zeros between the rows of ``x``.

    Packed layers, and layers with the hooks of :func:`space_products`, do so themselves.
    """
    if not isinstance(base, nn.Module) or not _takes_spaced_rows(base):
        return base(x)
    if isinstance(base, PackedLinear) or _has_hooks(base):
        return base(x)
    return product_of_rows(base, x)


def unspace_products(layers: Iterable[nn.Module]) -> None:
    """Remove the hooks of :func:`space_products` from ``layers``."""
    for layer in layers:
        remove_hooks(layer, *_HOOKS)


def remove_hooks(module: nn.Module, *functions: Callable[..., Any]) -> bool:
    """Remove ``functions`` from the forward hooks of ``module``; return whether one was found."""
    found = False
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in functions]:
            found = bool(hooks.pop(key))
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    return found


def has_other_hooks(module: nn.Module) -> bool:
    """Return whether ``module`` has forward hooks other than those of :func:`space_products`."""
    if not (module._forward_hooks or module._forward_pre_hooks):
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(hook not in _HOOKS for hook in hooks)


def _takes_spaced_rows(module: nn.Module) -> bool:
    kind = type(module)
    if kind.forward in (nn.Linear.forward, PackedLinear.forward):
        return True
    return (kind.__name__, kind.__module__) == CONV1D


def _has_hooks(module: nn.Module) -> bool:
    return _space_input in module._forward_pre_hooks.values()


def _space_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    # A packed layer puts zeros between the rows itself if a product does not use the packed copy.
    if not args or not isinstance(args[0], Tensor) or isinstance(module, PackedLinear):
        return None
    x = args[0]
    dtype = autocast_dtype(x) if type(module) is nn.Linear else None
    left = spaced(x, dtype)
    if left is not x and x.dim() > 2:
        # With spaced rows in more than two dimensions, torch would round once more: see
        # lora_ext._torch.product_of_rows.
        left = left.flatten(0, -2)
        setattr(left, _LEADING, x.shape[:-1])
    return left, *args[1:]


def _space_gradient(module: nn.Module, args: tuple[Any, ...], y: Any) -> Tensor | None:
    if not isinstance(y, Tensor) or isinstance(module, PackedLinear):
        return None
    leading = getattr(args[0], _LEADING, None) if args else None
    y = with_spaced_gradient(y)
    return y if leading is None else y.unflatten(0, leading)


_HOOKS = (_space_input, _space_gradient)
