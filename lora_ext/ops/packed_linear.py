"""Products of few rows with a packed weight, on the CPU or, for 8 and 4 bits, on CUDA.

The speed of such a product is limited by reading the weight from memory. :func:`pack_weight` copies
a weight into panels that :func:`packed_linear` reads once for any number of rows. Weights of 8 and
4 bits have fewer bytes to read.

Letters: ``T`` rows, ``I`` input features, ``O`` output features.
"""

from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import require_dtype, require_shape, require_tensor

from ._registration import direct, fake

_c = torch.ops.lora_ext
#: Functions called before a product. They are not ops; csrc/ops/packed_linear.h describes them.
is_plain_product, same_bits = direct.is_plain_product, direct.same_bits
#: Output features per panel.
PANEL = 32

_DTYPES = torch.float32, torch.bfloat16
_CUDA_DTYPES = *_DTYPES, torch.float16  # with 8 or 4 bits


def pack_weight(
    weight: Tensor, *, bits: int | None = None, group: int = 64, minimum: bool = False
) -> Tensor:
    """Copy a weight into panels of 32 output features, padded with zeros beyond ``O``.

    With ``bits``, each group of ``group`` input features of an output has a float16 scale, and its
    weights are rounded to the nearest multiples of the scale. With 8 bits, the scale is the largest
    magnitude of the group / 127. With 4 bits, it is the value of the largest magnitude / -8, as in
    GGUF's Q4_0. However, if all values of the group are multiples of its largest magnitude / 7, as
    in a ternary weight, the scale of 4 bits is this quotient.

    Args:
        weight: Weight ``(O, I)`` float32 or bfloat16 on the CPU. With ``bits``, its values are
            finite and at most 65504 in magnitude, and it may be on CUDA, in float16 too.
        bits: 8 or 4, or None to keep the dtype of ``weight``.
        group: Input features per scale: 32, 64 or 128, a divisor of ``I``.
        minimum: Whether each group of 4-bit weights also has a float16 minimum. The scale is then
            (largest - minimum) / 15.

    Returns:
        For float32, ``(ceil(O / 32), I, 32)``, with the input features of a panel in order. For
        bfloat16, ``(ceil(O / 32), ceil(I / 2), 32, 2)``, with pairs of input features; if ``I`` is
        odd, the last two axes are merged, so that the shape differs from that for ``I + 1``. For 8
        bits, ``(ceil(O / 32), I / group, bytes of a block)`` uint8; for 4 bits,
        ``(ceil(O / 32), I / group, 2, bytes of half a block)``. CPU and CUDA have the same bytes.

    Raises:
        ValueError: If a shape, dtype, device or value is wrong; the message names the argument.
    """
    return _c.pack_weight.default(weight, bits, group, minimum)


