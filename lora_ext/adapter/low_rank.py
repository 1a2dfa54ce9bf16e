"""``b @ a`` by its thin factors: cut to a smaller rank, or widened. The product is never formed."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .peft_files import Factors


def wide(factor: Tensor) -> Tensor:
    """A factor as a float64 matrix on the CPU; a convolution's kernel belongs to its inputs."""
    return factor.detach().flatten(1).to("cpu", torch.float64)


def norm_of(a: Tensor, b: Tensor) -> float:
    """The Frobenius norm of ``b @ a``; both are float64 matrices."""
    r_a, r_b = (torch.linalg.qr(t, mode="r").R for t in (a.T, b))
    return float((r_b @ r_a.T).norm())


def product_norm(factors: Factors) -> float | None:
    """The Frobenius norm of ``scaling * b @ a``; None: a grouped convolution is no such product."""
    if factors.a.shape[0] != factors.b.shape[1]:
        return None
    return abs(factors.scaling) * norm_of(wide(factors.a), wide(factors.b))


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest product of a rank.

    ``b = Q_b R_b``, ``a^T = Q_a R_a`` and ``R_b R_a^T = U S V^T``, an r x r matrix, give the
    singular values of ``b @ a``. The largest stay, ``sqrt(S)`` in either factor.

    Args:
        a: ``(r, I)`` float64. b: ``(O, r)`` float64.
        rank: how many to keep; where ``b @ a`` can have no more than q, q are kept.

    Returns:
        a, b, and the Frobenius norm of what was dropped.

    Source: Eckart and Young, 1936.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    dropped = math.sqrt(float(s[rank:].square().sum()))
    root = s[:rank].sqrt()
    return root[:, None] * (vh[: len(root)] @ q_a.T), q_b @ u[:, : len(root)] * root, dropped


def grown(a: Tensor, b: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same product with more ranks, which training can use.

    Args:
        a: ``(r, I)``. b: ``(O, r)``. They keep every bit.
        rank: at least r. New columns of b are 0, new rows of a are drawn as those of a new adapter
            are, from U(-1/sqrt(I), 1/sqrt(I)).
        generator: on the CPU.
    """
    missing = rank - a.shape[0]
    rows = torch.rand(missing, a.shape[1], generator=generator, dtype=torch.float32)
    rows = ((2 * rows - 1) / math.sqrt(max(1, a.shape[1]))).to(a.device, a.dtype)
    columns = torch.zeros(b.shape[0], missing, dtype=b.dtype, device=b.device)
    return torch.cat([a, rows]), torch.cat([b, columns], 1)


def widest(*tensors: Tensor) -> torch.dtype:
    """The dtype that holds the values of all of them; float32 where there is none."""
    dtypes = [tensor.dtype for tensor in tensors] or [torch.float32]
    return functools.reduce(torch.promote_types, dtypes)


def rounded(values: Tensor, like: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Float64 values as a factor in the place of ``like``.

    Raises:
        ValueError: a value that is finite is not so in ``dtype``.
    """
    found = values.to(dtype)
    if not bool(found.isfinite().all()):
        raise ValueError(f"{where}: expected values that {dtype} can hold, found larger ones")
    return found.to(like.device)


def check_matrices(factors: Factors, where: str) -> None:
    """Refuse factors whose product says nothing of the layer: NaN and infinity.

    Raises:
        ValueError: naming the factor.
        NotImplementedError: a grouped convolution, whose update is no product of two matrices.
    """
    a, b = factors.a, factors.b
    if a.shape[0] != b.shape[1]:
        raise NotImplementedError(
            f"{where}: expected as many rows of a as columns of b, found {a.shape[0]} and "
            f"{b.shape[1]}: a grouped convolution can be loaded and saved, and no more"
        )
    parts = {"a": a, "b": b, "bias": factors.bias, "magnitude": factors.magnitude}
    for name, values in parts.items():
        if values is not None and not bool(values.isfinite().all()):
            raise ValueError(f"{where}: {name}: expected finite values, found NaN or inf")
