"""Comparison of two adapters, module by module.

The update of a module is ``D = scaling * B A``, with the factors A ``(r, I)`` and B ``(O, r)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_ext._checks import require
from lora_ext.kinds import Factors

from ._low_rank import check_matrices, norm_of, wide
from ._peft_files import AdapterSource
from ._value import LoraAdapter

# Singular values above this fraction of the largest one count as nonzero. The fraction exceeds the
# rounding error of float32.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ModuleDifference:
    """Difference between the updates ``D = scaling * B A`` of one module.

    Attributes:
        module: name of the module in the base model.
        ranks: ranks in the two adapters; 0 if an adapter lacks the module.
        norms: Frobenius norms of the two updates.
        distance: Frobenius norm ``||D_1 - D_2||``.
        cosine: ``<D_1, D_2> / (||D_1|| ||D_2||)``; None if an update is zero.
        angles: principal angles between the column spaces of the two updates, in radians and in
            ascending order. An angle of 0 belongs to a direction that both spaces contain, and
            pi / 2 to a direction that is orthogonal to the other space. The number of angles is the
            smaller dimension of the two spaces.
    """

    module: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    distance: float
    cosine: float | None
    angles: tuple[float, ...]


@torch.no_grad()
def compare_adapters(
    first: LoraAdapter | AdapterSource,
    second: LoraAdapter | AdapterSource,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> list[ModuleDifference]:
    """Measure the difference between two adapters of the same base model, module by module.

    All values are computed from the factors, without forming the updates, in float64 on the CPU.
    Biases and magnitudes are ignored.

    Args:
        first, second: adapters, as values, folders, or (config, state dict).
        progress: function that wraps the list of module names, as ``tqdm`` does.

    Returns:
        one entry for each module that at least one adapter has: first the modules of ``first`` in
        its order, then the modules that only ``second`` has.

    Raises:
        ValueError: If the shapes of a module differ, or values are not finite.
        NotImplementedError: If a module is a grouped convolution.

    Source: Bjorck and Golub, "Numerical methods for computing angles between linear subspaces",
    1973.
    """
    values = LoraAdapter.of(first), LoraAdapter.of(second)
    names = list(dict.fromkeys(name for value in values for name in value.modules))
    found = []
    for name in progress(names):
        pair = [value.modules.get(name) for value in values]
        for label, factors in zip(("first", "second"), pair, strict=True):
            if factors is not None:
                check_matrices(factors, f"compare_adapters: {label}: {name}")
        found.append(_compared(name, *pair))
    return found


def _compared(name: str, first: Factors | None, second: Factors | None) -> ModuleDifference:
    known = first or second
    assert known is not None  # one of the adapters has the module
    (a, b), (other_a, other_b) = (_matrices(f, known) for f in (first, second))
    sizes, found = ((x.shape[1], y.shape[0]) for x, y in ((a, b), (other_a, other_b)))
    expected = f"{sizes[0]} inputs and {sizes[1]} outputs, as in first"
    where = "compare_adapters: second"
    require(sizes == found, where, name, expected, f"{found[0]} and {found[1]}")
    norms = norm_of(a, b), norm_of(other_a, other_b)
    same = torch.equal(a, other_a) and torch.equal(b, other_b)
    both = norms[0] * norms[1]
    inner = float(((b.T @ other_b) * (a @ other_a.T)).sum())
    return ModuleDifference(
        name,
        (a.shape[0], other_a.shape[0]),
        norms,
        0.0 if same else norm_of(torch.cat([a, other_a]), torch.cat([b, -other_b], 1)),
        max(-1.0, min(1.0, inner / both)) if both else None,
        _angles(_columns(a, b), _columns(other_a, other_b)),
    )


def _matrices(factors: Factors | None, like: Factors) -> tuple[Tensor, Tensor]:
    """Return ``a`` and ``scaling * b``, or matrices of rank 0 for a missing module."""
    if factors is None:
        return wide(like.a)[:0], wide(like.b)[:, :0]
    return wide(factors.a), factors.scaling * wide(factors.b)


def _columns(a: Tensor, b: Tensor) -> Tensor:
    """Return an orthonormal basis of the column space of ``b @ a``."""
    q, r_b = torch.linalg.qr(b)
    r_a = torch.linalg.qr(a.T, mode="r").R
    u, s, _ = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    counts = s > _TOLERANCE * s.max() if len(s) and float(s.max()) > 0 else s > 0
    return q @ u[:, counts]


def _angles(first: Tensor, second: Tensor) -> tuple[float, ...]:
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    if second.shape[1] == 0:
        return ()
    across = first.T @ second
    cosines = torch.linalg.svdvals(across)
    sines = torch.linalg.svdvals(second - first @ across).flip(0)  # accurate if cosines are near 1
    angles = torch.atan2(sines, cosines).clamp(max=math.pi / 2)
    return tuple(angles.tolist())
