"""Forward of a linear layer with LoRA adapters, as a function of tensors instead of a module.

:class:`lora_ext.nn.LoraLinear` and the PEFT layers of :func:`lora_ext.from_peft` call it.
Shape letters: ``T`` rows, ``I`` input and ``O`` output features, ``r`` rank, ``A`` adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lora_ext import ops
from lora_ext._torch import autocast_dtype
from lora_ext.rows import Rows, _rows, rows_of

from .base._dense import BaseLayer, DenseParameters, dense_parameters
from .base._packed_linear import PackedLinear
from .base._spacing import base_product

# A bank (the stacked factors of several adapters) pads every adapter to the largest rank. If the
# bank would be more than _MOST_ROOM times as large as the factors, it is split into two banks: one
# for ranks up to _SMALL_RANK, and one for larger ranks.
_MOST_ROOM, _SMALL_RANK = 4, 256

_PAGE = 8  # number of consecutive ranks that share one scale and one weight


class LoraFactors(NamedTuple):
    """Factors of an adapter in a layer; its update is ``scaling * (b @ a @ dropout(x) + bias)``."""

    a: Tensor  # (r, I)
    b: Tensor  # (O, r), dtype of a
    scaling: float | Tensor
    p: float = 0.0  # current dropout probability: 0 outside training
    bias: Tensor | None = None  # (O,): PEFT's lora_bias
    seed: Tensor | None = None  # dropout seed, one int64 on the device of x; None draws a new seed
    # Only for `scaled_forward`: the magnitude (O,) of a DoRA adapter, and the norm (O,) of each row
    # of base weight plus update. If `norm` is None, it is computed.
    magnitude: Tensor | None = None
    norm: Tensor | None = None


def dropout_now(dropout: nn.Module) -> float:
    """Return the current dropout probability of an adapter: 0 outside training."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def lora_forward(
    x: Tensor,
    base: BaseLayer,
    adapters: Sequence[LoraFactors],
    adapter_ids: Tensor | Rows | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return ``base(x)`` plus the updates of the adapters, ``(..., O)``.

    ``y[t] = base(x[t]) + sum of scaling * (b @ a @ dropout(x[t]) + bias)``. The sum is over all
    adapters; if ``adapter_ids`` is given, it is only over the adapter ``adapter_ids[t]``. Without
    adapters the result is ``base(x)``. The update of an adapter without rows is not computed, and
    its ``grad`` stays None. If torch.distributed has several processes, a trained adapter without
    rows gets zero gradients instead, because another process may have rows that use it.

    If ``base`` is a plain ``nn.Linear`` or transformers' ``Conv1D``, one fused op computes the
    product with its weight and the update. Any other base layer (quantised, wrapped, with hooks) is
    called. The update is then added in the dtype of the adapters, and the sum is rounded once to
    the dtype of ``base(x)``. Under autocast the layer computes in the autocast dtype. PEFT's layers
    do the same, but round the update more often.

    Each dropout draws its seed from torch's default generator for the device of ``x``. Therefore
    ``manual_seed`` determines the masks, and activation checkpointing reproduces them. Several
    adapters on the same rows have independent masks. If the factors of an adapter contain a seed,
    the mask of a row depends only on this seed and on the row's position among the adapter's rows,
    not on the other rows of the batch.

    Args:
        x: input ``(..., I)``; the product of its leading dimensions is the number of rows ``T``.
        base: base layer, which maps ``(..., I)`` to ``(..., O)``.
        adapters: factors of the adapters, which may differ in rank. Adapters that are computed in
            the same call of the op are promoted to a common dtype.
        adapter_ids: int64 or int32 tensor ``(T,)`` of positions in ``adapters``, -1 for no adapter;
            or the result of :func:`rows_of` for such a tensor. None applies all adapters to all
            rows. :class:`Rows` may have ids and weights ``(T, K)``: K adapters per row, whose
            updates are multiplied by the weights.
        weights: if ``adapter_ids`` is None, weight of each adapter in each row, ``(T, A)``; default
            is 1.

    Returns:
        Tensor ``(..., O)`` in the dtype of ``base(x)``, differentiable in ``x``, in the factors, in
        the weights and in the parameters of ``base``.

    Raises:
        ValueError: If a shape, dtype, device or id is invalid. The message names the argument.

    Source: LoRA (Hu et al. 2021), eq. 3; several adapters on one row: PEFT's ``set_adapter``.
    """
    dense = dense_parameters(base)
    exact = isinstance(base, PackedLinear) and base.exact
    one = adapter_ids is None and weights is None and len(adapters) == 1
    if one and dense is not None and not exact:
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
            return _forward(x, lambda _: y, None, adapters, rows, weights)
    return _forward(x, base, dense, adapters, rows, weights)


def _one_adapter(x: Tensor, base: BaseLayer, dense: DenseParameters, f: LoraFactors) -> Tensor:
    """Return what :func:`_forward` returns for one adapter in the dtype of ``base``.

    This function has fewer checks: in decoding, the Python code of :func:`_forward` would take
    longer than the op.
    """
    x2d = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # (T, I)
    a, b, scaling, p, _, own_seed, *_ = f
    num_rows, device = x2d.shape[0], x.device
    if isinstance(scaling, Tensor):
        (ids, plan), scale = _rows.all_rows(num_rows, device), _rows.scales((scaling,), device)
    else:
        key = (_scaled_rows, num_rows, scaling)
        ids, plan, scale = _rows.keep(key, device, _scaled_rows, num_rows, scaling, device)
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
    return *_rows.all_rows(num_rows, device), _rows.scales((scaling,), device)


def lora_update(
    x: Tensor,
    adapters: Sequence[LoraFactors],
    adapter_ids: Tensor | Rows | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the update ``(..., O)`` that :func:`lora_forward` adds to ``base(x)``.

    The update has the autocast dtype or, without autocast, the dtype of the adapters. The arguments
    are those of :func:`lora_forward`; at least one adapter is required.
    """
    found, rows = _participants(x, adapters, adapter_ids)
    if not found:
        return x.new_zeros(*x.shape[:-1], adapters[0].b.shape[0])
    return _forward(x, None, None, found, rows, weights)


