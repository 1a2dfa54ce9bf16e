"""Forward of a linear layer with LoRA adapters, as a function of plain parameters.

:class:`lora_ext.nn.LoraLinear` and the PEFT layers of :func:`lora_ext.from_peft` both call it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._torch import autocast_dtype
from lora_ext.rows import (
    Rows,
    all_rows,
    constant,
    keep,
    rows_of,
    scales,
    several_processes,
    subset,
    together,
)

from .base._dense import BaseLayer, DenseParameters, dense_parameters
from .base._packed_linear import PackedLinear
from .base._spacing import base_product

# A bank has space for its largest rank in every adapter. If it would be more than _MOST_ROOM times
# as large as its adapters, it is split in two: ranks up to _SMALL_RANK, and larger ranks.
_MOST_ROOM, _SMALL_RANK = 4, 256


class LoraFactors(NamedTuple):
    """Factors of an adapter in one layer: ``scaling * (b @ a @ dropout(x) + bias)``."""

    a: Tensor  # (r, I)
    b: Tensor  # (O, r), dtype of a
    scaling: float | Tensor
    p: float = 0.0  # dropout probability in effect: 0 outside training
    bias: Tensor | None = None  # (O,): PEFT's lora_bias
    seed: Tensor | None = None  # seed of the dropout, one int64 on the device of x; None: drawn


def dropout_now(dropout: nn.Module) -> float:
    """Return the current dropout probability of an adapter: 0 outside training."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def lora_forward(
    x: Tensor,
    base: BaseLayer,
    adapters: Sequence[LoraFactors],
    adapter_ids: Tensor | Rows | None = None,
) -> Tensor:
    """Compute ``base(x)`` plus the updates of the adapters.

    ``y[t] = base(x[t]) + sum of scaling * (b @ a @ dropout(x[t]) + bias)``: over all adapters, or
    over the one that ``adapter_ids[t]`` selects. An adapter without rows costs nothing and its
    ``grad`` stays None. Without adapters the result is ``base(x)``. If torch.distributed has
    several processes, an adapter without rows that requires gradients gets zeros, as its rows may
    be on another process.

    A plain ``nn.Linear`` or transformers ``Conv1D`` is computed in the fused op with its weight.
    Any other base (quantised, wrapped, with hooks) is called, and the update is added in the dtype
    of the adapters, with one rounding to that of ``base(x)``. Under autocast the layer computes in
    the autocast dtype. PEFT's layers do the same, but round the update more often.

    Each dropout draws its seed from torch's generator of the device of ``x``, so ``manual_seed``
    determines the masks and activation checkpointing repeats them. Adapters with dropout that share
    rows get independent masks. For an adapter with a given seed, the mask of a row follows from
    that seed and the row's position among the adapter's rows, so it does not depend on the other
    rows of the batch.

    Args:
        x: ``(..., I)``.
        base: maps ``(..., I)`` to ``(..., O)``.
        adapters: of any ranks; those that share a call are promoted to one dtype.
        adapter_ids: ``(T,)`` int64 or int32 positions in ``adapters``, -1 for no adapter, ``T`` the
            number of rows of ``x``; or :func:`rows_of` of them; or None: all adapters on all rows.

    Returns:
        ``(..., O)``, the dtype of ``base(x)``; differentiable in ``x``, the adapters and ``base``.

    Raises:
        ValueError: If a shape, dtype, device or id does not fit; the message names it.

    Source: LoRA (Hu et al. 2021), eq. 3; several adapters on one row: PEFT's ``set_adapter``.
    """
    dense = dense_parameters(base)
    exact = isinstance(base, PackedLinear) and base.exact
    if adapter_ids is None and len(adapters) == 1 and dense is not None and not exact:
        factors = adapters[0]
        if factors.bias is None and x.dtype == factors.a.dtype == dense[0].dtype:
            if x.dtype != torch.float64 and autocast_dtype(x) is None:
                return _one_adapter(x, base, dense, factors)
    adapters, rows = _participants(x, adapters, adapter_ids)
    if not adapters:
        return base_product(base, x)
    if dense is not None and isinstance(base, PackedLinear) and not exact:
        y = base.packed_product(x)
        if y is not None:
            return _forward(x, lambda _: y, None, adapters, rows)
    return _forward(x, base, dense, adapters, rows)