def unpack_weight(
    packed: Tensor, out_features: int, in_features: int, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Unpack a weight of 8 or 4 bits, and return it as ``(O, I)``.

    Args:
        packed: Result of :func:`pack_weight` with ``bits``.
        out_features: Number ``O`` of output features.
        in_features: Number ``I`` of input features.
        dtype: Dtype of the result, on CUDA float32, bfloat16 or float16. Values are rounded to
            float32 first.

    Raises:
        ValueError: If a shape, dtype or device is wrong.
    """
    return _c.unpack_weight.default(packed, out_features, in_features, dtype)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    out_features: int | None = None,
    int8: bool = False,
) -> Tensor:
    """Compute ``y[t] = weight @ x[t] + bias`` for a weight from :func:`pack_weight`.

    A row's bits depend only on the row, the weight and the bias, not on other rows or the number of
    threads. Sums start with the bias and add the products in ascending order of the input features,
    in float32; they are rounded once. Machines with other instruction sets may round differently.
    Instructions that multiply bfloat16 in pairs also treat subnormal numbers as zero. With AMX, the
    products of 32 input features are first added from zero, separately for even and odd features.

    With a weight of 8 or 4 bits, the products of a group of input features with the codes are added
    in float32, and the sum is multiplied by the scale of the group. With AVX-512-VNNI or AMX, the
    inputs of a group are first rounded to integers of 24 bits times a power of two, which changes
    an input by at most 2^-23 of the group's largest magnitude, or 2^-127. Their products are added
    exactly, and an infinite input gives NaN.

    On CUDA, the weight must have 8 or 4 bits. Tensor cores add the products of 32 input features
    with the codes to a float32 sum, which is multiplied by the scale. These sums are added into 16
    partial sums, one for every 16th group of 32 features, which are added in a fixed order for any
    number of rows. Tensor cores round toward zero. An infinite input gives NaN in float32.

    The op is not differentiable and ignores autocast.

    Args:
        x: Input ``(T, I)`` float32 or bfloat16; any row stride. On CUDA it may also be float16, and
            has at most 64 rows. For more rows, multiply by :func:`unpack_weight`, or use layers of
            torchao or bitsandbytes.
        packed: Result of :func:`pack_weight`: dtype of ``x``, or 8 or 4 bits.
        bias: Bias ``(O,)``, dtype of ``x``, or None.
        out_features: Number ``O`` of output features. None for all features of ``packed``,
            including the padding: 32 per panel.
        int8: Whether to round each row of ``x`` to 8 bits, which needs a weight of 8 or 4 bits. The
            row's scale is its largest magnitude / 127. Rounding changes an input by at most half
            the scale, and an output by at most half the scale times the sum of ``|weight|`` over
            the input features. The sums of a group are exact. A row that is not finite gives NaN.
            Not supported on CUDA.

    Returns:
        ``(T, O)``, dtype of ``x``.

    Raises:
        ValueError: If a shape, dtype or device is wrong.
        RuntimeError: If a gradient is requested.
    """
    if out_features is None:
        out_features = packed.shape[0] * PANEL
    return _c.packed_linear.default(x, packed, bias, out_features, int8)


def packed_lora_linear(x: Tensor, product: tuple[Any, ...], update: tuple[Any, ...]) -> Tensor:
    """Apply :func:`packed_linear` and :func:`lora_apply_` in one call, with the same bits.

    A decode step calls this op hundreds of times. It is for eager code: graphs of ``torch.compile``
    cannot contain it.

    Args:
        x: Input ``(..., I)``.
        product: All arguments of ``packed_linear`` after ``x``, by position.
        update: All arguments of ``lora_apply_`` after ``x``, by position.

    Returns:
        ``(..., O)``, dtype of ``x``.

    Raises:
        ValueError: As for the two ops.
        RuntimeError: If a gradient is requested.
    """
    return direct.packed_lora_linear(x, *product, *update)


@fake("packed_lora_linear")
def _fake_packed_lora_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *rest: object
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@fake("pack_weight")
def _fake_pack_weight(
    weight: Tensor, bits: int | None = None, group: int = 64, minimum: bool = False
) -> Tensor:
    dtypes = _DTYPES if bits is None else _CUDA_DTYPES
    require_tensor("pack_weight", "weight", weight, "(O, I)", None, *dtypes)
    if bits is None:
        return weight.new_empty(_packed_shape(weight.dtype, *weight.shape))
    rows, wide = weight.shape
    block = 4 * bits * group + (128 if minimum else 64)
    sizes = (block,) if bits == 8 else (2, block // 2)
    return weight.new_empty((-(-rows // PANEL), wide // group, *sizes), dtype=torch.uint8)


@fake("unpack_weight")
def _fake_unpack_weight(
    packed: Tensor, out_features: int, in_features: int, dtype: torch.dtype | None = None
) -> Tensor:
    return packed.new_empty((out_features, in_features), dtype=dtype or torch.float32)


@fake("packed_linear")
def _fake_packed_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, int8: bool = False
) -> Tensor:
    op = "packed_linear"
    dtypes = _CUDA_DTYPES if packed.dtype == torch.uint8 else _DTYPES
    require_tensor(op, "x", x, "(T, I)", None, *dtypes)
    if packed.dtype != torch.uint8:
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