def fuses(x: Tensor, dense: DenseParameters | None, factors: LoraFactors) -> bool:
    """Return whether one op can compute base layer and update together.

    It requires a plain base layer, and either autocast or one dtype for input, base and adapter.
    """
    if dense is None:
        return False
    return autocast_dtype(x) is not None or x.dtype == dense[0].dtype == factors.a.dtype


def fused_forward(x: Tensor, dense: DenseParameters, factors: LoraFactors) -> Tensor:
    """Return ``(..., O)``: base layer plus the update of one adapter, if :func:`fuses` is True."""
    return _forward(x, None, dense, [factors], None)


def _participants(
    x: Tensor, adapters: Sequence[LoraFactors], adapter_ids: Tensor | Rows | None
) -> tuple[Sequence[LoraFactors], Rows | None]:
    if adapter_ids is None:
        return adapters, None
    rows = adapter_ids
    if isinstance(rows, Tensor):
        rows = rows_of(rows, len(adapters), x.shape[:-1])
        if _rows.several_processes() and torch.is_grad_enabled():
            each = enumerate((f.a, f.b, f.bias) for f in adapters)
            trained = [i for i, own in each if any(p is not None and p.requires_grad for p in own)]
            rows = _rows.together(rows, trained)
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
    weights: Tensor | None = None,
) -> Tensor:
    """Return the base layer's output plus updates; only updates if ``base, dense`` are None.

    ``base`` is called if the op cannot compute the product with ``dense``.
    """
    x2d = x.reshape(-1, x.shape[-1])  # (T, I)
    compute = autocast_dtype(x)
    if rows is None and weights is not None:
        calls = _weighted_rows(adapters, x2d, weights)
    else:
        calls = _shared_rows(adapters, x2d) if rows is None else _own_rows(adapters, rows)
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
    """Arguments of one call of ``ops.lora_linear_apart``."""

    adapters: Sequence[LoraFactors]  # all with the same dropout probability
    ids: Tensor  # (T,), position of each row's adapter in adapters
    plan: Tensor | None
    biases: Sequence[Tensor | None]  # one per adapter, even if `adapters` is their concatenation
    everywhere: bool  # True if the call has only one adapter, which all rows use
    weights: Tensor | None = None  # (T, K) for ids (T, K), (T, G) with groups
    groups: Tensor | None = None  # (1, P), column of `weights` for each page of the only adapter
    scaling: Sequence[float | Tensor] = ()  # one per page if there are groups


