"""What becomes of layers that are off, where skipping them does not suit the training around."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
        touch = _Touch(self.adapter_name)
        self._handles = [m.register_forward_hook(touch) for group in self.layers for m in group]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


class _Touch:
    def __init__(self, adapter_name: str):
        self.adapter_name = adapter_name

    def __call__(self, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or is_active(layer, self.adapter_name):
            return output
        parameters = adapter_parameters(layer, self.adapter_name)
        trained = [p for p in parameters if p.requires_grad]
        return zero_gradients(output, trained) if trained else output


class GatedGroups(LayerGroups):
    """Groups whose masks are numbers on the device, 0 or 1, that the layers' scales are multiplied
    by: a layer that is off computes a zero, and a graph compiled once serves every mask.

    Nothing is saved, and gradients of what is off are zeros. DoRA is refused: a scale of zero does
    not turn it into the base layer.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        layers: dict[str, Any] = {
            name: layer
            for names, group in zip(self.names, self.layers, strict=True)
            for name, layer in zip(names, group, strict=True)
        }
        for name, layer in layers.items():
            fits = not layer.use_dora[self.adapter_name]
            expected = "an adapter that its scale can switch off"
            require(fits, "CopraController: sync='tensor'", name, expected, "DoRA")
        devices = {adapter_parameters(m, self.adapter_name)[0].device for m in layers.values()}
        #: By device, ``(2, n)``: in evaluation, in training.
        self._gates = {device: torch.ones(2, len(self), device=device) for device in devices}
        self._handles: list[Any] = []
        for index, group in enumerate(self.layers):
            for layer in group:
                device = adapter_parameters(layer, self.adapter_name)[0].device
                gate = _Gate(self.adapter_name, self._gates[device][:, index])
                self._handles += [
                    layer.register_forward_pre_hook(gate.close),
                    layer.register_forward_hook(gate.open, always_call=True),
                ]
        self._state = torch.ones(2, len(self))  # of the gates, on the host

    @property
    def mask(self) -> Tensor:
        """``(n,)`` bool: the groups that are on, each in the mode of its first layer."""
        modes = [int(group[0].training) for group in self.layers]
        return self._state[modes, range(len(self))] > 0

    def set_mask(self, mask: Mask, training_only: bool = False) -> None:
        """Write the mask ``(n,)`` into the gates; ``training_only`` leaves evaluation all on."""
        on = torch.tensor(self.checked(mask), dtype=torch.float32)
        self._set(torch.stack([torch.ones_like(on) if training_only else on, on]))

    @contextlib.contextmanager
    def masked(self, mask: Mask) -> Iterator[None]:
        """A block in which a mask holds; then the gates have what they had before."""
        before = self._state
        self.set_mask(mask)
        try:
            yield
        finally:
            self._set(before)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _set(self, state: Tensor) -> None:
        self._state = state
        for gates in self._gates.values():
            gates.copy_(state)


class _Gate:
    """Puts the product of scale and gate in the place of a layer's scale, for one forward."""

    def __init__(self, adapter_name: str, gates: Tensor):
        self.adapter_name = adapter_name
        self.by_mode = gates[0], gates[1]
        self.scale: Any = None

    def close(self, layer: Any, _: Any) -> None:
        self.scale = layer.scaling[self.adapter_name]
        layer.scaling[self.adapter_name] = self.scale * self.by_mode[int(layer.training)]

    def open(self, layer: Any, _: Any, output: Tensor) -> None:
        layer.scaling[self.adapter_name] = self.scale
