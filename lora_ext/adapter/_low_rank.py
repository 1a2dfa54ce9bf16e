"""Low-rank products ``b @ a``: norms, truncation, padding, and new rows for ranks that are zero.

The product is never formed.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lora_ext._checks import require

from ._peft_files import Factors

#: Root mean square of the norm of a row of a new A, drawn from ``U(-1/sqrt(I), 1/sqrt(I))``.
DRAWN_ROW_NORM = 3**-0.5


def wide(factor: Tensor) -> Tensor:
    """Return a factor as a float64 matrix on the CPU; kernel dimensions count as inputs."""
    return factor.detach().flatten(1).to("cpu", torch.float64)


def core(a: Tensor, b: Tensor) -> Tensor:
    """Return an r x r matrix with the singular values of ``b @ a``."""
    r_a, r_b = (torch.linalg.qr(t, mode="r").R for t in (a.T, b))
    return r_b @ r_a.T


def norm_of(a: Tensor, b: Tensor) -> float:
    """Return the Frobenius norm of ``b @ a``; both are float64 matrices."""
    return float(core(a, b).norm())


def product_norm(factors: Factors) -> float | None:
    """Return the Frobenius norm of ``scaling * b @ a``, or None for a grouped convolution."""
    if factors.a.shape[0] != factors.b.shape[1]:
        return None
    return abs(factors.scaling) * norm_of(wide(factors.a), wide(factors.b))


def truncated(a: Tensor, b: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Return the factors of the best approximation of ``b @ a`` of rank at most ``rank``, and the
    Frobenius norm of the difference.

    ``b = Q_b R_b``, ``a^T = Q_a R_a`` and ``R_b R_a^T = U S V^T``, an r x r matrix, give the
    singular values of ``b @ a``. Each factor contains ``sqrt(S)`` of the largest values. A value
    within the rounding error of float64 is 0 in both factors, and :func:`able_to_learn` draws its
    row. A value within the rounding error of ``dtype`` would leave a row of A, a column of B and
    their gradients near 0. Its row of A therefore gets the norm of a drawn row, and its column of B
    the rest of the value. Our choice.

    Args:
        a, b: ``(r, I)`` and ``(O, r)`` float64.
        dtype: dtype that the factors were stored in.

    Source: Eckart and Young, 1936.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    sizes = a.norm(dim=1) * b.norm(dim=0)  # (r,), of the products of single ranks, which may cancel
    # Bound of the error of QR and SVD.
    noise = torch.finfo(s.dtype).eps * max(len(b), a.shape[1]) * float(sizes.sum())
    kept = s[:rank].where(s[:rank] > noise, 0)
    dropped = math.hypot(float(s[rank:].norm()), float((s[:rank] - kept).norm()))
    root = kept.sqrt()
    # The rounding errors of the ranks are independent, so their squares add up.
    near_zero = (kept > 0) & (kept <= torch.finfo(dtype).eps * float(sizes.norm()))
    row = root.where(~near_zero, root.clamp(min=DRAWN_ROW_NORM))
    column = root.where(~near_zero, kept / row)
    return row[:, None] * (vh[: len(root)] @ q_a.T), q_b @ u[:, : len(root)] * column, dropped


def padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Pad the factors with zeros to ``rank``; their product does not change."""
    missing = rank - len(a)
    if missing == 0:
        return a, b
    return (
        torch.cat([a, a.new_zeros(missing, *a.shape[1:])]),
        torch.cat([b, b.new_zeros(len(b), missing, *b.shape[2:])], 1),
    )


def asleep(a: Tensor, b: Tensor) -> Tensor:
    """Return, as ``(r,)`` bool, whether both a rank's row of A and column of B are 0."""
    return ~(a.flatten(1).any(1) | b.transpose(0, 1).flatten(1).any(1).to(a.device))


def able_to_learn(a: Tensor, b: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return A with new rows for the ranks that could not learn; ``b @ a`` does not change.

    The gradient of a row of A is a multiple of the column of B, and that of the column a multiple
    of the row. If both are 0, training never changes them. Such a row is drawn like those of a new
    adapter, from ``U(-1/sqrt(I), 1/sqrt(I))``, and the column stays 0. Every function that creates
    factors ends with this call. Our choice.

    Args:
        a, b: ``(r, I)`` and ``(O, r)``, or a convolution's kernels, in their stored dtype, since
            rounding can produce zeros. If nothing is drawn, ``a`` itself is returned.
        generator: on the CPU; default is one of seed 0.
    """
    lost = asleep(a, b)
    count = int(lost.sum())
    if count == 0:
        return a
    generator = generator or torch.Generator().manual_seed(0)
    rows = 2 * torch.rand(count, *a.shape[1:], generator=generator, dtype=torch.float32) - 1
    found = a.clone()
    found[lost] = (rows / math.sqrt(max(1, a[0].numel()))).to(a.device, a.dtype)
    return found


def resized(
    where: str, a: Tensor, b: Tensor, rank: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, float]:
    """Change the rank of two factors; the product stays, or becomes the best approximation.

    Args:
        where: prefix of error messages.
        a, b: ``(r, I)`` and ``(O, r)``, finite.
        rank: above r, all values stay, and the new ranks are those of a new adapter.
        generator: see :func:`able_to_learn`.

    Returns:
        a and b in their dtypes (`ValueError` if a value overflows), and the Frobenius norm of the
        change of the product.
    """
    error = 0.0
    if rank < len(a):
        coarser = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        near_a, near_b, error = truncated(wide(a), wide(b), rank, coarser)
        a = rounded(near_a, a, a.dtype, f"{where}: a")
        b = rounded(near_b, b, b.dtype, f"{where}: b")
    a, b = padded(a, b, rank)
    return able_to_learn(a, b, generator), b, error


def widest(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that holds the values of all tensors; float32 without tensors."""
    dtypes = [tensor.dtype for tensor in tensors] or [torch.float32]
    return functools.reduce(torch.promote_types, dtypes)


def rounded(values: Tensor, like: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Return float64 values in ``dtype`` on the device of ``like``; raise if one overflows."""
    found = values.to(dtype)
    if not bool(found.isfinite().all()):
        largest = values.abs().max().item()
        raise ValueError(f"{where}: expected values that {dtype} can hold, found {largest:.6g}")
    return found.to(like.device)


def check_matrices(factors: Factors, where: str) -> None:
    """Raise for NaN or infinity, and for a grouped convolution, since its update is not a product
    of two matrices."""
    a, b = factors.a, factors.b
    expected = f"as many columns as a has rows, {a.shape[0]} (a grouped convolution can only be "
    expected += "loaded and saved)"
    require(a.shape[0] == b.shape[1], where, "b", expected, b.shape[1], NotImplementedError)
    parts = {"a": a, "b": b, "bias": factors.bias, "magnitude": factors.magnitude}
    for name, values in parts.items():
        finite = values is None or bool(values.isfinite().all())
        require(finite, where, name, "finite values", "NaN or inf")
