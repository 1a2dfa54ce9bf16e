"""Inner products of adapters: Gram matrices of their factors, and what follows from them.

The product ``b a`` of an adapter is never formed. Nothing here takes part in autograd.

Letters: ``I`` in, ``O`` out, ``r`` the adapter's rank, ``L`` adapters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext.ops._autocast import exactly
from lora_ext.ops._checks import require, require_shape
from lora_ext.reference.lora import accumulator

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _named(argument: str, index: int | None) -> str:
    return argument if index is None else f"{argument}[{index}]"


def _check_lengths(op: str, count: int, **others: Sequence[object]) -> None:
    for name, values in others.items():
        require(len(values) == count, op, name, f"as many tensors as a, {count}", len(values))


def _check_factors(op: str, index: int | None, a: Tensor, **factors: Tensor) -> None:
    """Refuse what is no adapter: a ``(r, I)``, the others ``(O, r)``, on one device."""
    name = _named("a", index)
    require(a.dim() == 2, op, name, "shape (r, I)", list(a.shape))
    for other, t in factors.items():
        named = _named(other, index)
        fits = t.dim() == 2 and t.shape[1] == a.shape[0]
        require(fits, op, named, f"shape (O, r) with r = {a.shape[0]}", list(t.shape))
        require(t.device == a.device, op, named, f"a tensor on {a.device}", t.device)
    for named, t in ((name, a), *((_named(n, index), t) for n, t in factors.items())):
        known = " or ".join(map(str, FLOATS))
        require(t.dtype in FLOATS, op, named, known, t.dtype)


@torch.no_grad()
def lora_gram(
    a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return ``a @ a^T`` and ``b^T @ b`` of every adapter.

    Inner products of adapters need no more than these: ``<b1 a1, b2 a2>`` and norms of ``b a`` cost
    ``r^2`` once they are known. Gram matrices square the condition number: small singular values
    need float64, and the smallest a QR of the factors.

    Args:
        a: ``(r, I)`` each; ranks and widths may differ.
        b: ``(O, r)`` each, as many as ``a``.
        dtype: in which to add and return, float32 or float64; by default float32, and float64 for
            factors in float64.

    Returns:
        Two lists of ``(r, r)``.

    Raises:
        ValueError: if lengths, shapes, dtypes or devices disagree, naming the argument.
    """
    known = dtype is None or dtype in (torch.float32, torch.float64)
    require(known, "lora_gram", "dtype", "None, torch.float32 or torch.float64", dtype)
    _check_lengths("lora_gram", len(a), b=b)
    grams: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index, (a_s, b_s) in enumerate(zip(a, b, strict=True)):
        _check_factors("lora_gram", index, a_s, b=b_s)
        with exactly(a_s.device):
            wide = dtype or accumulator(torch.promote_types(a_s.dtype, b_s.dtype))
            wide_a, wide_b = a_s.to(wide), b_s.to(wide)
            grams[0].append(wide_a @ wide_a.T)
            grams[1].append(wide_b.T @ wide_b)
    return grams


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
        a: ``(r, I)``, or one such tensor for each of L adapters; ranks and widths may differ.
        b: ``(O, r)``, likewise.
        projected_b: the image of ``b`` under the projection, its shape; likewise.
        scaling: the adapter's scale, or one number for each of L adapters.

    Returns:
        ``(4,)`` float64 for tensors, ``(L, 4)`` for lists.

    Raises:
        ValueError: if lengths, shapes, dtypes or devices disagree, naming the argument.

    Source: docs/lora.md, "Inner products of adapters".
    """
    op = "lora_pair_stats"
    single = isinstance(a, Tensor)
    lists = [[t] if isinstance(t, Tensor) else list(t) for t in (a, b, projected_b)]
    count = len(lists[0])
    _check_lengths(op, count, b=lists[1], projected_b=lists[2])
    scales = _scales(op, scaling, count)
    rows: list[Tensor] = []
    for index, (a_s, b_s, p_s) in enumerate(zip(*lists, strict=True)):
        named = None if single else index
        _check_factors(op, named, a_s, b=b_s, projected_b=p_s)
        require_shape(op, _named("projected_b", named), p_s, "(O, r)", b_s.shape)
        with exactly(a_s.device):
            wide_a, wide_b, wide_p = a_s.double(), b_s.double(), p_s.double()
            gram, moved = wide_a @ wide_a.T, wide_p - wide_b
            pairs = ((wide_b, wide_b), (wide_p, wide_p), (wide_p, wide_b), (moved, moved))
            rows.append(torch.stack([((x.T @ y) * gram).sum() for x, y in pairs]))
    if not rows:
        return scales.new_zeros(0, 4)
    stats = torch.stack(rows) * scales.to(rows[0].device).square()[:, None]  # (L, 4)
    return stats[0] if single else stats


def _scales(op: str, scaling: float | Sequence[float] | Tensor, count: int) -> Tensor:
    """One float64 number per adapter."""
    scales = torch.as_tensor(scaling, dtype=torch.float64)
    if scales.dim() == 0:
        return scales.expand(count)
    require_shape(op, "scaling", scales, "(L,)", (count,))
    return scales
