"""Layer groups for data-parallel and compiled training, in which layers cannot just be skipped."""

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
from lora_ext.layers import LayerGroups, Mask, adapter_parameters, is_active, kind_of_layer


class TouchedGroups(LayerGroups):
    """Layer groups in which the parameters of inactive layers get zero gradients.

    Data-parallel training waits for the gradient of each parameter. An inactive layer therefore
    adds one node to the autograd graph, and the backward pass runs through all blocks, including
    those below the lowest active layer.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        touch = partial(_touch, self.adapter_name)
        self._handles = [layer.register_forward_hook(touch) for layer in chain(*self.layers)]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _touch(adapter_name: str, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or is_active(layer, adapter_name):
        return output
    trained = [p for p in adapter_parameters(layer, adapter_name) if p.requires_grad]
    return zero_gradients(output, trained) if trained else output


class GatedGroups(LayerGroups):
    """Layer groups in which each layer's scale is multiplied by 0 or 1, read from a mask on the
    device.

    The adapter of an inactive layer therefore adds zero, and a graph that was compiled once is
    valid for every mask. No work is saved, and inactive layers have gradients of zero. Adapters
    that scale the output of their layer are not supported, since a scale of zero does not turn them
    off. Several controllers of one adapter share the gates; the mask that was set last applies.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        layers: Any = chain(*self.layers)
        where = "CopraController: sync='tensor'"
        for name, layer in zip(chain(*self.names), layers, strict=True):
            kind = kind_of_layer(layer, self.adapter_name)
            expected = f"no {kind.title}, which a scale of 0 does not switch off"
            require(kind.sums, where, name, expected, f"a {kind.title} adapter")
        self._placed = [
            (layer, adapter_parameters(layer, self.adapter_name)[0].device, index)
            for index, group in enumerate(self.layers)
            for layer in group
        ]
        self._masks = _Masks(len(self), {device for _, device, _ in self._placed})

    @property
    def mask(self) -> Tensor:
        """Mask ``(n,)`` bool, True for the groups that are on. There is one mask for training and
        one for evaluation; the mode of a group's first layer determines which mask is read."""
        gates = [_gate_of(group[0], self.adapter_name) for group in self.layers]
        modes = [int(group[0].training) for group in self.layers]
        return torch.tensor([g is None or g.on(m) for g, m in zip(gates, modes, strict=True)])

    def set_mask(self, mask: Mask, training_only: bool = False) -> None:
        """Set the mask ``(n,)``; with ``training_only``, all groups are on in evaluation mode."""
        on = torch.tensor(self.checked(mask), dtype=torch.float32)
        self._masks.write(torch.stack([torch.ones_like(on) if training_only else on, on]))
        for layer, device, index in self._placed:
            gate = _gate_of(layer, self.adapter_name) or _Gate(self.adapter_name, layer)
            gate.follow(self._masks, device, index)

    @contextlib.contextmanager
    def masked(self, mask: Mask) -> Iterator[None]:
        """Apply a mask in a ``with`` block, and restore the gates at its end."""
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
    """Remove the gates from the layers of ``groups``, including those of other controllers."""
    for layer in chain(*groups.layers):
        gate = _gate_of(layer, groups.adapter_name)
        if gate is not None:
            gate.remove()


class _Masks:
    """Masks of one controller, ``(2, n)``: row 0 for evaluation, row 1 for training."""

    def __init__(self, n: int, devices: set[torch.device]):
        self.host = torch.ones(2, n)
        self.on = {device: torch.ones(2, n, device=device) for device in devices}

    def write(self, state: Tensor) -> None:
        """Replace the masks ``(2, n)`` on the host, and on every device in place."""
        self.host = state
        for gates in self.on.values():
            gates.copy_(state)


class _Gate:
    """Pair of hooks that multiply a layer's scale by an entry of a mask during a forward.

    Only the layer's hooks store the gate, so that every copy of the model has separate gates.
    """

    def __init__(self, adapter_name: str, layer: nn.Module):
        self.adapter_name = adapter_name
        self.scale: Any = None
        self._handles = [
            layer.register_forward_pre_hook(self.close),
            layer.register_forward_hook(self.open, always_call=True),
        ]

    def follow(self, masks: _Masks, device: torch.device, index: int) -> None:
        """Use entry ``index`` of ``masks`` from now on."""
        self.followed = masks, device, index
        # The whole tensor is stored, since a pickled or copied view does not share its memory.
        self.gates, self.index = masks.on[device], index

    def on(self, mode: int) -> bool:
        """Return whether the layer is on in ``mode``: 0 is evaluation, 1 is training."""
        masks, _, index = self.followed
        return bool(masks.host[mode, index])

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def close(self, layer: Any, _: Any) -> None:
        self.scale = layer.scaling[self.adapter_name]
        gate = self.gates[int(layer.training)][self.index]
        layer.scaling[self.adapter_name] = self.scale * gate

    def open(self, layer: Any, _: Any, output: Tensor) -> None:
        layer.scaling[self.adapter_name] = self.scale


def _gate_of(layer: nn.Module, adapter_name: str) -> _Gate | None:
    """Return the gate of an adapter from the layer's hooks, or None if there is no gate."""
    for hook in layer._forward_pre_hooks.values():
        gate = getattr(hook, "__self__", None)
        if isinstance(gate, _Gate) and gate.adapter_name == adapter_name:
            return gate
    return None
