"""Adapted layers switched on and off: one by one, or in groups under a mask.

A layer whose adapter is off computes its base layer and nothing more. Nothing else changes: not the
parameters and their ``requires_grad``, not ``state_dict``, not which adapters were chosen.

An adapter may also be off in training alone. Then the layer's own ``training`` decides at each
forward, so that an evaluation in between sees it on, whoever calls which part of the model.
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

#: What a mask is given as.
Mask = Tensor | Sequence[bool]


def is_active(layer: nn.Module, adapter_name: str) -> bool:
    """Return whether an adapter of a layer is switched on in the mode that the layer is in,
    training or evaluation; it is, until :func:`set_active` switches it off.

    That says nothing about whether ``adapter_name`` is among the active ones of ``layer``, which
    ``set_adapter`` chooses.
    """
    state = _state(layer, adapter_name)
    return state.in_training if layer.training else state.in_evaluation


def set_active(
    layer: nn.Module, adapter_name: str, active: bool, training_only: bool = False
) -> None:
    """Switch an adapter of one layer on or off.

    Off, it takes no part, whether it is among the layer's active adapters or named for rows: no
    operator runs, no graph node is made, and no gradient comes. A layer of PEFT's knows the adapter
    by its name alone: deleted while it is off and added anew, it is off still.

    Args:
        layer: one of :func:`lora_ext.nn.adapted_layers`.
        adapter_name: an adapter of it.
        active: whether it takes part from now on.
        training_only: whether an adapter that is off is on while the layer is in evaluation mode.

    Raises:
        TypeError: a flag neither True nor False.
        ValueError: an adapter that the layer lacks; or it is to be switched off and is merged into
            the base weight, or the layer's forward was replaced by somebody (accelerate's
            offloading, say).
    """
    require_flags("set_active", active=active, training_only=training_only)
    _check(layer, adapter_name, active, "set_active")
    _switch(layer, adapter_name, _State(active or training_only, active))


class _State(NamedTuple):
    """In which modes of a layer an adapter is on; where it is on in training, it is in both."""

    in_evaluation: bool
    in_training: bool


class LayerGroups:
    """The layers with one adapter, in groups that are switched on and off together.

    Args:
        model: its layers may be ours or PEFT's, before or after :func:`lora_ext.from_peft`.
        adapter_name: the adapter that is switched; others of the same layers are left alone.
        group_by: "block" puts the layers of one block together, and leaves each layer outside all
            blocks to itself; "module" makes every layer a group; a number makes groups of so many
            consecutive layers, the last of which may be smaller.
        pattern: what a block is, see :func:`lora_ext.nn.block_name`.

    Attributes:
        names: for each group the names of its layers, as ``model.named_modules()`` has them.
        layers: for each group its layers.

    Raises:
        ValueError: no layer has the adapter, or another ``group_by``.
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
        _layouts.tell(model)
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
        """Return whether the input of the layer of that name is ``(tokens, sequences,
        features)``."""
        return name in self._tokens_first

    @property
    def mask(self) -> Tensor:
        """``(n,)`` bool: the groups of which every layer is on, in the mode that it is in."""
        on = [all(is_active(m, self.adapter_name) for m in group) for group in self.layers]
        return torch.tensor(on, dtype=torch.bool)

    def set_mask(self, mask: Mask, training_only: bool = False) -> None:
        """Switch every group on or off, until the next call.

        Args:
            mask: ``(n,)`` bool, True for the groups that take part.
            training_only: whether the groups that are off are on in evaluation.

        Raises:
            TypeError: ``training_only`` is neither True nor False.
            ValueError: a mask of another length or kind, or a layer that is to be switched off and
                is merged, which it names; all layers are then as they were.
        """
        require_flags("LayerGroups", training_only=training_only)
        for group, on in zip(self.layers, self.checked(mask), strict=True):
            for layer in group:
                _switch(layer, self.adapter_name, _State(on or training_only, on))

    @contextlib.contextmanager
    def masked(self, mask: Mask) -> Iterator[None]:
        """Set ``mask`` as :meth:`set_mask` does for a ``with`` block; after it, also after an
        exception, every layer is as it was before."""
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
        """Return a mask that can be set, as a list.

        Raises:
            ValueError: as :meth:`set_mask`, which calls this.
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
    """Return what the layers of one group have in common."""
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
    expected = "an adapter apart from the base weight"
    found = "one that is merged into it; unmerge it first"
    require(adapter_name not in layer.merged_adapters, where, repr(adapter_name), expected, found)
    forward = layer.__dict__.get("forward")
    fits = isinstance(layer, LoraLayer) or isinstance(forward, _Switch | None)
    other = "one with a forward of its own, as accelerate's offloading leaves it"
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
    """The forward of one layer of PEFT's while adapters of it are off.

    It stands on the layer itself, not on its class, and goes when all are on again. The layer is
    not touched otherwise, so that choosing, training, disabling and saving adapters stay PEFT's.
    """

    def __init__(self, layer: Any, off: frozenset[str], off_in_training: frozenset[str]):
        self.layer = layer
        self.off = off
        self.off_in_training = off_in_training

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kind = type(self.layer)
        if getattr(kind, "asks_what_is_off", False):  # from_peft's layers
            return kind.forward(self.layer, x, *args, **kwargs)
        return forward_of_the_rest(kind.forward, self.layer, x, *args, **kwargs)


def switched_off(layer: nn.Module) -> frozenset[str]:
    """Return the adapters of a layer of PEFT's that are off in the mode that it is in."""
    switch = layer.__dict__.get("forward")
    if not isinstance(switch, _Switch):
        return _NONE
    return switch.off | switch.off_in_training if layer.training else switch.off


_NONE: frozenset[str] = frozenset()


_BASE = "__base__"  # PEFT's name for rows without an adapter
_OF_ADAPTERS = ("adapter_names", "alora_offsets")  # arguments that PEFT keeps from the base layer


def forward_of_the_rest(
    forward: Callable[..., Tensor], layer: Any, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Run a forward of PEFT's, ``forward(layer, x, *args, **kwargs)``, without the adapters that
    are switched off.

    Raises:
        ValueError: an adapter that is off is merged into the base weight.
    """
    off = switched_off(layer)
    if not off or layer.disable_adapters:
        return forward(layer, x, *args, **kwargs)
    merged = [name for name in layer.merged_adapters if name in off]
    if merged:
        expected = "adapters apart from the base weight where they are switched off"
        found = f"{merged} merged into it; unmerge them first"
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
        # A second object over the same parameters: another thread's forward does not see these.
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
    if off or off_in_training:  # a new one: another thread may be inside of the one before
        layer.forward = _Switch(layer, off, off_in_training)
    elif isinstance(before, _Switch):
        del layer.forward
