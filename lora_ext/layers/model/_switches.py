"""Functions that switch the adapters of layers on and off, one by one or in groups.

A layer whose adapters are all off computes only its base layer. Switching does not change the
parameters, their ``requires_grad`` flags, ``state_dict`` or the list of active adapters.

An adapter may also be switched off only in training mode. Each forward then reads the ``training``
flag of the layer, so that evaluations between training steps use the adapter.
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

#: Mask of groups: one bool per group.
Mask = Tensor | Sequence[bool]


def is_active(layer: nn.Module, adapter_name: str) -> bool:
    """Return whether an adapter is switched on in the layer's current mode.

    Adapters are switched on until :func:`set_active` switches them off. The result does not depend
    on ``set_adapter``, which selects the active adapters of ``layer``.
    """
    state = _state(layer, adapter_name)
    return state.in_training if layer.training else state.in_evaluation


def set_active(
    layer: nn.Module, adapter_name: str, active: bool, training_only: bool = False
) -> None:
    """Switch an adapter of one layer on or off.

    An adapter that is off runs no operator, creates no graph node and gets no gradient, even if it
    is active or selected for rows. For PEFT's layers, the state is stored under the adapter's name:
    if an adapter is deleted while it is off, a new adapter of the same name is also off.

    Args:
        layer: layer with adapters, from :func:`lora_ext.nn.adapted_layers`.
        adapter_name: name of an adapter of the layer.
        active: True to switch the adapter on, False to switch it off.
        training_only: whether to switch the adapter off only in training mode; it stays on in
            evaluation mode.

    Raises:
        TypeError: If a flag is neither True nor False.
        ValueError: If the layer does not have the adapter; or if ``active`` is False and the
            adapter is merged into the base weight, or another package has replaced the layer's
            forward (for example accelerate, to offload weights).
    """
    require_flags("set_active", active=active, training_only=training_only)
    _check(layer, adapter_name, active, "set_active")
    _switch(layer, adapter_name, _State(active or training_only, active))


class _State(NamedTuple):
    """Modes of a layer in which an adapter is on: training and evaluation, only evaluation, or
    none."""

    in_evaluation: bool
    in_training: bool


class LayerGroups:
    """Layers with an adapter, in groups; all layers of a group are switched on or off together.

    Args:
        model: model with adapter layers of this package or of PEFT, before or after
            :func:`lora_ext.from_peft`.
        adapter_name: name of the adapter to switch. Other adapters of the layers are not changed.
        group_by: rule for the groups. "block" makes one group of all layers of a block, and one
            group of each layer outside all blocks; "module" makes one group of each layer; an
            integer makes groups of this number of consecutive layers. The last group may be
            smaller.
        pattern: regular expression for the names of blocks, see :func:`lora_ext.nn.block_name`.

    Attributes:
        names: tuple of the layers' names for each group, as in ``model.named_modules()``.
        layers: tuple of the layers for each group.

    Raises:
        ValueError: If no layer has the adapter, or ``group_by`` is not one of the values above.
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
        """Return whether the input of layer ``name`` is ``(tokens, sequences, features)``."""
        return name in self._tokens_first

    @property
    def mask(self) -> Tensor:
        """Mask ``(n,)`` bool for the n groups: True if all layers are on in their current mode."""
        on = [all(is_active(m, self.adapter_name) for m in group) for group in self.layers]
        return torch.tensor(on, dtype=torch.bool)

    def set_mask(self, mask: Mask, training_only: bool = False) -> None:
        """Switch every group on or off. The mask applies until the next call.

        Args:
            mask: bools ``(n,)``, True for each group to switch on and False for each group to
                switch off.
            training_only: whether to switch groups off only in training mode; they stay on in
                evaluation mode.

        Raises:
            TypeError: If ``training_only`` is neither True nor False.
            ValueError: If the mask has a wrong length or type, or the adapter of a layer cannot be
                switched off (see :func:`set_active`); the message names the layer. All layers are
                then unchanged.
        """
        require_flags("LayerGroups", training_only=training_only)
        for group, on in zip(self.layers, self.checked(mask), strict=True):
            for layer in group:
                _switch(layer, self.adapter_name, _State(on or training_only, on))

    @contextlib.contextmanager
    def masked(self, mask: Mask) -> Iterator[None]:
        """Set a mask during a ``with`` block; restore all layers at its end or after an error."""
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
        """Check a mask as in :meth:`set_mask`, and return it as a list.

        Raises:
            ValueError: See :meth:`set_mask`.
        """
        values: Any = mask.tolist() if isinstance(mask, Tensor) else mask
        bools = isinstance(values, Sequence) and all(isinstance(v, bool) for v in values)
        kind = mask.dtype if isinstance(mask, Tensor) else repr(mask)
        require(bools, "LayerGroups", "mask", "a list or 1-D tensor of bools", kind)
        expected = f"one value for each of the {len(self)} groups"
        require(len(values) == len(self), "LayerGroups", "mask", expected, len(values))
        for names, group, on in zip(self.names, self.layers, values, strict=True):
            for name, layer in zip(names, group, strict=True):
                _check(layer, self.adapter_name, on, f"LayerGroups: mask: {name}")
        return list(values)


def _key(name: str, position: int, group_by: str | int, pattern: str | None) -> Any:
    """Return the key of a layer's group: layers with equal keys are in one group."""
    if group_by == "block":
        return block_name(name, pattern) or position
    if group_by == "module":
        return position
    if isinstance(group_by, int) and not isinstance(group_by, bool) and group_by > 0:
        return position // group_by
    expected = "'block', 'module' or a number of layers above 0"
    raise ValueError(f"LayerGroups: group_by: expected {expected}, found {group_by!r}")


def _check(layer: Any, adapter_name: str, active: bool, where: str) -> None:
    expected = f"one of the adapters {list(adapters_of(layer))}"
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
    """Forward of a PEFT layer while some of its adapters are off.

    It is set as an attribute of the layer, not of its class, and is removed when all adapters are
    on again. Nothing else in the layer changes: PEFT still selects, trains, disables and saves its
    adapters.
    """

    def __init__(self, layer: Any, off: frozenset[str], off_in_training: frozenset[str]):
        self.layer = layer
        self.off = off
        self.off_in_training = off_in_training

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kind = type(self.layer)
        if getattr(kind, "asks_what_is_off", False):  # from_peft's layers skip these adapters
            return kind.forward(self.layer, x, *args, **kwargs)
        return forward_of_the_rest(kind.forward, self.layer, x, *args, **kwargs)


def switched_off(layer: nn.Module) -> frozenset[str]:
    """Return the names of a PEFT layer's adapters that are off in its current mode."""
    switch = layer.__dict__.get("forward")
    if not isinstance(switch, _Switch):
        return _NONE
    return switch.off | switch.off_in_training if layer.training else switch.off


_NONE: frozenset[str] = frozenset()


_BASE = "__base__"  # PEFT's name for rows without an adapter
_OF_ADAPTERS = ("adapter_names", "alora_offsets")  # arguments that base layers do not accept


def forward_of_the_rest(
    forward: Callable[..., Tensor], layer: Any, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Return PEFT's ``forward(layer, x, *args, **kwargs)`` without the adapters that are off.

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
        # The active adapters are set on a second object that shares the parameters, so that
        # forwards in other threads do not change.
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
    if off or off_in_training:  # a new object: another thread may be running the old one
        layer.forward = _Switch(layer, off, off_in_training)
    elif isinstance(before, _Switch):
        del layer.forward
