"""Products of few rows with a packed weight, on the CPU.

The speed of such a product is limited by reading the weight from memory. :func:`pack_weight` copies
a weight into panels that :func:`packed_linear` reads once for any number of rows.

Letters: ``T`` rows, ``I`` input features, ``O`` output features.
"""

import torch
from torch import Tensor

from lora_ext._checks import require_dtype, require_shape, require_tensor

from ._registration import fake

_c = torch.ops.lora_ext

#: Output features per panel.
PANEL = 32


def pack_weight(weight: Tensor) -> Tensor:
    """Copy a weight into panels of 32 output features, padded with zeros beyond ``O``.

    Args:
        weight: Weight ``(O, I)`` float32 or bfloat16 on the CPU.

    Returns:
        For float32, ``(ceil(O / 32), I, 32)``, with the input features of a panel in order. For
        bfloat16, ``(ceil(O / 32), ceil(I / 2), 32, 2)``, with pairs of input features; if ``I`` is
        odd, the last two axes are merged, so that the shape differs from that for ``I + 1``.

    Raises:
        ValueError: If the shape, dtype or device is wrong.
    """
    return _c.pack_weight.default(weight)


def packed_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None = None, out_features: int | None = None
) -> Tensor:
    """Compute ``y[t] = weight @ x[t] + bias`` for a weight from :func:`pack_weight`.

    A row's bits depend only on the row, the weight and the bias, not on other rows or the number of
    threads. Sums start with the bias and add the products in ascending order of the input features,
    in float32; they are rounded once. Machines with other instruction sets may round differently.
    Instructions that multiply bfloat16 in pairs also treat subnormal numbers as zero.

    The op is not differentiable and ignores autocast.

    Args:
        x: Input ``(T, I)`` float32 or bfloat16 on the CPU; any row stride.
        packed: Result of :func:`pack_weight`, dtype of ``x``.
        bias: Bias ``(O,)``, dtype of ``x``, or None.
        out_features: Number ``O`` of output features. None for all features of ``packed``,
            including the padding: 32 per panel.

    Returns:
        ``(T, O)``, dtype of ``x``.

    Raises:
        ValueError: If a shape, dtype or device is wrong.
        RuntimeError: If a gradient is requested.
    """
    if out_features is None:
        out_features = packed.shape[0] * PANEL
    return _c.packed_linear.default(x, packed, bias, out_features)


@fake("pack_weight")
def _fake_pack_weight(weight: Tensor) -> Tensor:
    require_tensor("pack_weight", "weight", weight, "(O, I)", None, torch.float32, torch.bfloat16)
    return weight.new_empty(_packed_shape(weight.dtype, *weight.shape))


@fake("packed_linear")
def _fake_packed_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    op = "packed_linear"
    require_tensor(op, "x", x, "(T, I)", None, torch.float32, torch.bfloat16)
    shape = _packed_shape(x.dtype, out_features, x.shape[1])
    require_shape(op, "packed", packed, "of pack_weight", shape)
    require_dtype(op, "packed", packed, x.dtype)
    if bias is not None:
        require_tensor(op, "bias", bias, "(O,)", (out_features,), x.dtype)
    return x.new_empty(x.shape[0], out_features)


def _packed_shape(dtype: torch.dtype, out_features: int, in_features: int) -> tuple[int, ...]:
    panels = -(-out_features // PANEL)
    if dtype == torch.float32:
        return panels, in_features, PANEL
    pairs = (PANEL, 2) if in_features % 2 == 0 else (2 * PANEL,)
    return panels, -(-in_features // 2), *pairs
