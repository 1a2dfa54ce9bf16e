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
    """PEFT's convolution layer, for strides equal to the kernel size as in vision models.

    Such a convolution cuts images ``(N, C, H, W)`` into patches ``(N, H/k, W/k, C k k)`` and
    applies a linear layer to each patch. The adapter does the same: ``y = base(x) + scaling * B A
    dropout(patch)``. Pixels beyond the last whole patch are ignored, as in the convolution.
    Letters: ``N`` images, ``C`` input and ``O`` output channels, ``H`` and ``W`` pixels, ``k``
    kernel size, ``r`` rank.

    Parameters have PEFT's names and shapes: ``lora_A.<name>.weight (r, C, k, k)``,
    ``lora_B.<name>.weight (O, r, 1, 1)``, ``lora_magnitude_vector.<name>.weight (1, O, 1, 1)``.
    Adapters are selected as in :class:`lora_ext.nn.LoraLinear`: the patches are the rows, and the
    images are the sequences.

    Args:
        base_layer: convolution, an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
        adapter_name: name of the first adapter, which becomes active.
        r: rank of the first adapter.
        options: other arguments of :meth:`add_adapter`.

    Raises:
        NotImplementedError: If the windows of the convolution overlap or have gaps between them, or
            if it has padding, dilation or groups.
        ValueError: If the base layer is not a convolution, or :meth:`add_adapter` raises a
            ValueError.

    Sources: LoRA (Hu et al. 2021); PEFT.
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
        super().__init__(base_layer, adapter_name, r, fan_in_fan_out=False, **options)

    def forward(self, x: Tensor, adapter_ids: Tensor | Names = None) -> Tensor:
        """Map ``(N, C, *S)`` to ``(N, O, *S / k)``, or ``(C, *S)`` to ``(O, *S / k)``.

        Args:
            x: floating-point tensor of images; ``S`` are the sizes of their one to three spatial
                dimensions.
            adapter_ids: adapters as in :meth:`lora_ext.nn.LoraLinear.forward`, one per patch or per
                image.

        Raises:
            ValueError: If the ids or names do not match the rows or the adapters, or if they are
                given while adapters are merged.
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
        """Return the factors of an adapter for rows that are patches, with ``a (r, C k k)``."""
        found = super().factors(adapter_name)
        return found._replace(a=found.a.flatten(1), b=found.b.flatten(1))

    @property
    def base_weight(self) -> ConvWeight:
        """View of the base layer's weight as a matrix ``(O, C k k)`` that multiplies patches."""
        return ConvWeight(self.base_layer)


class _OnPatches:
    """View of a convolution as a linear layer that maps patches to outputs."""

    def __init__(self, conv: nn.Module):
        self.conv: Any = conv

    def dense_parameters(self) -> DenseParameters | None:
        """Return weight and bias, or None if the convolution has hooks or is not a plain one."""
        if type(self.conv) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d) or not is_plain(self.conv):
            return None
        return self.conv.weight.flatten(1), self.conv.bias

    def __call__(self, patches: Tensor) -> Tensor:
        """Apply the convolution to each patch as an image; map ``(..., C k k)`` to ``(..., O)``."""
        # The sizes are not read from the weight, since ZeRO-3 leaves it empty outside the forward.
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
