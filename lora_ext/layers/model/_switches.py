"""Switching the adapters of layers on and off, one by one or in groups by a mask.

A layer whose adapter is off computes only its base layer. Parameters, their ``requires_grad``,
``state_dict`` and the choice of active adapters do not change.

An adapter may also be off only in training. The layer's ``training`` flag then decides in each
forward, so that an evaluation during training uses the adapter.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._checks import require, require_flags
from lora_ext.rows import _layouts

from .._lora_layer import LoraLayer
from ._adapted import adapted_layers, adapters_of
from .blocks import block_name

#: Type of a mask.
Mask = Tensor | Sequence[bool]


def is_active(layer: nn.Module, adapter_name: str) -> bool:
    """Return whether an adapter is switched on in the layer's current mode.

    Adapters are on until :func:`set_active` switches them off. The result does not depend on
    ``set_adapter``, which chooses the active adapters of ``layer``.
    """
    state = _state(layer, adapter_name)
    return state.in_training if layer.training else state.in_evaluation


def set_active(
    layer: nn.Module, adapter_name: str, active: bool, training_only: bool = False
) -> None:
    """Switch an adapter of one layer on or off.

    An adapter that is off runs no operator, makes no graph node and gets no gradient, even if it is
    active or named for rows. On a PEFT layer the switch belongs to the adapter's name: an adapter
    that is deleted while it is off and added again is still off.

    Args:
        layer: one of :func:`lora_ext.nn.adapted_layers`.
        adapter_name: an adapter of the layer.
        active: True to switch it on.
        training_only: True leaves an adapter that is switched off on in evaluation mode.

    Raises:
        TypeError: If a flag is neither True nor False.
        ValueError: If the layer lacks the adapter; or the adapter is to be switched off and is
            merged into the base weight, or another package has replaced the layer's forward
            (accelerate's offloading, for example).
    """
    require_flags("set_active", active=active, training_only=training_only)
    _check(layer, adapter_name, active, "set_active")
    _switch(layer, adapter_name, _State(active or training_only, active))


class _State(NamedTuple):
    """Modes of a layer in which an adapter is on; if it is on in training, it is on in both."""

    in_evaluation: bool
    in_training: bool


class LayerGroups:
    """Layers with one adapter, in groups that are switched on and off together.

    Args:
        model: model with layers of this package or PEFT's, before or after
            :func:`lora_ext.from_peft`.
        adapter_name: the adapter to switch; other adapters of the same layers are not changed.
        group_by: "block" makes one group of the layers of a block, and one of each layer outside
            all blocks; "module" makes every layer a group; an integer makes groups of this many
            consecutive layers, of which the last may be smaller.
        pattern: pattern of blocks, see :func:`lora_ext.nn.block_name`.

    Attributes:
        names: names of the layers of each group, as in ``model.named_modules()``.
        layers: layers of each group.

    Raises:
        ValueError: If no layer has the adapter, or ``group_by`` has another value.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str = "default",
        group_by: Literal["block", "module"] | int = "block",
        pattern: str | None = None,
    ):
        self.adapter_name = adapter_name
        found = adapted_layers(model, adapter_name)
        _layouts.set_tokens_first(model)
        self._tokens_first = _layouts.tokens_first(model)
        groups: dict[Any, list[str]] = {}
        for position, name in enumerate(found):
            groups.setdefault(_key(name, position, group_by, pattern), []).append(name)
        self.names = tuple(tuple(group) for group in groups.values())
        self.layers = tuple(tuple(found[name] for name in group) for group in self.names)

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self.names)

    def sees_tokens_first(self, name: str) -> bool:
        """Return whether the input of the layer ``name`` is ``(tokens, sequences, features)``."""
        return name in self._tokens_first

    @property
    def mask(self) -> Tensor:
        """Mask ``(n,)`` bool: True for groups with all layers on, in their current mode."""
        on = [all(is_active(m, self.adapter_name) for m in group) for group in self.layers]
        return torch.tensor(on, dtype=torch.bool)

    def set_mask(self, mask: Mask, training_only: bool = False) -> None:
        """Switch every group on or off, until the next call.

        Args:
            mask: ``(n,)`` bool, True for the groups to switch on.
            training_only: True leaves the groups that are off on in evaluation.

        Raises:
            TypeError: If ``training_only`` is neither True nor False.
            ValueError: If the mask has another length or type, or a layer to be switched off is
                merged, which the message names. All layers are then unchanged.
        """
        require_flags("LayerGroups", training_only=training_only)
        for group, on in zip(self.layers, self.checked(mask), strict=True):
            for layer in group:
                _switch(layer, self.adapter_name, _State(on or training_only, on))

    @contextlib.contextmanager
    def masked(self, mask: Mask) -> Iterator[None]:
        """Set ``mask`` for a ``with`` block; then restore all layers, also after an exception."""
        layers = itertools.chain(*self.layers)
        before = [(layer, _state(layer, self.adapter_name)) for layer in layers]
        self.set_mask(mask)
        try:
            yield
        finally:
            for layer, state in before:
                if self.adapter_name in adapters_of(layer):
                    _switch(layer, self.adapter_name, state)

    def checked(self, mask: Mask) -> list[bool]:
        """Return a mask as a list, after the checks of :meth:`set_mask`.

        Raises:
            ValueError: See :meth:`set_mask`.
        """
        values: Any = mask.tolist() if isinstance(mask, Tensor) else mask
        bools = isinstance(values, Sequence) and all(isinstance(v, bool) for v in values)
        kind = mask.dtype if isinstance(mask, Tensor) else repr(mask)
        require(bools, "LayerGroups", "mask", "bools", kind)
        expected = f"one value for each of the {len(self)} groups"
        require(len(values) == len(self), "LayerGroups", "mask", expected, len(values))
        for names, group, on in zip(self.names, self.layers, values, strict=True):
            for name, layer in zip(names, group, strict=True):
                _check(layer, self.adapter_name, on, f"LayerGroups: mask: {name}")
        return list(values)


