"""Training of batched multi-adapter LoRA: base product, update, dropout in one differentiable op.

Letters: ``T`` tokens, ``I`` in, ``O`` out, ``R`` largest rank, ``A`` adapters. Adapters come as a
bank, ``a (A, R, I)`` and ``b (A, O, R)``; pages receive no gradient and are refused.

Dropout needs no stored mask: whether an element is kept follows from (seed, row, column) by Philox,
so forward, backward, checkpointing and every device agree.

Sources: LoRA (Hu et al. 2021), eq. 3, differentiated; Philox: Salmon et al. 2011.
"""

import torch
from torch import Tensor

_c = torch.ops.lora_ext


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
) -> Tensor:
    """Linear layer plus the low-rank update of every row by its own adapter.

    ``y[t] = weight @ x[t] + bias + b[s] @ (c * a[s] @ (m[t] * x[t]))`` with ``s = adapter_ids[t]``,
    the dropout mask ``m`` in {0, 1} and ``c = scale[s] / (1 - dropout_p)``; rows of -1 have no
    update.

    Differentiable once in ``x``, ``weight``, ``bias``, ``a`` and ``b``; what requires no gradient
    costs none. An adapter's gradient has the same bits whatever shares its batch, and is zero where
    no row names the adapter and beyond its rank. The products with ``weight`` are a library's GEMM,
    whose bits may depend on batch and threads: torch's own, except for large float32 batches on the
    CPU in which every row has an adapter; those take oneDNN where
    ``torch.backends.mkldnn.enabled``.

    Args:
        x: ``(T, I)`` float16, bfloat16, float32, or float64 on the CPU; any row stride. Under
            autocast it is cast with the parameters, as torch's linear does.
        weight: ``(O, I)``, or None: the result is the update alone, for bases that are no matrix.
        bias: ``(O,)`` or None.
        a: ``(A, R, I)``, dtype and device of ``x``.
        b: ``(A, O, R)``, dtype and device of ``x``.
        adapter_ids: ``(T,)`` int64 or int32, each in ``[-1, A)``.
        scale: ``(A,)`` float32 without gradient, or None for 1.
        ranks: ``(A,)`` int32 in ``[0, R]``, or None for ``R``.
        dropout_p: probability in ``[0, 1)`` of dropping an element of the adapters' input; the base
            sees all of ``x``.
        seed: one int64 on the device of ``x``, required with ``dropout_p > 0``; a captured
            graph may change it between replays.
        plan: :func:`lora_plan` of the same ids, to save grouping them again.

    Returns:
        ``(T, O)`` in the dtype of ``x``. The base product is rounded once, its sum with the update
        once more.

    Raises:
        ValueError: if a shape, dtype or device disagrees, naming the argument.
        RuntimeError: on double backward.

    Source: LoRA (Hu et al. 2021), eq. 3, gathered per row as in Punica (Chen et al. 2023).
    """
    return _c.lora_linear_forward.default(
        x, weight, bias, a, b, adapter_ids, scale, ranks, dropout_p, seed, plan
    )[0]


def lora_dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """Dropout with the mask of :func:`lora_linear`, for layers that cannot use the fused op.

    ``y[t, i] = x[t, i] / (1 - p)`` where Philox keeps (seed, t, i), else 0; differentiable in
    ``x``.

    Args:
        x: ``(T, I)`` float16, bfloat16, float32, or float64 on the CPU; any row stride.
        p: probability in ``[0, 1)`` of dropping an element.
        seed: one int64 on the device of ``x``, required with ``p > 0``.

    Returns:
        ``(T, I)`` in the dtype of ``x``, rounded once.

    Raises:
        ValueError: if a shape, dtype or device disagrees, naming the argument.

    Source: Philox (Salmon et al. 2011), counter ``(row, column / 4, 0, 0)``.
    """
    return _c.lora_dropout.default(x, p, seed)
