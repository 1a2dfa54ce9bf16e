"""Products of groups of rows with one matrix per group, as in a mixture of experts.

Letters: ``P`` rows, ``E`` groups (experts), ``I`` input features, ``O`` output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_ext._torch import autocast_dtype, compiles, spaced, traced, with_spaced_gradient


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of consecutive rows of ``x`` by the matrix of the group.

    Devices other than the CPU use torch's kernel, which ignores autocast.

    Args:
        x: Rows ``(P, I)``.
        weight: Matrices ``(E, I, O)``, one per group.
        ends: Ends of the groups, ``(E,)``: for each group, the index after its last row.

    Returns:
        ``(P, O)``.
    """
    if compiles():  # A graph cannot contain groups with sizes that depend on data.
        return _experts_mm(x, weight, ends)
    if x.device.type != "cpu":
        return torch.nn.functional.grouped_mm(x, weight, offs=ends)
    groups = zip(_groups(spaced(x, autocast_dtype(x)), ends), weight, strict=True)
    parts = [rows @ w for rows, w in groups if len(rows)]
    if not parts:
        return x.new_empty(0, weight.shape[2])
    return with_spaced_gradient(torch.cat(parts))


def _groups(x: Any, ends: Tensor) -> list[Tensor]:
    sizes: Any = ends.diff(prepend=ends.new_zeros(1))
    return list(x.split(sizes.tolist()))


def _fake_outer(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], dy.shape[1])


@traced("experts_outer(Tensor x, Tensor dy, Tensor ends) -> Tensor", fake=_fake_outer)
def _grouped_outer(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    """Compute ``x^T dy`` of each group, ``(E, I, O)``, from ``x (P, I)`` and ``dy (P, O)``."""
    if x.device.type != "cpu":
        return torch.nn.functional.grouped_mm(x.mT, dy, offs=ends)
    groups = zip(_groups(x, ends), _groups(dy, ends), strict=True)
    return torch.stack([rows.mT @ gradients for rows, gradients in groups])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ends = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, weight, ends)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    of_x, of_weight, _ = ctx.needs_input_grad
    return (
        _experts_mm(dy, weight.mT, ends) if of_x else None,
        _grouped_outer(x, dy, ends) if of_weight else None,
        None,
    )


def _fake_mm(x: Tensor, weight: Tensor, _ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


_experts_mm = traced(
    "experts_mm(Tensor x, Tensor weight, Tensor ends) -> Tensor",
    fake=_fake_mm,
    backward=(_backward, _save),
)(grouped_mm)
