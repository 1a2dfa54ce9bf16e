"""Linear mode connectivity: the loss along the line between two adapters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from lora_ext._checks import integer, require
from lora_ext._torch import evaluating
from lora_ext.adapter import PREFIX, AdapterSource, Factors, LoraAdapter, interpolate_adapters
from lora_ext.layers import adapted_layers, adapter_factors, kind_of_layer


class Barrier(NamedTuple):
    """Losses of interpolated adapters, and the barrier between the two adapters.

    Attributes:
        barrier: Largest difference, over ``lambdas``, between the loss of the interpolated adapter
            and the interpolated loss. The barrier is at least 0 if ``lambdas`` contains 0 or 1.
        lambdas: Positions from 0 (the first adapter) to 1 (the second).
        losses: Loss at each position.
    """

    barrier: float
    lambdas: tuple[float, ...]
    losses: tuple[float, ...]


def lmc_barrier(
    model: nn.Module,
    first: LoraAdapter | AdapterSource,
    second: LoraAdapter | AdapterSource,
    eval_fn: Callable[[nn.Module], float],
    lambdas: int | Sequence[float] = 11,
    space: Literal["factors", "delta"] = "factors",
    *,
    adapter: str = "default",
) -> Barrier:
    """Compute the barrier ``max over l of loss(l) - ((1 - l) loss(0) + l loss(1))``.

    ``loss(l)`` is the loss of the model with the two adapters interpolated at l by
    :func:`lora_ext.adapter.interpolate_adapters`. The interpolated adapter temporarily replaces an
    adapter of the model. The model runs in evaluation mode and without gradients; afterwards its
    modes and its original parameter objects are restored.

    Args:
        model: Model with layers of :mod:`lora_ext.nn` or PEFT. One of its adapters must have the
            same modules as ``first`` and ``second``.
        first, second: The two adapters, each a :class:`lora_ext.adapter.LoraAdapter`, a folder, or
            a pair of configuration and state dict.
        eval_fn: Function that returns the loss of the model. To compute the barrier of an accuracy,
            return the negative accuracy.
        lambdas: Number of evenly spaced positions from 0 to 1, or the positions themselves. The
            losses at 0 and 1 are always evaluated.
        space: "factors" or "delta", see :func:`lora_ext.adapter.interpolate_adapters`.
        adapter: Name of the model's adapter that is replaced.

    Raises:
        ValueError: If ``lambdas`` is an int below 2, is empty, or contains a number outside [0, 1];
            if the model's adapter is missing, not active or merged; if the adapters' modules differ
            from the model's; if a loss is not finite; or if ``interpolate_adapters`` raises it.
        NotImplementedError: If an adapter or the model has scaled outputs, or if
            ``interpolate_adapters`` raises it.

    Source: linear mode connectivity (Frankle et al. 2020), of adapters: arXiv 2410.22911.
    """
    grid = _grid(lambdas)
    ends = LoraAdapter.of(first), LoraAdapter.of(second)
    layers: dict[str, Any] = {}  # layers by their names in the base model
    for name, layer in adapted_layers(model, adapter).items():
        one: Any = layer
        expected = "an adapter that is not merged into the base weight"
        found = f"{adapter!r} merged; unmerge it first"
        require(adapter not in one.merged_adapters, "lmc_barrier", name, expected, found)
        fits = adapter in one.active_adapters and not one.disable_adapters
        other = "disabled adapters" if one.disable_adapters else one.active_adapters
        require(fits, "lmc_barrier", name, f"{adapter!r} as an active adapter", other)
        layers[name.removeprefix(PREFIX)] = one
    # This raises before the first evaluation if the adapters cannot be interpolated.
    _check_modules(layers, adapter, interpolate_adapters(*ends, 0.5, space))
    losses: dict[float, float] = {}
    with evaluating(model), torch.no_grad():
        for lam in dict.fromkeys((0.0, 1.0, *grid)):
            value = interpolate_adapters(*ends, lam, space)
            with contextlib.ExitStack() as undo:
                for name, layer in layers.items():
                    _put(undo, name, layer, adapter, value.modules[name])
                losses[lam] = float(eval_fn(model))
            found = f"{losses[lam]} at lambda = {lam}"
            require(math.isfinite(losses[lam]), "lmc_barrier", "eval_fn", "a finite loss", found)
    rises = [losses[lam] - ((1 - lam) * losses[0.0] + lam * losses[1.0]) for lam in grid]
    return Barrier(max(rises), grid, tuple(losses[lam] for lam in grid))


def _grid(lambdas: int | Sequence[float]) -> tuple[float, ...]:
    if isinstance(lambdas, int):
        integer("lmc_barrier", "lambdas", lambdas, 2)
        return tuple(i / (lambdas - 1) for i in range(lambdas))
    grid = tuple(float(lam) for lam in lambdas)
    require(grid, "lmc_barrier", "lambdas", "numbers in [0, 1]", "none")
    outside = [lam for lam in grid if not 0 <= lam <= 1]
    require(not outside, "lmc_barrier", "lambdas", "numbers in [0, 1]", outside)
    return grid


def _check_modules(layers: dict[str, Any], adapter: str, value: LoraAdapter) -> None:
    where = "lmc_barrier"
    for name in (*layers, *value.modules):
        both = name in layers and name in value.modules
        found = f"it only in {'the model' if name in layers else 'the adapters'}"
        require(both, where, name, "a module of the model and of the adapters", found)
        kind = kind_of_layer(layers[name], adapter)
        expected, found = f"an adapter without {kind.title}", f"a {kind.title} adapter in the model"
        require(kind.sums, where, name, expected, found, NotImplementedError)
        pairs = adapter_factors(layers[name], adapter), value.modules[name][:2]
        own, new = (f"{a.flatten(1).shape[1]} inputs, {b.shape[0]} outputs" for a, b in pairs)
        require(own == new, where, name, f"{own}, as in the model", f"{new} in the adapters")


def _put(undo: contextlib.ExitStack, name: str, layer: Any, adapter: str, factors: Factors) -> None:
    """Replace the factors and the scale of a layer until ``undo`` is closed. The layer gets new
    parameters, so that their rank may differ; the original parameters do not change."""
    if factors.embedding:
        places = {"a": (layer.lora_embedding_A, adapter), "b": (layer.lora_embedding_B, adapter)}
    else:
        lora_a, lora_b = layer.lora_A[adapter], layer.lora_B[adapter]
        places = {"a": (lora_a, "weight"), "b": (lora_b, "weight"), "bias": (lora_b, "bias")}
    for field, (owner, key) in places.items():
        own, new = getattr(owner, key), getattr(factors, field)
        if own is None and new is None:
            continue
        if own is None:
            expected = "a layer with lora_bias=True, as in the adapters"
            raise ValueError(f"lmc_barrier: {name}: expected {expected}, found no bias of B")
        # Without a bias in the adapters, the layer's bias is set to zeros.
        value = torch.zeros_like(own) if new is None else new.to(own.device, own.dtype)
        parameter = nn.Parameter(value, requires_grad=own.requires_grad)
        undo.callback(setattr, owner, key, own)
        setattr(owner, key, parameter)
    undo.callback(layer.scaling.__setitem__, adapter, layer.scaling[adapter])
    layer.scaling[adapter] = factors.scaling
