"""Batched multi-adapter LoRA for several modules with the same input, such as q, k and v.

Letters: ``T`` tokens, ``I`` input features, ``O`` output features (of a module), ``R`` largest
rank, ``A`` adapters, ``P`` pages, ``M`` modules.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import require

from ._registration import fake

_c = torch.ops.lora_ext

#: Largest number of modules per call.
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
    *,
    weights: Tensor | None = None,
    groups: Sequence[Tensor] = (),
) -> Sequence[Tensor]:
    """Add the low-rank updates of several modules in place: one :func:`lora_apply_` per module.

    ``y[m][t] = round(y[m][t] + weights[t] * scale[m][s] * b[m][s] @ (a[m][s] @ x[t]))`` with
    ``s = adapter_ids[t]``. The results are bitwise equal to separate calls.

    On a GPU, all modules share the kernel launches of one module, if there are up to 256 rows, the
    ranks of each module are up to 256, its ``R`` and ``O`` are multiples of 8, and the rows of
    ``x``, ``y``, ``a`` and ``b`` are aligned to 16 bytes. Otherwise each module has separate
    launches.

    Args:
        y: 1 to 8 outputs ``(T, O)``, dtype and device of ``x``; any row stride, ``O`` may differ.
            They are returned and must not share memory with each other or another argument.
        x: Input ``(T, I)`` float16, bfloat16, float32, or float64 on the CPU; any row stride.
        a: Bank ``(A, R, I)`` of each module, or its pages ``(P, 8, I)`` with ``page_table``; ``R``
            and ``P`` may differ.
        b: Bank ``(A, O, R)`` of each module, or its pages ``(P, O, 8)``.
        adapter_ids: Adapter id of each row, ``(T,)`` or ``(T, K)`` int64 or int32 in ``[-1, A)``.
        scale: Scales ``(A,)`` or ``(A, R / 8)`` float32 of each module; empty for 1.
        ranks: Ranks ``(A,)`` int32 in ``[0, R]`` of each module; empty for ``R`` (required with
            pages).
        page_table: Pages ``(A, R / 8)`` int32 of each module; empty for banks.
        plan: Result of :func:`lora_plan` for the same ids, or None.
        weights: Weight of each row, for all modules, see :func:`lora_apply`.
        groups: Columns of ``weights`` of the pages of each module, see :func:`lora_apply`; empty
            for 0.

    Raises:
        ValueError: If the number of tensors, a shape, dtype or device is wrong, or a ``y`` overlaps
            another argument; the message names module and argument.
        RuntimeError: If an argument requires gradients; use :func:`lora_apply`.

    Source: Punica (Chen et al. 2023), section 4; S-LoRA (Sheng et al. 2023), section 5.
    """
    rest = scale, ranks, page_table, plan, weights, groups or None
    _c.lora_apply_siblings_.default(y, x, a, b, adapter_ids, *rest)
    return y


@fake("lora_apply_siblings_")
def _fake_apply_siblings_(y: Any, x: Tensor, a: Any, b: Any, _ids: Tensor, *rest: Any) -> None:
    scale, ranks, page_table, _plan, _weights, groups = rest
    lists = {"y": y, "a": a, "b": b, "scale": scale, "ranks": ranks, "page_table": page_table}
    lists["groups"] = groups or ()
    for name, tensors in lists.items():
        for i, t in enumerate(tensors):
            module = f"lora_apply_siblings_: module {i}"
            require(t.device == x.device, module, name, f"the device of x, {x.device}", t.device)
