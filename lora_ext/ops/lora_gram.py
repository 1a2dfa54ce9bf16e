"""An adapter as numbers: its Gram matrices, and what it is to a weight.

Inner products of adapters come from the Gram matrices of their factors: the product ``b a`` is
never formed. Results repeat bit for bit, whatever the number of threads and whatever other adapters
are in the call.

The product itself, merged and measured, is torch's GEMM's on every device: no kernel of this
package has anything to add, and bits may depend on the library's threads. All but
:func:`lora_delta` take no part in autograd. Autocast leaves either alone.

Letters: ``I`` in, ``O`` out, ``r`` the adapter's rank, ``L`` adapters.
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
    """Return ``a @ a^T`` and ``b^T @ b`` of every adapter.

    Inner products of adapters need no more than these: ``<b1 a1, b2 a2>`` and norms of ``b a`` cost
    ``r^2`` once they are known. Gram matrices square the condition number: small singular values
    need float64, and the smallest a QR of the factors.

    On a GPU this is one launch for up to 500 adapters of one dtype; of a model that is spread over
    devices each does its own. A factor is read once up to 64 ranks. It is copied only where the
    elements of a row lie apart, or the other factor's dtype is wider.

    Args:
        a: ``(r, I)`` each, float32, float16, bfloat16 or float64; shapes and dtypes may differ from
            adapter to adapter. Factors of one adapter in two dtypes count in the wider one.
        b: ``(O, r)`` each, as many as ``a``.
        dtype: in which to add and return, float32 or float64; by default float32, and float64 for
            factors in float64, whose sums are in float64 whatever is returned.

    Returns:
        Two lists of ``(r, r)``, symmetric to the bit.

    Raises:
        ValueError: if lengths, shapes, dtypes or devices disagree, naming the argument.
    """
    require(len(a) == len(b), "lora_gram", "b", f"as many tensors as a, {len(a)}", len(b))
    grams: dict[int, tuple[Tensor, Tensor]] = {}
    devices = dict.fromkeys(t.device for t in a)
    if len(devices) > 1:  # the op would count places among the factors of one device
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
    """Return how far an adapter's update is from its projection, by Gram matrices alone.

    With ``D = scaling * b @ a`` and ``PD = scaling * projected_b @ a``, neither of which is formed,
    ``(|D|^2, |PD|^2, <PD, D>, |PD - D|^2)``, all sums in float64. The last comes from
    ``projected_b - b`` itself and does not cancel.

    Args:
        a: ``(r, I)``, or one such tensor for each of L adapters, as for :func:`lora_gram`, all on
            one device.
        b: ``(O, r)``, likewise.
        projected_b: the image of ``b`` under the projection, its shape; likewise.
        scaling: the adapter's scale, or one number for each of L adapters. While a CUDA graph is
            captured, the latter have to be a tensor on the adapters' device.

    Returns:
        ``(4,)`` float64 for tensors, ``(L, 4)`` for lists.

    Raises:
        ValueError: if lengths, shapes, dtypes or devices disagree, naming the argument.

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
    # A number stays on the host; one per adapter goes to where they are.
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
    """Refuse lists of unequal lengths and factors that make no adapter, as the C++ op does.

    ``spread``: adapters may be on devices of their own.
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
# Beside a weight


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
    """Return the weight that an adapter adds, ``scale * b @ a``; differentiable, by torch's GEMM.

    Args:
        a: ``(r, I)`` floating.
        b: ``(O, r)``.
        scale: the adapter's scale.

    Returns:
        ``(O, I)`` in the dtype of ``a``, accumulated in float32 (float64), rounded once.

    Raises:
        ValueError: if a shape or dtype disagrees, naming the argument.

    Source: LoRA (Hu et al. 2021), section 4.1.
    """
    _check("lora_delta", a, b)
    return _product(a, b, scale, accumulator(a.dtype)).to(a.dtype)


@torch.no_grad()
def lora_merge_(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, sign: int = 1) -> Tensor:
    """Add an adapter to a weight in place, ``weight += sign * scale * b @ a``, rounded once.

    Uses torch's GEMM. Subtracting an update again (``sign=-1``) does not restore every bit of a
    rounded weight; keep a copy if you need the exact values.

    Args:
        weight: ``(O, I)`` floating; comes back.
        a: ``(r, I)``.
        b: ``(O, r)``.
        scale: the adapter's scale.
        sign: 1 to merge, -1 to take out.

    Raises:
        ValueError: if a shape, a dtype or the sign is wrong, naming the argument.

    Source: LoRA (Hu et al. 2021), section 4.1.
    """
    _check("lora_merge_", a, b, weight)
    require(sign in (1, -1), "lora_merge_", "sign", "1 or -1", sign)
    dtype = accumulator(weight.dtype)
    return weight.copy_(_product(a, b, sign * scale, dtype).add_(weight.to(dtype)))


@torch.no_grad()
def lora_dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return the norm of every row of ``weight + scale * b @ a``; ``b @ a`` is not formed.

    ``|w|^2 + 2 scale <w a^T, b> + scale^2 <b (a a^T), b>`` per row, by torch's GEMM. Where the
    adapter all but cancels a row, the difference keeps an absolute error of a few roundings of
    ``|w|^2``: a norm of 1e-2 ``|w|`` is exact to 2e-3 of itself in float32, one of 1e-4 ``|w|`` is
    noise. A row of zeros in ``b`` gives the bits of ``torch.linalg.vector_norm``, with which PEFT's
    magnitudes begin.

    Args:
        weight: ``(O, I)`` floating.
        a: ``(r, I)``.
        b: ``(O, r)``.
        scale: the adapter's scale, a number or a tensor of one.

    Returns:
        ``(O,)`` float32 (float64 for float64).

    Raises:
        ValueError: if a shape or dtype disagrees, naming the argument.

    Source: DoRA (Liu et al. 2024), eq. 5.
    """
    _check("lora_dora_norm", a, b, weight)
    dtype = accumulator(weight.dtype)
    with exactly(weight.device):
        wide, wide_a, wide_b = weight.to(dtype), a.to(dtype), b.to(dtype)
        # torch annotates vector_norm not at all.
        norm = cast(Tensor, torch.linalg.vector_norm(wide, dim=1))  # pyright: ignore[reportUnknownMemberType]
        square = norm.square_()  # whose root gives the norm back
        square += 2 * scale * ((wide @ wide_a.T) * wide_b).sum(1)
        square += scale**2 * ((wide_b @ (wide_a @ wide_a.T)) * wide_b).sum(1)
        return square.clamp_(min=0).sqrt_()
