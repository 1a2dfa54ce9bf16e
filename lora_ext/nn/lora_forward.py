"""The forward of a linear layer with LoRA adapters, as a function of plain parameters.

:class:`lora_ext.nn.LoraLinear` and the layers of other packages that :func:`lora_ext.from_peft`
speeds up call the same function: what an adapter does is written here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.modules.module as module_globals
from torch import Tensor, nn

from lora_ext import ops

from . import _stand_in
from .rows import Rows, all_rows, constant, rows_of

_linear = getattr(ops, "lora_linear", _stand_in.lora_linear)
_MAX_FUSED_RANK = 256  # of the kernels


class LoraFactors(NamedTuple):
    """One adapter of one layer: ``scaling * (b @ a @ dropout(x) + bias)``."""

    a: Tensor  # (r, I)
    b: Tensor  # (O, r), dtype of a
    scaling: float
    p: float = 0.0  # the dropout in effect: 0 outside training
    bias: Tensor | None = None  # (O,): PEFT's lora_bias


def lora_forward(
    x: Tensor,
    base: nn.Module,
    adapters: Sequence[LoraFactors],
    adapter_ids: Tensor | Rows | None = None,
) -> Tensor:
    """``base(x)`` plus what the adapters add.

    ``y[t] = base(x[t]) + sum of scaling * (b @ a @ dropout(x[t]) + bias)``: over all adapters, or
    over the one that ``adapter_ids[t]`` names. An adapter without rows takes no part: it costs
    nothing and its ``grad`` stays None. Without any, this is ``base(x)`` and nothing else.

    A plain ``nn.Linear`` or transformers ``Conv1D`` takes part in the fused op with its weight. Any
    other base (quantised, wrapped, with hooks) is called, and the update added in the dtype of the
    adapters, with one rounding to that of ``base(x)``. Under autocast the layer computes in the
    autocast dtype. All as PEFT's layers do; the update itself is rounded fewer times than there.

    Each dropout draws its seed from torch's generator of the device of ``x``, so ``manual_seed``
    governs the masks and activation checkpointing repeats them. Adapters with dropout that share
    rows get independent masks.

    Args:
        x: ``(..., I)``.
        base: maps ``(..., I)`` to ``(..., O)``.
        adapters: of any ranks; those that share a call are promoted to one dtype.
        adapter_ids: ``(T,)`` int64 or int32 positions in ``adapters``, -1 for none, ``T`` the
            number of rows of ``x``; or :func:`rows_of` of them; or None: all adapters on all rows.

    Returns:
        ``(..., O)``, the dtype of ``base(x)``; differentiable in ``x``, the adapters and ``base``.

    Raises:
        ValueError: a shape, dtype, device or id that does not fit, naming it.

    Source: LoRA (Hu et al. 2021), eq. 3; several adapters on one row: PEFT's ``set_adapter``.
    """
    rows = None
    if adapter_ids is not None:
        rows = adapter_ids
        if isinstance(rows, Tensor):
            rows = rows_of(rows, len(adapters))
        adapters = [adapters[i] for i in rows.used]
        if rows.ids.shape[0] * x.shape[-1] != x.numel():
            raise ValueError(
                f"adapter_ids: expected one id for each of the {x.numel() // x.shape[-1]} rows of "
                f"x, found {rows.ids.shape[0]}"
            )
    if not adapters:
        return base(x)
    x2d = x.reshape(-1, x.shape[-1])  # (T, I)
    if rows is None:
        calls = _shared_rows(adapters, x2d)
    else:
        calls = _own_rows(adapters, rows)

    compute = autocast_dtype(x)
    dense = dense_parameters(base)
    first, y = calls[0], None
    fused = dense is not None and (
        compute is not None or x.dtype == dense[0].dtype == first.a.dtype
    )
    if fused:
        assert dense is not None
        weight, bias = dense
        bias, calls = _with_base_bias(first, bias, calls)
        y = _run(first, x2d, compute, weight, bias)
        out_dtype = y.dtype
    else:
        y = base(x)
        out_dtype, y = y.dtype, y.reshape(x2d.shape[0], -1)
    for call in calls[1 if fused else 0 :]:
        y = y + _run(call, x2d, compute, None, None)
    for call in calls:
        y = _add_bias(y, call)
    return y.to(out_dtype).view(*x.shape[:-1], y.shape[-1])


# -------------------------------------------------------------------------------------------------
# Calls of the op


class _Call(NamedTuple):
    """What one call of the op adds: a bank, and the adapter of each row in it."""

    a: Tensor  # (A, R, I)
    b: Tensor  # (A, O, R)
    ids: Tensor  # (T,)
    plan: Tensor
    scaling: tuple[float, ...]
    ranks: tuple[int, ...] | None
    p: float
    biases: tuple[Tensor | None, ...]
    everywhere: bool  # every row has an adapter, and the bank has but one


def _run(
    call: _Call, x: Tensor, compute: torch.dtype | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    dtype = call.a.dtype if compute is None else compute
    b, scale, ranks, seed = call.b.to(dtype), None, None, None
    if any(s != 1.0 for s in call.scaling):
        if dtype == torch.float64:  # the op holds scales in float32
            b = b * constant(call.scaling, dtype, x.device)[:, None, None]
        else:
            scale = constant(call.scaling, torch.float32, x.device)
    if call.ranks is not None:
        ranks = constant(call.ranks, torch.int32, x.device)
    if call.p:
        seed = draw_seed(x.device)
    return _linear(
        x.to(dtype),
        None if weight is None else weight.to(dtype),
        None if bias is None else bias.to(dtype),
        call.a.to(dtype),
        b,
        call.ids,
        scale,
        ranks,
        call.p,
        seed,
        call.plan,
    )


def draw_seed(device: torch.device) -> Tensor:
    """A seed for one dropout, ``(1,)`` int64, from torch's generator of the device."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _shared_rows(adapters: Sequence[LoraFactors], x: Tensor) -> list[_Call]:
    """All adapters on all rows: one call where they can stand one below the other in the rank."""
    ids, plan = all_rows(x.shape[0], x.device)
    first = adapters[0]
    together = len(adapters) == 1 or (
        all(
            f.p == 0 and f.scaling == first.scaling and f.a.dtype == first.a.dtype for f in adapters
        )
        and sum(f.a.shape[0] for f in adapters) <= _MAX_FUSED_RANK
    )
    calls: list[_Call] = []
    for group in [adapters] if together else [[f] for f in adapters]:
        a = group[0].a if len(group) == 1 else torch.cat([f.a for f in group], 0)
        b = group[0].b if len(group) == 1 else torch.cat([f.b for f in group], 1)
        biases = tuple(f.bias for f in group)
        f = group[0]
        calls.append(
            _Call(a[None], b[None], ids, plan, (f.scaling,), None, f.p, biases, everywhere=True)
        )
    return calls


