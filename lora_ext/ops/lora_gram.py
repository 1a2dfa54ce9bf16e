"""Gram matrices of adapters, and the effect of an adapter on a weight.

The inner products of adapters can be computed from Gram matrices of their factors, without forming
the products ``b a``. The bits of an adapter's result depend neither on the number of threads nor on
the other adapters of the call.

:func:`lora_delta`, :func:`lora_merge_` and :func:`lora_dora_norm` use torch's GEMM on every device,
so their bits may depend on the number of threads. Only :func:`lora_delta` is differentiable.
Autocast does not affect any function.

Letters: ``I`` input features, ``O`` output features, ``r`` rank of the adapter, ``L`` adapters.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from lora_ext._checks import FLOATS, require, require_shape
from lora_ext._torch import exactly
from lora_ext.reference import accumulator

from ._registration import fake

_c = torch.ops.lora_ext


@torch.no_grad()
def lora_gram(
    a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute ``a @ a^T`` and ``b^T @ b`` of every adapter.

    Given these matrices, the Frobenius norm of ``b a`` takes ``r^2`` operations. Gram matrices
    square the condition number, so small singular values need float64, and very small ones a QR
    decomposition of the factors instead.

    On a GPU, up to 500 adapters of one dtype take one launch. Adapters on several devices take one
    call of the op per device. A factor of rank up to 64 is read once. A factor is copied only if
    the elements of a row are not contiguous or the other factor has a wider dtype.

    Args:
        a: Factors ``(r, I)`` of the adapters, float32, float16, bfloat16 or float64. Shapes and
            dtypes may differ between adapters. If the two factors of an adapter have different
            dtypes, both are converted to the wider one.
        b: Factors ``(O, r)`` of the same adapters.
        dtype: Dtype of the results, float32 or float64, or None for float64 with float64 factors
            and float32 otherwise. Sums have the same dtype, except that they are always float64 for
            float64 factors.

    Returns:
        Two lists of matrices ``(r, r)``, exactly symmetric: ``a @ a^T``, and ``b^T @ b``.

    Raises:
        ValueError: If a length, shape, dtype or device is wrong.
    """
    require(len(a) == len(b), "lora_gram", "b", f"as many tensors as a, {len(a)}", len(b))
    grams: dict[int, tuple[Tensor, Tensor]] = {}
    devices = dict.fromkeys(t.device for t in a)
    if len(devices) > 1:  # The op would count the factors per device in its error messages.
        _check_adapters("lora_gram", a, spread=True, b=b)
    for device in devices:
        here = [i for i, t in enumerate(a) if t.device == device]
        found = _c.lora_gram.default([a[i] for i in here], [b[i] for i in here], dtype)
        grams.update(zip(here, zip(*found, strict=True), strict=True))
    return [grams[i][0] for i in range(len(a))], [grams[i][1] for i in range(len(a))]


@torch.no_grad()
def lora_pair_stats(
    a: Tensor | Sequence[Tensor],
    b: Tensor | Sequence[Tensor],
    projected_b: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float] | Tensor = 1.0,
) -> Tensor:
    """Measure how far an adapter's update is from its projection, using only Gram matrices.

    With ``D = scaling * b @ a`` and ``PD = scaling * projected_b @ a``, which are not formed, the
    results are ``(|D|^2, |PD|^2, <PD, D>, |PD - D|^2)``, with sums in float64. ``|PD - D|^2`` is
    computed from ``projected_b - b``, so that no digits are lost by cancellation.

    Args:
        a: Factor ``(r, I)`` of an adapter, or a list of the factors of L adapters on one device, as
            for :func:`lora_gram`.
        b: Factor ``(O, r)`` of the adapter, or a list of L factors.
        projected_b: Image of ``b`` under the projection, in the shape of ``b``, or a list of L
            images.
        scaling: Scale of the adapter, or one number per adapter. During capture of a CUDA graph,
            several numbers must be a tensor on the adapters' device.

    Returns:
        ``(4,)`` float64 for a single adapter, ``(L, 4)`` for lists.

    Raises:
        ValueError: If a length, shape, dtype or device is wrong.

    Source: SPLoRA (TACL 2025), the distance of an update to its projection, by the identity
    ``<b1 a1, b2 a2> = <b2^T b1, a2 a1^T>``.
    """
    single = isinstance(a, Tensor)
    lists = [[t] if isinstance(t, Tensor) else list(t) for t in (a, b, projected_b)]
    scales = torch.as_tensor(scaling, dtype=torch.float64)
    if scales.dim():
        require_shape("lora_pair_stats", "scaling", scales, "(L,)", (len(lists[0]),))
    if not any(lists):
        return scales.new_zeros(0, 4)
    stats: Tensor = _c.lora_pair_stats.default(*lists)  # (L, 4)
    # A single scale stays on the host; a vector moves to the device of the adapters.
    stats *= scales.to(stats.device)[:, None].square() if scales.dim() else scales.square()
    return stats[0] if single else stats


