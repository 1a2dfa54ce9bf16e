"""Products with packed weights, one formula per function."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_weight(weight: Tensor) -> Tensor:
    """Copy a weight ``(O, I)`` into panels of 32 output features, ``(panels, I, 32)``.

    For bfloat16, the panels contain pairs of input features: ``(panels, ceil(I / 2), 32, 2)``, or
    ``(panels, ceil(I / 2), 64)`` if ``I`` is odd.
    """
    together = 2 if weight.dtype == torch.bfloat16 else 1
    padded = pad(weight, (0, -weight.shape[1] % together, 0, -weight.shape[0] % 32))
    panels = padded.view(padded.shape[0] // 32, 32, padded.shape[1] // together, together)
    packed = panels.transpose(1, 2).contiguous()  # (panels, steps, 32, together)
    return packed.flatten(2) if weight.shape[1] % together or together == 1 else packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Compute ``x @ weight.T + bias`` in float64, ``(T, O)``."""
    panels = packed.view(*packed.shape[:2], 32, 2 if packed.dtype == torch.bfloat16 else 1)
    padded = panels.transpose(1, 2).flatten(2).flatten(0, 1)  # (32 * panels, I or I + 1)
    y = x.double() @ padded[:out_features, : x.shape[1]].double().t()
    return y if bias is None else y + bias.double()
