"""Hooks that keep a NaN in one row of a batch out of the products of the other rows.

:func:`lora_ext._torch.spaced` describes the products of torch that need this. The ops and layers of
this package call that function directly. For the other linear layers of a model, and for base
layers that are called as modules, the hooks in this file call it.
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
_LEADING = "_lora_ext_leading"  # attribute of flattened rows: the leading axes of the output


def space_products(model: nn.Module) -> list[nn.Module]:
    """Register the hooks on the linear layers of ``model`` that need them.

    A layer needs them if it is ``nn.Linear`` or ``Conv1D``, its weights have 16 bits or are
    quantised, and one of its widths is not a multiple of 32. Subclasses with their own forward get
    no hooks, because ``view`` of spaced rows may fail. The factors of adapters get none either.

    Returns:
        The layers that had no such hooks before; pass them to :func:`unspace_products`.
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
    """Compute ``base(x)``, with spaced operands if ``base`` is a linear layer without the hooks."""
    if not isinstance(base, nn.Module) or not _takes_spaced_rows(base):
        return base(x)
    if isinstance(base, PackedLinear) or _has_hooks(base):  # these space their operands themselves
        return base(x)
    return product_of_rows(base, x)


def unspace_products(layers: Iterable[nn.Module]) -> None:
    """Remove the hooks of :func:`space_products` from ``layers``."""
    for layer in layers:
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in _HOOKS]:
                del hooks[key]


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
    # A packed layer spaces the operands of the products that do not use its packed copy.
    if not args or not isinstance(args[0], Tensor) or isinstance(module, PackedLinear):
        return None
    x = args[0]
    dtype = autocast_dtype(x) if type(module) is nn.Linear else None
    left = spaced(x, dtype)
    if left is not x and x.dim() > 2:
        # Rows in two dimensions, for the reason that lora_ext._torch.product_of_rows gives.
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
