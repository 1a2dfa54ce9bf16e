"""LoraConv: a convolution over patches with trainable low-rank adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.rows import Names

from ._lora_forward import LoraFactors
from ._lora_layer import LoraLayer
from .base._dense import DenseParameters, is_plain
from .base._weight import ConvWeight


class LoraConv(LoraLayer):
    """PEFT's layer for convolutions with stride equal to the kernel, as in vision models.

    Such a convolution is a linear layer on patches, ``(N, C, H, W)`` to ``(N, H/k, W/k, C k k)``,
    and so is its adapter: ``y = base(x) + scaling * B A dropout(patch)``. Pixels beyond the last
    whole patch are ignored, as in the convolution.

    Parameters have PEFT's names and shapes: ``lora_A.<name>.weight (r, C, k, k)``,
    ``lora_B.<name>.weight (O, r, 1, 1)``, ``lora_magnitude_vector.<name>.weight (1, O, 1, 1)``.
    Adapters are chosen for rows as in :class:`lora_ext.nn.LoraLinear`; a row is a patch, a sequence
    an image.

    Args:
        base_layer: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
        adapter_name: name of the first adapter, which is active.
        r, options: see :meth:`add_adapter`.

    Raises:
        NotImplementedError: If the convolution has overlapping or spaced windows, padding, dilation
            or groups.
        ValueError: If the base is not a convolution, or :meth:`add_adapter` raises.

    Sources: LoRA (Hu et al. 2021); DoRA (Liu et al. 2024); PEFT.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str = "default", r: int = 8, **options: Any
    ):
        conv: Any = base_layer
        known = isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        expected, found = "nn.Conv1d, nn.Conv2d or nn.Conv3d", type(base_layer).__name__
        require(known, "LoraConv", "base_layer", expected, found)
        kernel = tuple(conv.kernel_size)
        wrong = {
            "stride": tuple(conv.stride) != kernel,
            "padding": conv.padding != "valid" and any(p != 0 for p in conv.padding),
            "dilation": any(d != 1 for d in conv.dilation),
            "groups": conv.groups != 1,
        }
        found = ", ".join(f"{name}={getattr(conv, name)}" for name, bad in wrong.items() if bad)
        expected = f"stride equal to the kernel {kernel}, no padding, dilation or groups"
        require(not found, "LoraConv", "base_layer", expected, found, NotImplementedError)
        self.kernel_size: tuple[int, ...] = kernel
        super().__init__(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.add_adapter(adapter_name, r, **options)
        self.set_adapter(adapter_name)

    def forward(self, x: Tensor, adapter_ids: Tensor | Names = None) -> Tensor:
        """Map ``(N, C, *S)`` or ``(C, *S)`` to ``(N, O, *S / k)`` or ``(O, *S / k)``.

        Args:
            x: floating tensor.
            adapter_ids: see :meth:`lora_ext.nn.LoraLinear.forward`; one per patch or image.

        Raises:
            ValueError: If ids or names do not fit, or are given while adapters are merged.
        """
        batched = x.dim() == len(self.kernel_size) + 2
        images = x if batched else x[None]
        grid = [s // k for s, k in zip(images.shape[2:], self.kernel_size, strict=True)]
        leading = torch.Size([images.shape[0], *grid])
        names, rows = self._participants(leading, x.device, adapter_ids)
        if not names:
            return self.base_layer(x)
        patches = _patches(images, grid, self.kernel_size)  # (N, *grid, C k k)
        y = self._adapted(patches, _OnPatches(self.base_layer), names, rows)
        y = y.movedim(-1, 1).contiguous()  # (N, O, *grid)
        return y if batched else y[0]

    def factors(self, adapter_name: str) -> LoraFactors:
        """Return an adapter on patches for :func:`lora_forward`: ``a`` is ``(r, C k k)``."""
        found = super().factors(adapter_name)
        return found._replace(a=found.a.flatten(1), b=found.b.flatten(1))

    @property
    def base_weight(self) -> ConvWeight:
        """Weight of the base layer, as a matrix on patches."""
        return ConvWeight(self.base_layer)


class _OnPatches:
    """Convolution as a linear layer on patches."""

    def __init__(self, conv: nn.Module):
        self.conv: Any = conv

    def dense_parameters(self) -> DenseParameters | None:
        """Return weight and bias; None if the convolution's forward does more than multiply."""
        if type(self.conv) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d) or not is_plain(self.conv):
            return None
        return self.conv.weight.flatten(1), self.conv.bias

    def __call__(self, patches: Tensor) -> Tensor:
        """Map ``(..., C k k)`` to ``(..., O)`` by the convolution, with one patch per image."""
        # The weight's shape cannot be used: with ZeRO-3 the weight is empty outside the forward.
        images = patches.reshape(-1, self.conv.in_channels, *self.conv.kernel_size)
        return self.conv(images).view(*patches.shape[:-1], self.conv.out_channels)


def _patches(images: Tensor, grid: list[int], kernel: tuple[int, ...]) -> Tensor:
    split = [images.shape[0], images.shape[1]]
    for dim, (n, k) in enumerate(zip(grid, kernel, strict=True)):
        images = images.narrow(dim + 2, 0, n * k)
        split += [n, k]
    dims = len(kernel)
    cells, inside = [2 + 2 * d for d in range(dims)], [3 + 2 * d for d in range(dims)]
    return images.reshape(split).permute(0, *cells, 1, *inside).flatten(1 + dims)
