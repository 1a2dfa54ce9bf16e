"""Losses over a vocabulary whose logits never stand in memory together.

Letters: ``N`` rows, ``d`` features, ``V`` vocabulary, ``k`` hidden states of a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext import reference
from lora_ext.ops._checks import FLOATS, require, require_dim, require_dtype, require_shape
from lora_ext.ops._forward_mode import refuse_tangents


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chunk: int = 8192,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> Tensor:
    """Mean cross entropy of an output layer, ``chunk`` columns of its logits at a time.

    ``mean_n (log sum_v exp z[n, v] - z[n, y_n])`` with ``z = hidden @ weight^T + bias``, and
    ``softcap * tanh(z / softcap)`` in its place where softcap is given. The mean is over the rows
    that are not ignored, and 0, with gradients of zero, where all of them are.

    Args:
        hidden: ``(N, d)``, float32, float16, bfloat16, or float64 on the CPU.
        weight: ``(V, d)``.
        bias: ``(V,)`` or None.
        labels: ``(N,)`` int64, each ``ignore_index`` or in ``[0, V)``.
        chunk: columns of logits that are in memory at a time.
        ignore_index: label of the rows that do not count.
        softcap: bound of the logits, or None.

    Returns:
        a scalar, float32, or float64 where an argument is.

    Raises:
        ValueError: if a shape, dtype, device or number is wrong, naming the argument.
        NotImplementedError: if an argument has a tangent of forward mode.
    """
    _check_output_layer("chunked_cross_entropy", "hidden", hidden, weight, bias, chunk, softcap)
    require_shape("chunked_cross_entropy", "labels", labels, "(N,)", hidden.shape[:1])
    require_dtype("chunked_cross_entropy", "labels", labels, torch.int64)
    refuse_tangents("chunked_cross_entropy", hidden, weight, bias)
    return reference.chunked_cross_entropy(hidden, weight, bias, labels, ignore_index, softcap)


def chunked_kl(
    hiddens: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    tau: float = 1.0,
    chunk: int = 8192,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Mean divergence of students from a teacher that share an output layer, in chunks.

    ``tau^2 mean_{e < k, n} KL(softmax(z_k[n] / tau) || softmax(z_e[n] / tau))`` with ``z_e =
    hiddens[e] @ weight^T + bias``, soft-capped as in :func:`chunked_cross_entropy`. The mean is
    over the rows of the mask, and 0, with gradients of zero, where there is none. The teacher
    stands for itself: its gradient is zero.

    Args:
        hiddens: ``k`` tensors ``(N, d)`` of one dtype, normalised, the teacher last.
        weight: ``(V, d)``.
        bias: ``(V,)`` or None.
        tau: temperature.
        chunk: columns of logits that are in memory at a time.
        mask: ``(N,)`` bool, the rows that count; None: all.
        softcap: bound of the logits, or None.

    Returns:
        a scalar, float32, or float64 where an argument is.

    Raises:
        ValueError: if a shape, dtype, device or number is wrong, naming the argument.
        NotImplementedError: if an argument has a tangent of forward mode.
    """
    op = "chunked_kl"
    require(len(hiddens) > 0, op, "hiddens", "at least the teacher", "no tensor")
    require(tau > 0, op, "tau", "a number above 0", tau)
    first = hiddens[0]
    _check_output_layer(op, "hiddens[0]", first, weight, bias, chunk, softcap)
    for e, h in enumerate(hiddens):
        require_shape(op, f"hiddens[{e}]", h, "(N, d)", first.shape)
        require_dtype(op, f"hiddens[{e}]", h, first.dtype)
    if mask is not None:
        require_shape(op, "mask", mask, "(N,)", first.shape[:1])
        require_dtype(op, "mask", mask, torch.bool)
    refuse_tangents(op, *hiddens, weight, bias)
    return reference.chunked_kl(hiddens, weight, bias, tau, mask, softcap)


def _check_output_layer(
    op: str,
    name: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chunk: int,
    softcap: float | None,
) -> None:
    require_dim(op, name, hidden, "(N, d)")
    require_dtype(op, name, hidden, *FLOATS)
    require_dim(op, "weight", weight, "(V, d)")
    require_shape(op, "weight", weight, "(V, d)", (weight.shape[0], hidden.shape[1]))
    require_dtype(op, "weight", weight, *FLOATS)
    if bias is not None:
        require_shape(op, "bias", bias, "(V,)", weight.shape[:1])
        require_dtype(op, "bias", bias, *FLOATS)
    require(chunk > 0, op, "chunk", "at least 1", chunk)
    require(softcap is None or softcap > 0, op, "softcap", "None or a number above 0", softcap)
