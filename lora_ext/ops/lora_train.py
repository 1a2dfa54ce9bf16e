"""Training of batched multi-adapter LoRA: a linear layer with adapters in one differentiable op.

Letters: ``T`` tokens (rows), ``I`` input features, ``O`` output features, ``R`` largest rank, ``A``
adapters. Adapters are in a bank, ``a (A, R, I)`` and ``b (A, O, R)``. Pages are rejected, because
they have no gradient.

The op includes dropout but stores no mask. The generator Philox computes from (seed, row, column)
whether to keep an element, so the mask is the same in forward and backward, under checkpointing and
on all devices. With one seed per adapter, "row" is the index among the rows of the adapter, so its
mask does not depend on other adapters.

Sources: LoRA (Hu et al. 2021), eq. 3, differentiated; Philox: Salmon et al. 2011.
"""

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_ext._checks import require
from lora_ext._torch import compiles
from lora_ext.reference import accumulator

from ._registration import fake

_c = torch.ops.lora_ext
_LINEAR = "lora_linear"


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    plan: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Compute a linear layer plus the low-rank update of every row by its adapter.

    ``y[t] = weight @ x[t] + bias + b[s] @ (c * a[s] @ (m[t] * x[t])) * weights[t]`` with
    ``s = adapter_ids[t]``, the dropout mask ``m`` in {0, 1} and ``c = scale[s] / (1 - dropout_p)``;
    rows with id -1 have no update. For ids ``(T, K)`` the updates of the columns are added.

    Differentiable once in ``x``, ``weight``, ``bias``, ``a``, ``b`` and ``weights``; only the
    gradients that autograd needs are computed. The gradient of ``weights`` is exactly 0 for entries
    with id -1. The bits of an adapter's gradient do not depend on the other adapters of the batch.
    The gradient is zero beyond the adapter's rank, and for an adapter without rows. The products
    with ``weight`` use a library's GEMM, so their bits may depend on the batch and the number of
    threads. The library is torch's, or oneDNN for large float32 batches on the CPU if every row has
    an adapter of positive rank and ``torch.backends.mkldnn.enabled``.

    Args:
        x: Input ``(T, I)`` float16, bfloat16, float32, or float64 on the CPU; any row stride.
            Autocast casts it and the parameters, as for torch's linear.
        weight: Base weight ``(O, I)``, or None to compute only the update, if the base is not a
            matrix.
        bias: Bias ``(O,)`` of the base layer, or None.
        a: Bank ``(A, R, I)``, dtype and device of ``x``. A single adapter may also be ``(R, I)``
            with ``b (O, R)``; its gradients then have these shapes.
        b: Bank ``(A, O, R)``, dtype and device of ``x``.
        adapter_ids: Adapter id of each row, ``(T,)`` or ``(T, K)`` int64 or int32 in ``[-1, A)``.
        scale: Scale of each adapter, ``(A,)`` or ``(A, ceil(R / 8))`` float32 without gradient, or
            None for 1.
        ranks: Rank of each adapter, ``(A,)`` int32 in ``[0, R]``, or None for ``R``.
        dropout_p: Probability in ``[0, 1)`` of dropping an element of the adapters' input; the base
            product uses all of ``x``.
        seed: Seed of the dropout mask, int64 on the device of ``x``, required if ``dropout_p > 0``.
            You may change it between replays of a captured graph. With one number, the mask depends
            on the row's index in the batch. With ``(A,)``, it depends on the adapter's seed and the
            row's index among the rows of that adapter, not on other rows. For one adapter, the
            masks of a seed of shape ``()`` and of shape ``(1,)`` differ if rows have id -1. The
            columns of ids ``(T, K)`` have different masks of one seed.
        plan: Result of :func:`lora_plan` for the same ids, to avoid grouping them again.
        weights: Factor of each row or entry of the ids, see :func:`lora_apply`.
        groups: Column of ``weights`` of each page, see :func:`lora_apply`.

    Returns:
        ``(T, O)`` in the dtype of ``x``. The base product is rounded, and its sum with the update
        is rounded again.

    Raises:
        ValueError: If a shape, dtype or device is wrong.
        RuntimeError: On double backward.

    Source: LoRA (Hu et al. 2021), eq. 3, gathered per row as in Punica (Chen et al. 2023).
    """
    return _c.lora_linear_forward.default(
        x, weight, bias, a, b, adapter_ids, scale, ranks, dropout_p, seed, plan, weights, groups
    )[0]


@fake("lora_linear_forward")
def _fake_linear(
    x: Tensor, weight: Any, bias: Any, a: Tensor, b: Tensor, ids: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    _, _, dropout_p, seed, *_ = rest
    adapters = a.shape[0] if a.dim() == 3 else 1
    if dropout_p:
        require(seed is not None, _LINEAR, "seed", "one int64 number if dropout_p > 0", None)
        require(seed.dtype == torch.int64, _LINEAR, "seed", "Long", seed.dtype)
        holds = seed.numel() == 1 or seed.shape == (adapters,)
        expected = f"one int64 number, or one for each of {adapters} adapters"
        require(holds, _LINEAR, "seed", expected, f"shape {list(seed.shape)}")
    y = x.new_empty(x.shape[0], b.shape[-2])
    return y, x.new_empty(*ids.shape, a.shape[-2], dtype=accumulator(x.dtype))


@fake("lora_linear_backward")
def _fake_linear_backward(
    dy: Tensor, x: Tensor, v: Tensor, weight: Any, a: Tensor, b: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, dx, da, db, weights, _, dweights = rest
    needs = (x, dx), (a, da), (b, db)
    of_x, of_a, of_b = (t.new_empty(t.shape if need else 0) for t, need in needs)
    shape = weights.shape if dweights else 0
    return of_x, of_a, of_b, x.new_empty(shape, dtype=torch.float32)


def lora_linear_apart(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    adapter_ids: Tensor,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    plan: Tensor | None = None,
    packed: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Apply :func:`lora_linear` to adapters that are separate tensors, such as parameters.

    Each forward pass copies the factors into a temporary bank, and the backward pass builds the
    bank again: storing the banks of all layers would take as much memory as the adapters. The
    gradients of the factors are views of the gradients of a bank.

    Args:
        x: Input ``(T, I)``, see :func:`lora_linear`.
        weight: Base weight ``(O, I)``, or None.
        bias: Bias ``(O,)``, or None.
        a: Factor ``(r, I)`` of each of A adapters, whose ranks r may differ, on the device of
            ``x``; the factors are cast to the dtype of ``x``.
        b: Factors ``(O, r)`` of the same adapters.
        adapter_ids: Adapter id of each row, ``(T,)`` or ``(T, K)``.
        scale: Scale of each adapter, see :func:`lora_linear`.
        ranks: Rank of each adapter, ``(A,)`` int32; may be None if the ranks are equal.
        dropout_p: Probability of dropping an element, see :func:`lora_linear`.
        seed: Seed of the dropout mask, see :func:`lora_linear`.
        plan: Result of :func:`lora_plan` for the same ids, or None.
        packed: Result of :func:`pack_weight` for ``weight``. The base product then uses
            :func:`packed_linear`, whose bits do not depend on other rows; ``dropout_p`` must be 0.
            Compiled graphs ignore it.
        weights: Factor of each row or entry of the ids, see :func:`lora_apply`.
        groups: Column of ``weights`` of each page, see :func:`lora_apply`.

    Returns:
        ``(T, O)`` in the dtype of ``x``.

    Raises:
        ValueError: As for :func:`lora_linear`, or for unequal ranks without ``ranks``.
        RuntimeError: On double backward.

    Source: LoRA (Hu et al. 2021), eq. 3, gathered per row as in Punica (Chen et al. 2023).
    """
    if ranks is None and any(f.shape[0] != a[0].shape[0] for f in a):
        expected, found = "the rank of each adapter", f"None for ranks {[f.shape[0] for f in a]}"
        raise ValueError(f"lora_linear_apart: ranks: expected {expected}, found {found}")
    rest = adapter_ids, scale, ranks, dropout_p, seed, plan
    if len(a) == 1 and packed is None:
        one = a[0].to(x.dtype), b[0].to(x.dtype)
        return lora_linear(x, weight, bias, *one, *rest, weights=weights, groups=groups)
    if compiles():  # The compiler fuses these ops and cannot trace `_Apart`.
        rank = max(f.shape[0] for f in a)
        bank_a = torch.stack([pad(f, (0, 0, 0, rank - f.shape[0])) for f in a]).to(x.dtype)
        bank_b = torch.stack([pad(f, (0, rank - f.shape[1])) for f in b]).to(x.dtype)
        bank = bank_a, bank_b
        return lora_linear(x, weight, bias, *bank, *rest, weights=weights, groups=groups)
    apply: Any = _Apart.apply  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return apply(x, weight, bias, (*rest, groups), packed, weights, *a, *b)


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rest: Any,
        packed: Tensor | None,
        weights: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        *rest, groups = rest
        ids, scale, ranks, ctx.p, seed, plan = rest
        bank = _bank(factors, x.dtype)
        if packed is None or weight is None:
            y, v = _c.lora_linear_forward.default(x, weight, bias, *bank, *rest, weights, groups)
        else:
            require(not ctx.p, _LINEAR, "dropout_p", "0 if packed is set", ctx.p)
            y = _c.packed_linear.default(x, packed, bias, weight.shape[0])
            v = _c.lora_shrink.default(x, bank[0], ids, scale, ranks, None, plan)
            if weights is None:
                _c.lora_expand_.default(y, v, bank[1], ids, ranks, None, plan)
            else:  # The backward pass needs v without the weights.
                mixed = scale, ranks, None, plan, weights, groups
                _c.lora_apply_.default(y, x, *bank, ids, *mixed)
        for_dx = weight if ctx.needs_input_grad[0] else None
        saved = ids, scale, ranks, plan, seed, weights, groups
        ctx.save_for_backward(x, v, for_dx, *saved, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            again = "the gradient of lora_linear is not itself differentiable"
            raise RuntimeError(f"lora_linear_apart: {again}")
        (dy,) = grads
        x, v, weight, ids, scale, ranks, plan, seed, weights, groups, *factors = ctx.saved_tensors
        dx, dweight, dbias, _, _, mixes, *wanted = ctx.needs_input_grad
        half = len(factors) // 2
        da, db = any(wanted[:half]), any(wanted[half:])
        out: list[Tensor | None] = [None] * len(wanted)
        gradient = of_weights = None
        if dx or da or db or mixes:
            needs = dx, da, db, weights, groups, mixes
            gradient, bank_a, bank_b, of_weights = _c.lora_linear_backward.default(
                *(dy, x, v, weight, *_bank(factors, x.dtype), ids, scale, ranks, plan),
                *(ctx.p, seed, *needs),
            )
            all_ranks = [f.shape[0] for f in factors[:half]]
            if da:
                out[:half] = _views_a(bank_a, all_ranks)
            if db:
                out[half:] = _views_b(bank_b, all_ranks)
        of_weight, of_bias = dy.t().mm(x) if dweight else None, dy.sum(0) if dbias else None
        of_factors = (
            g.to(f.dtype) if want and g is not None else None
            for g, f, want in zip(out, factors, wanted, strict=True)
        )
        of_rows = of_weights if mixes else None
        return gradient if dx else None, of_weight, of_bias, None, None, of_rows, *of_factors


def _bank(factors: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copy ``factors`` (``a`` of all adapters, then ``b`` of all adapters) to two banks.

    The banks are ``(A, R, I)`` and ``(A, O, R)``. Entries beyond an adapter's rank are undefined.
    """
    half = len(factors) // 2
    a, b = factors[:half], factors[half:]
    ranks = [f.shape[0] for f in a]
    shape_a = half, max(ranks), a[0].shape[1]
    shape_b = half, b[0].shape[0], max(ranks)
    size = math.prod(shape_a)
    memory = _scratch(a[0].device, size + math.prod(shape_b), dtype)
    bank_a, bank_b = memory[:size].view(shape_a), memory[size:].view(shape_b)
    if min(ranks) == max(ranks):  # faster on the CPU than copies into views
        return torch.stack(a, out=bank_a), torch.stack(b, out=bank_b)
    views = [*_views_a(bank_a, ranks), *_views_b(bank_b, ranks)]
    torch._foreach_copy_(views, list(factors))  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
    return bank_a, bank_b


_kept = threading.local()


def _scratch(device: torch.device, size: int, dtype: torch.dtype) -> Tensor:
    """Return uninitialised memory for one call.

    On the CPU, later calls of the same thread reuse the memory, because obtaining new memory from
    the operating system takes longer than filling it.
    """
    traced = torch._C._len_torch_dispatch_stack()  # pyright: ignore[reportPrivateUsage]
    if device.type != "cpu" or traced:
        return torch.empty(size, dtype=dtype, device=device)
    nbytes = size * dtype.itemsize
    memory: Tensor | None = getattr(_kept, "memory", None)
    if memory is None or memory.numel() < nbytes:
        with torch.inference_mode(False):  # so that calls outside inference mode can write it
            memory = _kept.memory = torch.empty(nbytes, dtype=torch.uint8)
    return memory[:nbytes].view(dtype)


def _views_a(bank: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    return [s[:r] for s, r in zip(bank.unbind(0), ranks, strict=True)]


def _views_b(bank: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    return [s[:, :r] for s, r in zip(bank.unbind(0), ranks, strict=True)]


def lora_dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """Apply dropout with the mask of :func:`lora_linear`, for layers that cannot use the fused op.

    ``y[t, i] = x[t, i] / (1 - p)`` if Philox keeps (seed, t, i), otherwise 0. Differentiable in
    ``x``.

    Args:
        x: Input ``(T, I)`` float16, bfloat16, float32, or float64 on the CPU; any row stride.
        p: Probability in ``[0, 1)`` of dropping an element.
        seed: Seed of the mask, one int64 on the device of ``x``; required if ``p > 0``.

    Returns:
        ``(T, I)`` in the dtype of ``x``, rounded once.

    Raises:
        ValueError: If a shape, dtype or device is wrong.

    Source: Philox (Salmon et al. 2011), counter ``(row, column / 4, 0, 0)``.
    """
    return _c.lora_dropout.default(x, p, seed)


@fake("lora_dropout")
def _fake_dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape)