@fake("lora_gram")
def _fake_lora_gram(
    a: list[Tensor], b: list[Tensor], dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    known = dtype is None or dtype in (torch.float32, torch.float64)
    require(known, "lora_gram", "dtype", "None, torch.float32 or torch.float64", dtype)
    _check_adapters("lora_gram", a, b=b)
    grams: tuple[list[Tensor], list[Tensor]] = ([], [])
    for a_s, b_s in zip(a, b, strict=True):
        sums = dtype or accumulator(torch.promote_types(a_s.dtype, b_s.dtype))
        for kept in grams:
            kept.append(a_s.new_empty((a_s.shape[0], a_s.shape[0]), dtype=sums))
    return grams


@fake("lora_pair_stats")
def _fake_lora_pair_stats(a: list[Tensor], b: list[Tensor], projected_b: list[Tensor]) -> Tensor:
    _check_adapters("lora_pair_stats", a, b=b, projected_b=projected_b)
    for i, (b_s, p_s) in enumerate(zip(b, projected_b, strict=True)):
        require_shape("lora_pair_stats", f"projected_b[{i}]", p_s, "(O, r)", b_s.shape)
    return a[0].new_empty((len(a), 4), dtype=torch.float64)


def _check_adapters(
    op: str, a: Sequence[Tensor], *, spread: bool = False, **sides: Sequence[Tensor]
) -> None:
    """Raise ValueError for lists of unequal lengths and mismatched factors, as the C++ op does.

    With ``spread``, adapters may be on different devices.
    """
    for name, factors in sides.items():
        require(len(factors) == len(a), op, name, f"as many tensors as a, {len(a)}", len(factors))
    for i, a_s in enumerate(a):
        require(a_s.dim() == 2, op, f"a[{i}]", "shape (r, I)", list(a_s.shape))
        for name, factors in (("a", a), *sides.items()):
            t, argument = factors[i], f"{name}[{i}]"
            if name != "a":
                fits = t.dim() == 2 and t.shape[1] == a_s.shape[0]
                letters = f"shape (O, r) with r = {a_s.shape[0]}"
                require(fits, op, argument, letters, list(t.shape))
            device = (a_s if spread else a[0]).device
            require(t.device == device, op, argument, f"a tensor on {device}", t.device)
            known = "float32, float16, bfloat16 or float64"
            require(t.dtype in FLOATS, op, argument, known, t.dtype)


# -------------------------------------------------------------------------------------------------
# Effect of an adapter on a weight


def _check(op: str, a: Tensor, b: Tensor, weight: Tensor | None = None) -> None:
    fits = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1]
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    require(fits, op, "a and b", "shapes (r, I) and (O, r)", shapes)
    if weight is not None:
        require_shape(op, "weight", weight, "(O, I)", (b.shape[0], a.shape[1]))
    for name, t in (("a", a), ("b", b), ("weight", a if weight is None else weight)):
        require(t.is_floating_point(), op, name, "a floating dtype", t.dtype)


def _product(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    with exactly(a.device):
        return (b.to(dtype) @ a.to(dtype)).mul_(scale)


def lora_delta(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Compute the matrix that an adapter adds to a weight, ``scale * b @ a``; differentiable.

    Args:
        a: Factor ``(r, I)`` of a floating dtype.
        b: Factor ``(O, r)``.
        scale: Scale of the adapter.

    Returns:
        ``(O, I)`` in the dtype of ``a``, accumulated in float32 (float64 for float64), rounded
        once.

    Raises:
        ValueError: If a shape or dtype is wrong.

    Source: LoRA (Hu et al. 2021), section 4.1.
    """
    _check("lora_delta", a, b)
    return _product(a, b, scale, accumulator(a.dtype)).to(a.dtype)


@torch.no_grad()
def lora_merge_(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, sign: int = 1) -> Tensor:
    """Add an adapter to a weight in place, ``weight += sign * scale * b @ a``, rounded once.

    If you subtract the adapter again (``sign=-1``), rounding may leave bits of the weight changed.
    Keep a copy of the weight if you need it exactly.

    Args:
        weight: Weight ``(O, I)`` of a floating dtype; it is returned.
        a: Factor ``(r, I)``.
        b: Factor ``(O, r)``.
        scale: Scale of the adapter.
        sign: 1 to merge, -1 to unmerge.

    Raises:
        ValueError: If a shape, a dtype or the sign is wrong.

    Source: LoRA (Hu et al. 2021), section 4.1.
    """
    _check("lora_merge_", a, b, weight)
    require(sign in (1, -1), "lora_merge_", "sign", "1 or -1", sign)
    dtype = accumulator(weight.dtype)
    return weight.copy_(_product(a, b, sign * scale, dtype).add_(weight.to(dtype)))


@torch.no_grad()
def lora_dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Compute the norm of every row of ``weight + scale * b @ a`` without forming ``b @ a``.

    The square of a row's norm is ``|w|^2 + 2 scale <w a^T, b> + scale^2 <b (a a^T), b>``, with an
    absolute error of a few roundings of ``|w|^2``. If the adapter nearly cancels a row, in float32
    a norm of 1e-2 ``|w|`` has a relative error of 2e-3, and one of 1e-4 ``|w|`` is noise. If a row
    of ``b`` is zero, the norm is bitwise equal to ``torch.linalg.vector_norm``, with which PEFT
    initialises magnitudes.

    Args:
        weight: Weight ``(O, I)`` of a floating dtype.
        a: Factor ``(r, I)``.
        b: Factor ``(O, r)``.
        scale: Scale of the adapter, a number or a tensor with one element.

    Returns:
        ``(O,)`` float32 (float64 for float64).

    Raises:
        ValueError: If a shape or dtype is wrong.

    Source: DoRA (Liu et al. 2024), eq. 5.
    """
    _check("lora_dora_norm", a, b, weight)
    dtype = accumulator(weight.dtype)
    with exactly(weight.device):
        wide, wide_a, wide_b = weight.to(dtype), a.to(dtype), b.to(dtype)
        # torch does not annotate vector_norm.
        norm = cast(Tensor, torch.linalg.vector_norm(wide, dim=1))  # pyright: ignore[reportUnknownMemberType]
        square = norm.square_()  # The square root of this square is exactly the norm.
        square += 2 * scale * ((wide @ wide_a.T) * wide_b).sum(1)
        square += scale**2 * ((wide_b @ (wide_a @ wide_a.T)) * wide_b).sum(1)
        return square.clamp_(min=0).sqrt_()
