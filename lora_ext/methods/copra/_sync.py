"""What becomes of layers that are off, where skipping them does not suit the training around."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext._torch import zero_gradients
from lora_ext.layers import LayerGroups, Mask, adapter_parameters, is_active


class TouchedGroups(LayerGroups):
    """Groups whose layers, when they are off, give their parameters gradients of zero.

    Data parallel training waits for the gradient of each parameter. A layer that is off costs one
    graph node here, and autograd runs through all blocks, so nothing of the backward below the
    lowest active block is saved.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        touch = partial(_touch, self.adapter_name)
        self._handles = [layer.register_forward_hook(touch) for layer in chain(*self.layers)]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def _touch(adapter_name: str, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or is_active(layer, adapter_name):
        return output
    trained = [p for p in adapter_parameters(layer, adapter_name) if p.requires_grad]
    return zero_gradients(output, trained) if trained else output


class GatedGroups(LayerGroups):
    """Groups whose masks are numbers on the device, 0 or 1, that the layers' scales are multiplied
    by: a layer that is off computes a zero, and a graph compiled once serves every mask.

    Nothing is saved, and gradients of what is off are zeros. DoRA is refused: a scale of zero does
    not turn it into the base layer. A layer has one gate, which follows whoever set a mask last.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        layers: Any = chain(*self.layers)
        where = "CopraController: sync='tensor'"
        expected = "an adapter that its scale can switch off"
        for name, layer in zip(chain(*self.names), layers, strict=True):
            require(not layer.use_dora[self.adapter_name], where, name, expected, "DoRA")
        self._placed = [
            (layer, adapter_parameters(layer, self.adapter_name)[0].device, index)
            for index, group in enumerate(self.layers)
            for layer in group
        ]
        self._masks = _Masks(len(self), {device for _, device, _ in self._placed})

    @property
    def mask(self) -> Tensor:
        """``(n,)`` bool: the groups that are on, each in the mode of its first layer."""
        gates = [_gate_of(group[0], self.adapter_name) for group in self.layers]
        modes = [int(group[0].training) for group in self.layers]
        return torch.tensor([g is None or g.on(m) for g, m in zip(gates, modes, strict=True)])

    def set_mask(self, mask: Mask, training_only: bool = False) -> None:
        """Write the mask ``(n,)`` into the gates; ``training_only`` leaves evaluation all on."""
        on = torch.tensor(self.checked(mask), dtype=torch.float32)
        self._masks.write(torch.stack([torch.ones_like(on) if training_only else on, on]))
        for layer, device, index in self._placed:
            gate = _gate_of(layer, self.adapter_name) or _Gate(self.adapter_name, layer)
            gate.follow(self._masks, device, index)

    @contextlib.contextmanager
    def masked(self, mask: Mask) -> Iterator[None]:
        """A block in which a mask holds; then the gates have what they had before."""
        gates = {layer: _gate_of(layer, self.adapter_name) for layer, _, _ in self._placed}
        before = {layer: gate and gate.followed for layer, gate in gates.items()}
        own = self._masks.host
        self.set_mask(mask)
        try:
            yield
        finally:
            self._masks.write(own)
            for layer, followed in before.items():
                gate = _gate_of(layer, self.adapter_name)
                if gate is not None:
                    gate.remove() if followed is None else gate.follow(*followed)


def remove_gates(groups: LayerGroups) -> None:
    """Take the gates off the layers of ``groups``, whoever put them there."""
    for layer in chain(*groups.layers):
        gate = _gate_of(layer, groups.adapter_name)
        if gate is not None:
            gate.remove()


class _Masks:
    """The masks of one controller, ``(2, n)``: in evaluation, in training."""

    def __init__(self, n: int, devices: set[torch.device]):
        self.host = torch.ones(2, n)
        self.on = {device: torch.ones(2, n, device=device) for device in devices}

    def write(self, state: Tensor) -> None:
        """The state on the host and on every device, where its tensors stay the same."""
        self.host = state
        for gates in self.on.values():
            gates.copy_(state)


class _Gate:
    """Puts the product of scale and gate in the place of a layer's scale, for one forward.

    It lies in the layer's hooks, so that a copy of the model, by any way, has gates of its own.
    """

    def __init__(self, adapter_name: str, layer: nn.Module):
        self.adapter_name = adapter_name
        self.scale: Any = None
        self._handles = [
            layer.register_forward_pre_hook(self.close),
            layer.register_forward_hook(self.open, always_call=True),
        ]

    def follow(self, masks: _Masks, device: torch.device, index: int) -> None:
        """Stand as the masks say from now on."""
        self.followed = masks, device, index
        # Whole tensors: a view that is pickled, or copied by itself, is no view any more.
        self.gates, self.index = masks.on[device], index

    def on(self, mode: int) -> bool:
        """Whether it is open in evaluation, 0, or training, 1."""
        masks, _, index = self.followed
        return bool(masks.host[mode, index])

    def remove(self) -> None:
        """Take it off its layer."""
        for handle in self._handles:
            handle.remove()

    def close(self, layer: Any, _: Any) -> None:
        self.scale = layer.scaling[self.adapter_name]
        gate = self.gates[int(layer.training)][self.index]
        layer.scaling[self.adapter_name] = self.scale * gate

    def open(self, layer: Any, _: Any, output: Tensor) -> None:
        layer.scaling[self.adapter_name] = self.scale


def _gate_of(layer: nn.Module, adapter_name: str) -> _Gate | None:
    """The gate of an adapter among a layer's hooks."""
    for hook in layer._forward_pre_hooks.values():
        gate = getattr(hook, "__self__", None)
        if isinstance(gate, _Gate) and gate.adapter_name == adapter_name:
            return gate
    return None