def _own_rows(adapters: Sequence[LoraFactors], rows: Rows) -> list[_Call]:
    """Every row its own adapter: one call for all adapters that have the same dropout."""
    calls: list[_Call] = []
    by_p: dict[float, list[int]] = {}
    for i, f in enumerate(adapters):
        by_p.setdefault(f.p, []).append(i)
    for p, members in by_p.items():
        ids, plan = rows.ids, rows.plan
        if len(by_p) > 1:
            place = [members.index(i) if i in members else -1 for i in range(len(adapters))]
            ids = constant([*place, -1], torch.int32, ids.device)[ids.long()]  # the last serves -1
            plan = ops.lora_plan(ids, len(members))
        group = [adapters[i] for i in members]
        ranks = tuple(f.a.shape[0] for f in group)
        a, b = _bank([f.a for f in group], [f.b for f in group])
        scaling = tuple(f.scaling for f in group)
        biases = tuple(f.bias for f in group)
        unequal = ranks if min(ranks) < max(ranks) else None
        calls.append(_Call(a, b, ids, plan, scaling, unequal, p, biases, everywhere=False))
    return calls


# -------------------------------------------------------------------------------------------------
# Banks


def _bank(a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, Tensor]:
    """``(A, R, I)`` and ``(A, O, R)`` of the factors; beyond an adapter's rank undefined."""
    if len(a) == 1:
        return a[0][None], b[0][None]
    if torch.compiler.is_compiling():  # the compiler fuses this, and cannot see into the other
        rank = max(f.shape[0] for f in a)
        pad = torch.nn.functional.pad
        return (
            torch.stack([pad(f, (0, 0, 0, rank - f.shape[0])) for f in a]),
            torch.stack([pad(f, (0, rank - f.shape[1])) for f in b]),
        )
    return _Bank.apply(*a, *b)  # pyright: ignore[reportReturnType]


