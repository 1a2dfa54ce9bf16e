"""Batched multi-adapter LoRA of several modules that see the same rows: q, k and v, gate and up.

Letters: ``T`` tokens, ``I`` in, ``O`` out (of each module its own), ``R`` largest rank, ``A``
adapters, ``P`` pages, ``M`` modules.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import require

from ._registration import fake

_c = torch.ops.lora_ext

#: How many modules one call takes.
MOST_SIBLINGS = 8


def lora_apply_siblings_(
    y: Sequence[Tensor],
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    adapter_ids: Tensor,
    scale: Sequence[Tensor] = (),
    ranks: Sequence[Tensor] = (),
    page_table: Sequence[Tensor] = (),
    plan: Tensor | None = None,
) -> Sequence[Tensor]:
    """Add the low-rank update of every row to each of several ``y`` in place: ``M`` calls of
    :func:`lora_apply_` in one.

    ``y[m][t] = round(y[m][t] + scale[m][s] * b[m][s] @ (a[m][s] @ x[t]))``, with the bits that
    module ``m`` gets alone. On a GPU up to 256 rows take the launches of one module where each has
    ranks up to 256, ``R`` and ``O`` multiples of 8, and rows of ``x``, ``y``, ``a`` and ``b`` on 16
    bytes; else each takes its own.

    Args:
        y: 1 to 8 tensors ``(T, O)``, dtype and device of ``x``; any row stride, widths may differ.
            They come back; each shares no memory with another argument, nor with another ``y``.
        x: ``(T, I)`` float16, bfloat16, float32, or float64 on the CPU; any row stride.
        a: for each module a bank ``(A, R, I)``, or pages ``(P, 8, I)`` with ``page_table``; ``R``
            and ``P`` may differ.
        b: likewise ``(A, O, R)``, or pages ``(P, O, 8)``.
        adapter_ids: ``(T,)`` int64 or int32, each in ``[-1, A)``.
        scale: for each module ``(A,)`` float32, or none for 1.
        ranks: for each module ``(A,)`` int32 in ``[0, R]``, or none for ``R`` (required with
            pages).
        page_table: for each module ``(A, R / 8)`` int32, or none for banks.
        plan: :func:`lora_plan` of the same ids.

    Raises:
        ValueError: if a number, shape, dtype or device disagrees, or a ``y`` overlaps another
            argument, naming module and argument.
        RuntimeError: if an argument requires gradients: use :func:`lora_apply`.

    Source: Punica (Chen et al. 2023), section 4; S-LoRA (Sheng et al. 2023), section 5.
    """
    _c.lora_apply_siblings_.default(y, x, a, b, adapter_ids, scale, ranks, page_table, plan)
    return y


@fake("lora_apply_siblings_")
def _fake_apply_siblings_(y: Any, x: Tensor, a: Any, b: Any, _ids: Tensor, *rest: Any) -> None:
    scale, ranks, page_table, _plan = rest
    lists = {"y": y, "a": a, "b": b, "scale": scale, "ranks": ranks, "page_table": page_table}
    for name, tensors in lists.items():
        for i, t in enumerate(tensors):
            module = f"lora_apply_siblings_: module {i}"
            require(t.device == x.device, module, name, f"the device of x, {x.device}", t.device)
