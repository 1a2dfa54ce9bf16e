"""Projection P of a layer onto the directions of its alignment ``V = Wa - W0``, applied to the
factor B without forming P or V."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import require

from .config import Projection, SploraConfig


class ZeroAlignmentError(ValueError):
    """Raised if the base and the aligned weight of a layer are equal, so that no direction of
    alignment is defined."""


@torch.no_grad()
def project_factor(
    B: Tensor,
    base_w: Tensor,
    aligned_w: Tensor,
    *,
    projection: Projection = "frobenius",
    rank: int | None = None,
    energy: float | None = None,
) -> Tensor:
    """Return ``P B``, the projection of B onto the directions in which alignment changed the
    weight.

    With ``V = aligned_w - base_w``, "frobenius" is ``P = V V^T / |V|_F``, and "orthogonal" is
    ``P = U_q U_q^T``. The columns of ``U_q`` are the left singular vectors of V with singular
    values above ``max(m, n) eps(float32)`` times the largest, at most as many as ``rank`` and
    ``energy`` allow. "frobenius" allocates at most an eighth of the bytes of a weight.

    Args:
        B: factor B, ``(m, r)`` floating.
        base_w: W0, ``(m, n)`` floating.
        aligned_w: Wa, ``(m, n)`` floating.
        projection, rank, energy: as in :class:`SploraConfig`.

    Returns:
        ``(m, r)`` on the device of B, in the widest dtype of the three tensors; computed in float64
        and rounded once.

    Raises:
        ZeroAlignmentError: If the two weights are equal.
        ValueError: If the shapes do not match, r is 0, a value is NaN or infinite, or an argument
            is out of range.
        TypeError: If a tensor is not floating: dequantise it first.

    Warns:
        UserWarning: If "orthogonal" keeps every direction, so that P is the identity.

    Source: arXiv 2506.18931; "orthogonal" is the ideal form of Safe LoRA (arXiv 2405.16833).
    """
    # SploraConfig requires a direction, but no layer is selected here.
    config = SploraConfig(direction="smallest", projection=projection, rank=rank, energy=energy)
    where = "project_factor"
    check_floating(where, B=B, base_w=base_w, aligned_w=aligned_w)
    check_shapes(where, B.shape, base_w.shape, aligned_w.shape)
    check_finite(where, B=B)
    projected = project_wide(where, B, base_w, aligned_w, config)
    if projected.is_identity:
        warn_of_identity(where, ["this layer"])
    dtype = torch.promote_types(torch.promote_types(B.dtype, base_w.dtype), aligned_w.dtype)
    return projected.columns.to(B.device, dtype)


class Projected(NamedTuple):
    """Projection of a layer's factor B, in float64 on the device of the computation."""

    columns: Tensor  # P B, (m, r)
    is_identity: bool  # True if P is the identity
    along: Tensor  # V^T B / |V|, (n, r)


def project_wide(
    where: str, b: Tensor, base: Tensor, aligned: Tensor, config: SploraConfig
) -> Projected:
    """Compute the float64 result of :func:`project_factor` from checked arguments. The values of
    the weights are checked here."""
    device = base.device if config.device is None else torch.device(config.device)
    pair = WeightPair(where, base, aligned, device)
    wide = b.to(device, torch.float64)
    inner, norm = pair.inner(wide)  # raises if V is zero or not finite
    along = inner / norm
    if config.projection == "frobenius":
        return Projected(pair.times(along), False, along)
    return Projected(*_orthogonal(pair, wide, inner, config), along)


def warn_of_identity(where: str, layers: list[str]) -> None:
    """Warn that the orthogonal projection changes nothing in these layers."""
    more = f" and {len(layers) - 4} more" if len(layers) > 4 else ""
    warnings.warn(
        f"{where}: projection: the alignment of {', '.join(layers[:4])}{more} has full row rank, "
        "so that 'orthogonal' is the identity and every distance is 0; set rank or energy",
        stacklevel=3,
    )