class _Bank(torch.autograd.Function):
    """One node for any number of adapters; its backward hands out views and copies nothing."""

    @staticmethod
    def forward(ctx: Any, *factors: Tensor) -> tuple[Tensor, Tensor]:
        half = len(factors) // 2
        a, b = factors[:half], factors[half:]
        dtype = a[0].dtype
        for f in factors:
            dtype = torch.promote_types(dtype, f.dtype)
        ctx.ranks = [f.shape[0] for f in a]
        ctx.dtypes = [f.dtype for f in factors]
        rank = max(ctx.ranks)
        bank_a = a[0].new_empty((half, rank, a[0].shape[1]), dtype=dtype)
        bank_b = b[0].new_empty((half, b[0].shape[0], rank), dtype=dtype)
        views = [*_views_a(bank_a, ctx.ranks), *_views_b(bank_b, ctx.ranks)]
        torch._foreach_copy_(views, factors)  # pyright: ignore[reportPrivateImportUsage]
        return bank_a, bank_b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        views = [*_views_a(grads[0], ctx.ranks), *_views_b(grads[1], ctx.ranks)]
        return tuple(g.to(dtype) for g, dtype in zip(views, ctx.dtypes, strict=True))


def _views_a(bank: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    return [s[:r] for s, r in zip(bank.unbind(0), ranks, strict=True)]


def _views_b(bank: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    return [s[:, :r] for s, r in zip(bank.unbind(0), ranks, strict=True)]


# -------------------------------------------------------------------------------------------------
# Biases of adapters


def _with_base_bias(
    call: _Call, bias: Tensor | None, calls: list[_Call]
) -> tuple[Tensor | None, list[_Call]]:
    """Where every row gets them, the biases of the adapters join that of the base: no pass more."""
    if not call.everywhere or all(b is None for b in call.biases):
        return bias, calls
    for extra in call.biases:
        if extra is not None:
            extra = extra * call.scaling[0]
            bias = extra if bias is None else bias + extra
    return bias, [call._replace(biases=(None,) * len(call.biases)), *calls[1:]]


def _add_bias(y: Tensor, call: _Call) -> Tensor:
    """``scaling * bias`` on the rows of each adapter that has one."""
    if all(b is None for b in call.biases):
        return y
    if call.everywhere:
        for bias in call.biases:
            y = y if bias is None else y + bias * call.scaling[0]
        return y
    with_bias = [(s, b) for s, b in enumerate(call.biases) if b is not None]
    stacked = torch.stack([b for _, b in with_bias])  # (A', O)
    slots = constant([s for s, _ in with_bias], torch.int32, y.device)
    scale = constant([call.scaling[s] for s, _ in with_bias], torch.float32, y.device)
    # As a product, so that the backward is one too: summing rows by index has no fixed order.
    weights = (call.ids[:, None] == slots) * scale  # (T, A')
    return y + weights.to(stacked.dtype) @ stacked


# -------------------------------------------------------------------------------------------------
# The base layer


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast makes a linear layer compute, or None where it is off."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ):
        return torch.get_autocast_dtype(kind)
    return None


def dense_parameters(base: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """``(O, I)`` weight and bias, where ``base(x)`` is ``x @ weight.T + bias`` and nothing more."""
    kind = type(base)
    if kind is nn.Linear:
        weight = base.weight
    elif kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        weight = base.weight.t()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    else:
        return None
    plain = (
        type(base.weight) in (nn.Parameter, Tensor)  # not quantised, not distributed
        and "forward" not in base.__dict__  # as accelerate's offloading leaves it
        and not _has_hooks(base)
    )
    return (weight, base.bias) if plain else None  # pyright: ignore[reportReturnType]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
    )
