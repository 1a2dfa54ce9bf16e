"""Norms, truncation and padding of low-rank products, and new random rows for zero rows.

The product of the factors a ``(r, I)`` and b ``(O, r)`` is ``b @ a``. It is never formed.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lora_ext._checks import require
from lora_ext.kinds import Factors

#: Root mean square of the norm of a new row of A, drawn from ``U(-1/sqrt(I), 1/sqrt(I))``.
DRAWN_ROW_NORM = 3**-0.5


def wide(factor: Tensor) -> Tensor:
    """Return a factor as a float64 matrix on the CPU. All dimensions of a convolution's kernel
    except the first are flattened."""
    return factor.detach().flatten(1).to("cpu", torch.float64)


def core(a: Tensor, b: Tensor) -> Tensor:
    """Return an r x r matrix with the same nonzero singular values as ``b @ a``."""
    r_a, r_b = (torch.linalg.qr(t, mode="r").R for t in (a.T, b))
    return r_b @ r_a.T


def norm_of(a: Tensor, b: Tensor) -> float:
    """Return the Frobenius norm of ``b @ a``; ``a`` and ``b`` are float64 matrices."""
    return float(core(a, b).norm())


def product_norm(factors: Factors) -> float | None:
    """Return the Frobenius norm of ``scaling * b @ a``, or None for a grouped convolution."""
    if factors.a.shape[0] != factors.b.shape[1]:
        return None
    return abs(factors.scaling) * norm_of(wide(factors.a), wide(factors.b))


def truncated(a: Tensor, b: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Return the factors of the best approximation of ``b @ a`` of rank at most ``rank``, and the
    Frobenius norm of the difference.

    The singular values S of ``b @ a`` are computed from ``b = Q_b R_b``, ``a^T = Q_a R_a`` and the
    decomposition ``R_b R_a^T = U S V^T`` of an r x r matrix. Each factor contains ``sqrt(S)`` for
    the largest values. A value within the rounding error of float64 becomes 0 in both factors;
    :func:`able_to_learn` can then draw the row of A. A value within the rounding error of ``dtype``
    would give a row of A, a column of B and gradients that are close to 0. The row of A is
    therefore scaled to the norm of a drawn row, and the column of B such that the product does not
    change. This is our choice.

    Args:
        a, b: factors, ``(r, I)`` and ``(O, r)`` float64.
        rank: maximum rank of the approximation.
        dtype: dtype in which the factors were stored.

    Source: Eckart and Young, 1936.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    sizes = a.norm(dim=1) * b.norm(dim=0)  # (r,), norms of the terms of ``b @ a``, which may cancel
    # Bound of the rounding error of QR and SVD.
    noise = torch.finfo(s.dtype).eps * max(len(b), a.shape[1]) * float(sizes.sum())
    kept = s[:rank].where(s[:rank] > noise, 0)
    dropped = math.hypot(float(s[rank:].norm()), float((s[:rank] - kept).norm()))
    root = kept.sqrt()
    # The rounding errors of the r terms are independent, so their squares add up.
    near_zero = (kept > 0) & (kept <= torch.finfo(dtype).eps * float(sizes.norm()))
    row = root.where(~near_zero, root.clamp(min=DRAWN_ROW_NORM))
    column = root.where(~near_zero, kept / row)
    return row[:, None] * (vh[: len(root)] @ q_a.T), q_b @ u[:, : len(root)] * column, dropped


def padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return both factors padded with zeros to ``rank``. Their product does not change."""
    missing = rank - len(a)
    if missing == 0:
        return a, b
    return (
        torch.cat([a, a.new_zeros(missing, *a.shape[1:])]),
        torch.cat([b, b.new_zeros(len(b), missing, *b.shape[2:])], 1),
    )


def asleep(a: Tensor, b: Tensor) -> Tensor:
    """Return for each rank whether both the row of A and the column of B are 0, ``(r,)`` bool."""
    return ~(a.flatten(1).any(1) | b.transpose(0, 1).flatten(1).any(1).to(a.device))


def able_to_learn(a: Tensor, b: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return A with random rows for the ranks that training could not change. ``b @ a`` does not
    change.

    The gradient of a row of A is 0 if the column of B is 0, and the gradient of the column is 0 if
    the row is 0. If both are 0, training changes neither. The row is therefore drawn from
    ``U(-1/sqrt(I), 1/sqrt(I))``, as in a new adapter, and the column stays 0. All functions that
    create factors call this function at the end. This is our choice.

    Args:
        a, b: factors, ``(r, I)`` and ``(O, r)``, or a convolution's kernels. Pass them in the dtype
            in which they are stored, since rounding can produce zeros.
        generator: generator on the CPU; default is a generator of seed 0.

    Returns:
        a copy of A with the new rows, or ``a`` if no row is drawn.
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
    """Return two factors with a new rank, and the error of their product.

    A smaller rank gives the best approximation of the product. A larger rank does not change the
    product.

    Args:
        where: prefix of error messages.
        a, b: factors, ``(r, I)`` and ``(O, r)``, with finite values.
        rank: new rank. If it exceeds r, zeros are appended to b and random rows to a.
        generator: generator of the random rows, see :func:`able_to_learn`.

    Returns:
        a and b in their dtypes, and the Frobenius norm of the change of the product.

    Raises:
        ValueError: If a value overflows the dtype.
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
    """Return the dtype to which all tensors can be promoted; float32 if there are no tensors."""
    dtypes = [tensor.dtype for tensor in tensors] or [torch.float32]
    return functools.reduce(torch.promote_types, dtypes)


class TooLarge(ValueError):
    """Error that is raised if a value overflows the dtype of the result."""


def rounded(values: Tensor, like: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Convert float64 values to ``dtype``, on the device of ``like``; raise :class:`TooLarge` if
    one overflows."""
    found = values.to(dtype)
    if not bool(found.isfinite().all()):
        largest = values.abs().max().item()
        raise TooLarge(f"{where}: expected values that {dtype} can hold, found {largest:.6g}")
    return found.to(like.device)


def check_matrices(factors: Factors, where: str) -> None:
    """Raise if a factor contains NaN or infinity, or belongs to a grouped convolution. The update
    of a grouped convolution is not a product of two matrices."""
    a, b = factors.a, factors.b
    expected = f"{a.shape[0]} columns, one per row of a (a grouped convolution can only be loaded "
    expected += "and saved)"
    require(a.shape[0] == b.shape[1], where, "b", expected, b.shape[1], NotImplementedError)
    for name, values in factors.tensors.items():
        require(bool(values.isfinite().all()), where, name, "finite values", "NaN or inf")