def _one_adapter(x: Tensor, base: BaseLayer, dense: DenseParameters, f: LoraFactors) -> Tensor:
    """Compute :func:`_forward` for one adapter in the dtype of the base, without other checks.

    When decoding, the Python code of the general case would take longer than the op.
    """
    x2d = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # (T, I)
    a, b, scaling, p, _, own_seed = f
    num_rows, device = x2d.shape[0], x.device
    if isinstance(scaling, Tensor):
        (ids, plan), scale = all_rows(num_rows, device), scales((scaling,), device)
    else:
        key = (_scaled_rows, num_rows, scaling)
        ids, plan, scale = keep(key, device, _scaled_rows, num_rows, scaling, device)
    fixed = not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
    y = None
    if isinstance(base, PackedLinear) and fixed and not p:
        y = base.packed_product(x2d)  # (T, O)
    if y is not None:
        ops.lora_apply_(y, x2d, a[None], b[None], ids, scale, None, None, plan)
    else:
        seed = _seed((own_seed,), device) if p else None
        y = ops.lora_linear(x2d, *dense, a, b, ids, scale, None, p, seed, plan)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _scaled_rows(
    num_rows: int, scaling: float, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return *all_rows(num_rows, device), scales((scaling,), device)


def lora_update(
    x: Tensor, adapters: Sequence[LoraFactors], adapter_ids: Tensor | Rows | None = None
) -> Tensor:
    """Compute the update that :func:`lora_forward` adds to ``base(x)``.

    The result is ``(..., O)`` in the dtype of the adapters, or of autocast. The arguments are those
    of :func:`lora_forward`, with at least one adapter.
    """
    found, rows = _participants(x, adapters, adapter_ids)
    if not found:
        return x.new_zeros(*x.shape[:-1], adapters[0].b.shape[0])
    return _forward(x, None, None, found, rows)


def fuses(x: Tensor, dense: DenseParameters | None, factors: LoraFactors) -> bool:
    """Return whether base and update have one dtype, so that one op can compute both."""
    if dense is None:
        return False
    return autocast_dtype(x) is not None or x.dtype == dense[0].dtype == factors.a.dtype


def fused_forward(x: Tensor, dense: DenseParameters, factors: LoraFactors) -> Tensor:
    """Compute :func:`lora_forward` of one adapter on all rows, if it :func:`fuses`."""
    return _forward(x, None, dense, [factors], None)


def _participants(
    x: Tensor, adapters: Sequence[LoraFactors], adapter_ids: Tensor | Rows | None
) -> tuple[Sequence[LoraFactors], Rows | None]:
    if adapter_ids is None:
        return adapters, None
    rows = adapter_ids
    if isinstance(rows, Tensor):
        rows = rows_of(rows, len(adapters), x.shape[:-1])
        if several_processes() and torch.is_grad_enabled():
            each = enumerate((f.a, f.b, f.bias) for f in adapters)
            trained = [i for i, own in each if any(p is not None and p.requires_grad for p in own)]
            rows = together(rows, trained)
    count, found = x.shape[:-1].numel(), rows.ids.shape[0]
    if found != count:
        expected = f"one id for each of the {count} rows of x"
        raise ValueError(f"adapter_ids: expected {expected}, found {found}")
    return [adapters[i] for i in rows.used], rows


def _forward(
    x: Tensor,
    base: Callable[[Tensor], Tensor] | None,
    dense: DenseParameters | None,
    adapters: Sequence[LoraFactors],
    rows: Rows | None,
) -> Tensor:
    """Compute base and update; without ``base`` and ``dense`` only the update.

    ``base`` is called if ``dense`` cannot be fused.
    """
    x2d = x.reshape(-1, x.shape[-1])  # (T, I)
    calls = _shared_rows(adapters, x2d) if rows is None else _own_rows(adapters, rows)
    compute = autocast_dtype(x)
    if fuses(x, dense, calls[0].adapters[0]):
        assert dense is not None
        weight, bias = dense
        bias, calls = _with_base_bias(calls, bias)
        packed = None
        if isinstance(base, PackedLinear) and not calls[0].adapters[0].p:
            packed = base.packed_copy(x2d)
        y = _run(calls[0], x2d, compute, weight, bias, packed)  # (T, O)
        dtype, rest = y.dtype, calls[1:]
    elif base is not None:
        y = base_product(base, x)
        dtype, y, rest = y.dtype, y.reshape(-1, y.shape[-1]), calls
    else:
        y = _run(calls[0], x2d, compute)
        dtype, rest = y.dtype, calls[1:]
    for call in rest:
        y = y + _run(call, x2d, compute)
    for call in calls:
        y = _add_bias(y, call)
    return y.to(dtype).view(*x.shape[:-1], y.shape[-1])


# -------------------------------------------------------------------------------------------------
# Calls of the op


class _Call(NamedTuple):
    """Call of the op: its adapters and the rows of each."""

    adapters: Sequence[LoraFactors]  # with the same dropout
    ids: Tensor  # (T,), the position of each row's adapter
    plan: Tensor | None
    biases: Sequence[Tensor | None]  # of the adapters, or of those concatenated to the only one
    everywhere: bool  # True if there is one adapter, which every row has


def _run(
    call: _Call,
    x: Tensor,
    compute: torch.dtype | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    a, b = [f.a for f in call.adapters], [f.b for f in call.adapters]
    scaling, p = [f.scaling for f in call.adapters], call.adapters[0].p
    dtype = compute
    if dtype is None:
        dtype = functools.reduce(torch.promote_types, (f.dtype for f in (*a, *b)))
    scale, ranks = scales(scaling, x.device), None
    if scale is not None and dtype == torch.float64:  # the op keeps scales in float32
        b, scale = [f * s for f, s in zip(b, scaling, strict=True)], None
    all_ranks = [f.shape[0] for f in a]
    if min(all_ranks) < max(all_ranks):
        ranks = constant(all_ranks, torch.int32, x.device)
    seed = _seed([f.seed for f in call.adapters], x.device) if p else None
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return ops.lora_linear_apart(
        x.to(dtype), weight, bias, a, b, call.ids, scale, ranks, p, seed, call.plan, packed
    )


def draw_seed(device: torch.device) -> Tensor:
    """Return a seed for one dropout, ``()`` int64, from torch's generator of the device."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def _seed(seeds: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return one seed for all adapters of a call; ``(A,)`` seeds if an adapter has its own."""
    if all(seed is None for seed in seeds):
        return draw_seed(device)
    each = [draw_seed(device) if seed is None else seed for seed in seeds]
    return torch.cat([seed.reshape(-1) for seed in each])


def _shared_rows(adapters: Sequence[LoraFactors], x: Tensor) -> list[_Call]:
    """Return calls of all adapters on all rows: one if the factors can be concatenated by rank."""
    ids, plan = all_rows(x.shape[0], x.device)
    first = adapters[0]
    together = len(adapters) > 1 and all(
        f.p == 0
        and not isinstance(f.scaling, Tensor)  # a comparison would synchronise with the device
        and f.scaling == first.scaling
        and f.a.dtype == first.a.dtype
        for f in adapters
    )
    if not together:
        return [_Call([f], ids, plan, [f.bias], everywhere=True) for f in adapters]
    a, b = torch.cat([f.a for f in adapters], 0), torch.cat([f.b for f in adapters], 1)
    biases = [f.bias for f in adapters]
    return [_Call([first._replace(a=a, b=b)], ids, plan, biases, everywhere=True)]


def _own_rows(adapters: Sequence[LoraFactors], rows: Rows) -> list[_Call]:
    """Return calls in which each row has one adapter.

    Adapters with the same dropout, and ranks that fit into one bank, share a call.
    """
    calls: list[_Call] = []
    all_ranks = [f.a.shape[0] for f in adapters]
    in_two = len(adapters) * max(all_ranks) > _MOST_ROOM * sum(all_ranks)
    groups: dict[tuple[float, bool], list[int]] = {}
    for i, (f, rank) in enumerate(zip(adapters, all_ranks, strict=True)):
        groups.setdefault((f.p, in_two and rank > _SMALL_RANK), []).append(i)
    for _, members in sorted(groups.items()):  # in an order that does not depend on the batch
        _, ids, plan = rows if len(groups) == 1 else subset(rows, members)
        group = [adapters[i] for i in members]
        calls.append(_Call(group, ids, plan, [f.bias for f in group], everywhere=False))
    return calls


# -------------------------------------------------------------------------------------------------
# Biases of adapters


def _with_base_bias(calls: list[_Call], bias: Tensor | None) -> tuple[Tensor | None, list[_Call]]:
    """Add the biases of adapters that every row has to the base's bias; return it and the calls.

    The calls no longer contain these biases.
    """
    first = calls[0]
    if not first.everywhere or all(b is None for b in first.biases):
        return bias, calls
    for extra in first.biases:
        if extra is not None:
            extra = extra * first.adapters[0].scaling
            bias = extra if bias is None else bias + extra
    return bias, [first._replace(biases=[None] * len(first.biases)), *calls[1:]]


def _add_bias(y: Tensor, call: _Call) -> Tensor:
    """Add ``scaling * bias`` to the rows of each adapter with a bias."""
    if all(b is None for b in call.biases):
        return y
    if call.everywhere:
        for bias in call.biases:
            y = y if bias is None else y + bias * call.adapters[0].scaling
        return y
    for slot, bias in enumerate(call.biases):
        if bias is not None:
            # `where` instead of a product keeps a NaN of one adapter out of the others' rows.
            own = (call.ids == slot)[:, None]
            y = torch.where(own, y + bias * call.adapters[slot].scaling, y)
    return y