def _run(
    call: _Call,
    x: Tensor,
    compute: torch.dtype | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    a, b = [f.a for f in call.adapters], [f.b for f in call.adapters]
    scaling, p = call.scaling or [f.scaling for f in call.adapters], call.adapters[0].p
    dtype = compute
    if dtype is None:
        dtype = functools.reduce(torch.promote_types, (f.dtype for f in (*a, *b)))
    scale, ranks = _rows.scales(scaling, x.device), None
    if scale is not None and dtype == torch.float64:  # the op would round the scales to float32
        b, scale = [f * s for f, s in zip(b, scaling, strict=True)], None
    all_ranks = [f.shape[0] for f in a]
    if min(all_ranks) < max(all_ranks):
        ranks = _rows.constant(all_ranks, torch.int32, x.device)
    seed = _seed([f.seed for f in call.adapters], x.device) if p else None
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    x, weights, groups = x.to(dtype), call.weights, call.groups
    if weights is not None and dtype == torch.float64:
        y = None if weight is None else nn.functional.linear(x, weight, bias)
        return _add_columns(y, x, (a, b), call, ranks)
    if weights is not None:
        weights = weights.float()
    if groups is not None:
        scale = scale if scale is None else scale[None]  # (1, P)
    rest = call.ids, scale, ranks, p, seed, call.plan, packed
    return ops.lora_linear_apart(x, weight, bias, a, b, *rest, weights=weights, groups=groups)


def _add_columns(
    y: Tensor | None, x: Tensor, factors: Any, call: _Call, ranks: Tensor | None
) -> Tensor:
    """Return ``y`` plus a call's update in float64; the op would round the weights to float32."""
    a, b = factors
    assert call.weights is not None and call.plan is not None
    p, shape = call.adapters[0].p, (len(x), *(call.ids.shape[1:] or (1,)))  # x may be empty
    columns, of_columns = call.ids.view(shape).T, call.weights.view(shape).T  # (K, T)
    plans = call.plan.chunk(len(columns))
    for ids, weights, plan in zip(columns, of_columns, plans, strict=True):
        seed = _seed([f.seed for f in call.adapters], x.device) if p else None
        own = ids.contiguous()
        update = ops.lora_linear_apart(x, None, None, a, b, own, None, ranks, p, seed, plan)
        update = torch.where(own[:, None] < 0, 0, update * weights[:, None])
        y = update if y is None else y + update
    assert y is not None
    return y


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed for one dropout, ``()`` int64, from torch's default generator for the device."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def _seed(seeds: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return one seed for all adapters of a call, or ``(A,)`` seeds if an adapter has its own."""
    if all(seed is None for seed in seeds):
        return draw_seed(device)
    each = [draw_seed(device) if seed is None else seed for seed in seeds]
    return torch.cat([seed.reshape(-1) for seed in each])


def _shared_rows(adapters: Sequence[LoraFactors], x: Tensor) -> list[_Call]:
    """Return the calls that apply all adapters to all rows.

    There is one call if the factors can be concatenated along the rank, otherwise one per adapter.
    """
    ids, plan = _rows.all_rows(x.shape[0], x.device)
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


def _weighted_rows(adapters: Sequence[LoraFactors], x: Tensor, weights: Tensor) -> list[_Call]:
    """Return the calls that apply all adapters to all rows, with a weight per adapter and row.

    The factors are concatenated along the rank, padded so that eight ranks share one weight.
    """
    first = adapters[0]
    if first.a.dtype == torch.float64 or any(
        f.p or f.bias is not None or f.a.dtype != first.a.dtype for f in adapters
    ):
        every = range(len(adapters))
        ids = _rows.constant(every, torch.int32, x.device).expand(x.shape[0], -1)
        return _own_rows(adapters, _rows.planned(tuple(every), ids, weights))
    pages = [-(-f.a.shape[0] // _PAGE) for f in adapters]
    room = [_PAGE * n - f.a.shape[0] for n, f in zip(pages, adapters, strict=True)]
    each = list(zip(adapters, room, strict=True))
    a = torch.cat([pad(f.a, (0, 0, 0, n)) if n else f.a for f, n in each])
    b = torch.cat([pad(f.b, (0, n)) if n else f.b for f, n in each], 1)
    owners = [i for i, n in enumerate(pages) for _ in range(n)]
    groups = _rows.constant(owners, torch.int32, x.device)[None]  # (1, P)
    scaling = [adapters[i].scaling for i in owners]
    ids, plan = _rows.all_rows(x.shape[0], x.device)
    stacked = [first._replace(a=a, b=b)]
    return [_Call(stacked, ids, plan, [None], True, weights, groups, scaling)]


def _own_rows(adapters: Sequence[LoraFactors], rows: Rows) -> list[_Call]:
    """Return the calls that apply to each row the adapter selected by ``rows``.

    Adapters share a call if they have the same dropout probability and fit into one bank. If rows
    have several adapters, an adapter with its own seed has a separate call, so that its dropout
    masks do not depend on the other adapters."""
    calls: list[_Call] = []
    all_ranks = [f.a.shape[0] for f in adapters]
    in_two = len(adapters) * max(all_ranks) > _MOST_ROOM * sum(all_ranks)
    groups: dict[tuple[float, bool, int], list[int]] = {}
    for i, (f, rank) in enumerate(zip(adapters, all_ranks, strict=True)):
        seeded = i if f.p and f.seed is not None and rows.ids.dim() == 2 else -1
        groups.setdefault((f.p, in_two and rank > _SMALL_RANK, seeded), []).append(i)
    for (_, _, seeded), members in sorted(groups.items()):  # the same order for any batch
        own = rows if len(groups) == 1 else _rows.subset(rows, members)
        if seeded >= 0:
            of_it = own.ids == 0  # (T, K)
            weights = of_it if own.weights is None else own.weights.where(of_it, 0)
            own = _rows.planned(own.used, of_it.any(1).int() - 1, weights.sum(1))
        group, biases = [adapters[i] for i in members], [adapters[i].bias for i in members]
        calls.append(_Call(group, own.ids, own.plan, biases, False, own.weights))
    return calls


# -------------------------------------------------------------------------------------------------
# Biases of adapters


def _with_base_bias(calls: list[_Call], bias: Tensor | None) -> tuple[Tensor | None, list[_Call]]:
    """Add the biases of adapters that apply to all rows to the bias of the base layer.

    Returns the sum, and the calls without these biases.
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
    """Return ``y`` with ``scaling * bias`` of each adapter added to the adapter's rows."""
    if all(b is None for b in call.biases):
        return y
    if call.everywhere:
        for bias in call.biases:
            y = y if bias is None else y + bias * call.adapters[0].scaling
        return y
    for slot, bias in enumerate(call.biases):
        if bias is not None:
            # `torch.where` is used instead of a product with the mask, because 0 * NaN would spread
            # a NaN of one adapter to the rows of other adapters.
            own = (call.ids == slot).view(len(y), *call.ids.shape[1:] or (1,))  # (T, K)
            scaling = call.adapters[slot].scaling
            if call.weights is not None:
                scaling = scaling * call.weights.view(own.shape).where(own, 0).sum(1, keepdim=True)
            elif own.shape[1] > 1:
                scaling = scaling * own.sum(1, keepdim=True)
            y = torch.where(own.any(1, keepdim=True), y + bias * scaling, y)
    return y