def _key(name: str, position: int, group_by: str | int, pattern: str | None) -> Any:
    """Return a key that is the same for all layers of one group."""
    if group_by == "block":
        return block_name(name, pattern) or position
    if group_by == "module":
        return position
    if isinstance(group_by, int) and not isinstance(group_by, bool) and group_by > 0:
        return position // group_by
    expected = "'block', 'module' or a number of layers above 0"
    raise ValueError(f"LayerGroups: group_by: expected {expected}, found {group_by!r}")


def _check(layer: Any, adapter_name: str, active: bool, where: str) -> None:
    expected = f"an adapter of {list(adapters_of(layer))}"
    require(adapter_name in adapters_of(layer), where, "adapter_name", expected, repr(adapter_name))
    if active:
        return
    expected = "an adapter that is not merged"
    found = "one merged into the base weight; unmerge it first"
    require(adapter_name not in layer.merged_adapters, where, repr(adapter_name), expected, found)
    forward = layer.__dict__.get("forward")
    fits = isinstance(layer, LoraLayer) or isinstance(forward, _Switch | None)
    other = "one with a replaced forward, as with accelerate's offloading"
    require(fits, where, "layer", f"a {type(layer).__name__} with the forward of its class", other)


def _state(layer: nn.Module, adapter_name: str) -> _State:
    if isinstance(layer, LoraLayer):
        on = layer.adapter_active[adapter_name]
        return _State(on, on and adapter_name not in layer.off_in_training)
    switch = layer.__dict__.get("forward")
    if not isinstance(switch, _Switch):
        return _State(True, True)
    on = adapter_name not in switch.off
    return _State(on, on and adapter_name not in switch.off_in_training)


def _switch(layer: Any, adapter_name: str, state: _State) -> None:
    if not isinstance(layer, LoraLayer):
        _switch_peft(layer, adapter_name, state)
        return
    layer.adapter_active[adapter_name] = state.in_evaluation
    rests = layer.off_in_training - {adapter_name}
    if state.in_evaluation and not state.in_training:
        rests |= {adapter_name}
    layer.off_in_training = rests


# -------------------------------------------------------------------------------------------------
# PEFT's layers


class _Switch:
    """Forward of one PEFT layer while some of its adapters are off.

    It is an attribute of the layer, not of its class, and is removed when all adapters are on
    again. The layer is not changed otherwise: PEFT still chooses, trains, disables and saves
    adapters.
    """

    def __init__(self, layer: Any, off: frozenset[str], off_in_training: frozenset[str]):
        self.layer = layer
        self.off = off
        self.off_in_training = off_in_training

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kind = type(self.layer)
        if getattr(kind, "asks_what_is_off", False):  # layers of from_peft
            return kind.forward(self.layer, x, *args, **kwargs)
        return forward_of_the_rest(kind.forward, self.layer, x, *args, **kwargs)


def switched_off(layer: nn.Module) -> frozenset[str]:
    """Return the adapters of a PEFT layer that are off in its current mode."""
    switch = layer.__dict__.get("forward")
    if not isinstance(switch, _Switch):
        return _NONE
    return switch.off | switch.off_in_training if layer.training else switch.off


_NONE: frozenset[str] = frozenset()


_BASE = "__base__"  # PEFT's name for rows without an adapter
_OF_ADAPTERS = ("adapter_names", "alora_offsets")  # arguments that the base layer does not take


def forward_of_the_rest(
    forward: Callable[..., Tensor], layer: Any, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Run PEFT's ``forward(layer, x, *args, **kwargs)`` without the adapters that are off.

    Raises:
        ValueError: If an adapter that is off is merged into the base weight.
    """
    off = switched_off(layer)
    if not off or layer.disable_adapters:
        return forward(layer, x, *args, **kwargs)
    merged = [name for name in layer.merged_adapters if name in off]
    if merged:
        expected = "adapters that are switched off and not merged"
        found = f"{merged} merged into the base weight; unmerge them first"
        raise ValueError(f"{type(layer).__name__}: expected {expected}, found {found}")
    names = kwargs.get("adapter_names")
    if names is not None:
        kwargs["adapter_names"] = names = [_BASE if name in off else name for name in names]
    asked = layer.active_adapters if names is None else names
    on = [name for name in asked if name in layer.r and name not in off]
    if not on:
        of_base = {key: value for key, value in kwargs.items() if key not in _OF_ADAPTERS}
        return layer.base_layer(x, *args, **of_base)
    if names is None:
        # A second object with the same parameters, so that other threads' forwards do not change.
        view = object.__new__(type(layer))
        view.__dict__.update(layer.__dict__, _active_adapter=on)
        layer = view
    return forward(layer, x, *args, **kwargs)


def _switch_peft(layer: Any, adapter_name: str, state: _State) -> None:
    before = layer.__dict__.get("forward")
    sets = (before.off, before.off_in_training) if isinstance(before, _Switch) else (_NONE, _NONE)
    off, off_in_training = (names - {adapter_name} for names in sets)
    if not state.in_evaluation:
        off |= {adapter_name}
    elif not state.in_training:
        off_in_training |= {adapter_name}
    if off or off_in_training:  # a new object, as another thread may be running the old one
        layer.forward = _Switch(layer, off, off_in_training)
    elif isinstance(before, _Switch):
        del layer.forward