class WeightPair:
    """Difference ``V = Wa - W0`` of two weights ``(m, n)``, computed in float64 on a device in
    blocks of rows. A block has at most an eighth of a weight's bytes."""

    def __init__(self, where: str, base: Tensor, aligned: Tensor, device: torch.device):
        self.where, self.base, self.aligned, self.device = where, base, aligned, device

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)`` of either weight."""
        return self.base.shape[0], self.base.shape[1]

    def blocks(self, transposed: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Yield V, or its transpose, as float64 blocks of rows, each with the slice of its rows.
        Only one block is in memory at a time."""
        pair = [t.T if transposed else t for t in (self.aligned, self.base)]
        rows, width = pair[0].shape
        nbytes = min(t.nbytes for t in pair)
        step = max(1, nbytes // (8 * width * torch.float64.itemsize))
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            yield part, torch.sub(*(t[part].to(self.device, torch.float64) for t in pair))

    def inner(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``V^T b``, ``(n, r)``, and ``|V|_F``.

        Raises:
            ZeroAlignmentError: If V is zero.
            ValueError: If a weight contains NaN or infinity.
        """
        product = b.new_zeros(self.shape[1], b.shape[1])
        square = b.new_zeros(())
        for part, v in self.blocks():
            product.addmm_(v.T, b[part])
            square += torch.linalg.vector_norm(v).square()
        norm = square.sqrt().item()
        if norm == 0:
            raise ZeroAlignmentError(
                f"{self.where}: expected an aligned weight that differs from the base weight, "
                "found equal weights, which define no safe direction; "
                "SploraConfig(on_zero_alignment='skip') keeps such layers unscored"
            )
        if not math.isfinite(norm):
            check_finite(self.where, **{"base weight": self.base, "aligned weight": self.aligned})
        return product, square.sqrt()

    def times(self, factor: Tensor) -> Tensor:
        """Return the product ``(m, k)`` of V and a factor ``(n, k)``, float64."""
        return torch.cat([v @ factor for _, v in self.blocks()])


def _orthogonal(
    pair: WeightPair, b: Tensor, inner: Tensor, config: SploraConfig
) -> tuple[Tensor, bool]:
    """Return ``P b`` and whether P is the identity, from the eigenvectors of a Gram matrix.

    The Gram matrix squares the condition number. Float64 is precise enough for this, since
    eigenvalues below ``cut^2`` (at least 1e-14) times the largest one are not used.
    """
    m, n = pair.shape
    narrow = n < m  # The smaller one of V^T V and V V^T is computed.
    gram = torch.zeros(min(m, n), min(m, n), dtype=torch.float64, device=pair.device)
    for _, v in pair.blocks(transposed=not narrow):
        gram.addmm_(v.T, v)
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares.flip(0).clamp_(min=0), vectors.flip(1)  # in descending order
    cut = max(m, n) * torch.finfo(torch.float32).eps
    count = int((squares.sqrt() > cut * squares[0].sqrt()).sum())
    if config.energy is not None:
        share = squares.cumsum(0) / squares.sum()
        count = min(count, 1 + int((share < config.energy).sum()))
    if config.rank is not None:
        count = min(count, config.rank)
    vectors = vectors[:, :count]
    if not narrow:  # The eigenvectors are the columns of U_q.
        return vectors @ (vectors.T @ b), count == m
    # The eigenvectors W are right singular vectors: U_q = V W / sigma, U_q^T b = W^T V^T b / sigma.
    return pair.times(vectors @ ((vectors.T @ inner) / squares[:count, None])), False


# -------------------------------------------------------------------------------------------------
# Checks


def check_floating(where: str, **named: Tensor) -> None:
    """Raise TypeError if a tensor is quantised or not floating."""
    expected = "a tensor in float16, bfloat16, float32 or float64"
    for name, t in named.items():
        fits = isinstance(t, Tensor) and t.is_floating_point() and t.element_size() >= 2
        found = f"{t.dtype if isinstance(t, Tensor) else type(t).__name__}; dequantise it first"
        require(fits, where, name, expected, found, TypeError)


Shape = tuple[int, ...]


def check_shapes(where: str, b: Shape, base: Shape, aligned: Shape, a: Shape | None = None) -> None:
    """Raise ValueError unless factors ``(m, r)``, ``(r, n)`` and weights ``(m, n)`` have matching
    shapes."""
    factors = f"B {tuple(b)}" + (f" and A {tuple(a)}" if a is not None else "")
    a = (b[-1], base[-1]) if a is None and len(b) == len(base) == 2 else a
    base, aligned = tuple(base), tuple(aligned)
    if len(b) != 2 or a is None or len(a) != 2 or a[0] != b[1]:
        raise ValueError(f"{where}: expected B (m, r) and A (r, n) of equal rank, found {factors}")
    if b[1] == 0:
        raise ValueError(f"{where}: expected a rank of at least 1, found 0: {factors}")
    if base != aligned:
        expected = f"an aligned weight of the base weight's shape {base}"
        raise ValueError(f"{where}: expected {expected}, found {aligned}")
    if base != (b[0], a[1]):
        expected = f"weights of shape {(b[0], a[1])}, the shape of B A for {factors}"
        raise ValueError(f"{where}: expected {expected}, found {base}")


def check_finite(where: str, **named: Tensor) -> None:
    """Raise ValueError if a tensor contains NaN or infinity; check a few rows at a time."""
    for name, t in named.items():
        finite = all(bool(part.isfinite().all()) for part in t.split(max(1, len(t) // 8)))
        require(finite, where, name, "finite values", "NaN or infinity")
