"""Effective ranks: numbers of directions that an adapter uses, computed from singular values.

The update of a module is ``scaling * B A`` with A ``(r, n)`` and B ``(m, r)``: rank r, n inputs and
m outputs of the module. The update is never formed; only r x r matrices are decomposed. All values
are computed in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import choice, integer, number, require
from lora_ext.ops import lora_gram

from ._low_rank import core
from ._matrices import Source, check_floating, factor_matrices

METHODS = ("qr", "gram")
#: Smallest threshold with method "gram", since Gram matrices square the condition number.
GRAM_TAU = 1e-3
_BY_GRAM = ("threshold", "stable", "participation")
_BY_TAU = ("threshold", "absolute")

# Functions that compute the kinds of effective rank. The arguments are the singular values in
# descending order (the first is above 0), tau and k.
_RANKS: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "threshold": lambda s, tau, k: (s / s[0] > tau).sum(),
    "absolute": lambda s, tau, k: (s > tau).sum(),
    "entropy": lambda s, tau, k: _perplexity(s / s[0]),
    "entropy_energy": lambda s, tau, k: _perplexity((s / s[0]).square()),
    "stable": lambda s, tau, k: (s / s[0]).square().sum(),
    "participation": lambda s, tau, k: _participation((s / s[0]).square()),
    "top_k_share": lambda s, tau, k: (s / s[0])[:k].sum() / (s / s[0]).sum(),
}
KINDS = tuple(_RANKS)


def lora_singular_values(a: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
    """Return the singular values of ``scaling * b @ a`` in descending order.

    The values are computed from ``R_b R_a^T``, which has the same singular values, with the QR
    decompositions ``b = Q_b R_b`` and ``a^T = Q_a R_a``.

    Args:
        a: factor ``(r, n)`` of a floating dtype, on any device.
        b: factor ``(m, r)`` of a floating dtype, on any device.
        scaling: scale of the update. Its sign is ignored.

    Returns:
        tensor ``(min(r, m, n),)`` of float64 on the CPU.

    Raises:
        ValueError: If shapes do not fit or are empty, or values are NaN or infinite.
        TypeError: If a factor is not a floating-point tensor.
    """
    where = "lora_singular_values"
    return _spectrum(*_factors(where, a, b), abs(number(where, "scaling", scaling)))


def effective_rank(
    a: Tensor,
    b: Tensor | None = None,
    kind: str = "entropy",
    tau: float = 1e-3,
    k: int = 5,
    scaling: float = 1.0,
    method: str = "qr",
) -> float | int:
    """Return the effective rank of ``scaling * b @ a``, or of one dense matrix.

    The rank measures how many directions the matrix uses. For singular values ``s_1 >= s_2 >= ..``:

    ================ ================================================================
    kind             returned value
    ================ ================================================================
    "threshold"      number of i with ``s_i / s_1 > tau``
    "absolute"       number of i with ``s_i > tau``; the only kind that depends on ``scaling``
    "entropy"        ``exp(-sum p_i ln p_i)``, ``p_i = s_i / sum s``
    "entropy_energy" ``exp(-sum p_i ln p_i)``, ``p_i = s_i^2 / sum s^2``
    "stable"         ``sum s^2 / s_1^2``
    "participation"  ``(sum s^2)^2 / sum s^4``
    "top_k_share"    ``(s_1 + ... + s_k) / sum s``
    ================ ================================================================

    ``1 <= stable <= participation <= entropy_energy <= entropy <= rank``. All kinds are 0 if the
    update is zero, as in a new adapter.

    Args:
        a: factor ``(r, n)`` of a floating dtype; without ``b``, a dense matrix ``(m, n)``.
        b: factor ``(m, r)`` of a floating dtype.
        kind: kind of effective rank, see the table.
        tau: threshold of "threshold", between 0 and 1, or of "absolute", above 0.
        k: number of singular values for "top_k_share".
        scaling: scale of the update.
        method: "qr" or "gram". "gram" computes the singular values from ``a a^T`` and ``b^T b``,
            which loses half of the digits. "gram" supports "threshold" with tau of at least 1e-3,
            "stable", and "participation" (without any decomposition).

    Returns:
        an int for "threshold" and "absolute", a float for other kinds.

    Raises:
        ValueError: If an argument is out of range or ``method`` does not support it, if shapes do
            not fit or are empty, or if values are NaN or infinite.
        TypeError: If a factor is not a floating-point tensor.

    Sources: "entropy": Roy and Vetterli, "The effective rank: a measure of effective
    dimensionality" (EUSIPCO 2007); "threshold", "absolute" and "top_k_share": the code of "Planning
    vs Reasoning" (arXiv 2412.00029).
    """
    where = "effective_rank"
    choice(where, "kind", kind, KINDS)
    _check_tau(where, "tau", tau, relative=kind != "absolute")
    integer(where, "k", k, 1, expected="at least 1")
    choice(where, "method", method, METHODS)
    scale = abs(number(where, "scaling", scaling))
    if b is None:
        check_floating(where, "a", a)
        holds = a.dim() == 2 and a.numel() > 0
        require(holds, where, "a", "a matrix that is not empty", tuple(a.shape))
        dense = _finite(where, "a", a)
        if method == "qr":
            return _rank(torch.linalg.svdvals(dense) * scale, kind, tau, k)
        wide_a = dense if dense.shape[0] < dense.shape[1] else dense.T
        wide_b = torch.eye(wide_a.shape[0], dtype=torch.float64)
    else:
        wide_a, wide_b = _factors(where, a, b)
    if method == "qr":
        return _rank(_spectrum(wide_a, wide_b, scale), kind, tau, k)
    require(kind in _BY_GRAM, where, "kind", f"one of {_BY_GRAM} for method 'gram'", repr(kind))
    reaches = kind != "threshold" or tau >= GRAM_TAU
    require(reaches, where, "tau", f"at least {GRAM_TAU} for method 'gram'", tau)
    (gram_a,), (gram_b,) = lora_gram([wide_a], [wide_b])
    if kind == "participation":
        return gram_figures(gram_a, gram_b)[1].item() if scale else 0.0
    size = min(wide_a.shape[0], wide_a.shape[1], wide_b.shape[0])
    return _rank(_gram_spectrum(gram_a, gram_b)[:size] * scale, kind, tau, k)


def gram_figures(gram_a: Tensor, gram_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Frobenius norm ``||b a||`` and the participation rank, from Gram matrices.

    No decomposition is needed: the singular values s of ``b a`` satisfy
    ``sum s^2 = trace(G_b G_a)`` and ``sum s^4 = trace(G_b G_a G_b G_a)``.

    Args:
        gram_a: ``G_a = a a^T``, ``(r, r)`` of a floating dtype, with any leading dimensions.
        gram_b: ``G_b = b^T b``, of the same shape.

    Returns:
        two float64 tensors with the shape of the leading dimensions, on the device of the Gram
        matrices. Both are zero if the product is zero.
    """
    gram_a, gram_b = gram_a.double(), gram_b.double()
    square = (gram_a * gram_b).sum((-2, -1)).clamp(min=0)  # trace(G_b G_a): both are symmetric
    # G_b is divided by ``sum s^2``, since fourth powers of small singular values may underflow.
    product = (gram_b / square.clamp(min=torch.finfo(torch.float64).tiny)[..., None, None]) @ gram_a
    fourth = (product * product.mT).sum((-2, -1))
    rank = torch.where(fourth > 0, 1 / fourth, 0).clamp(max=gram_a.shape[-1])
    return square.sqrt(), torch.where(square > 0, rank.clamp(min=1), 0)


@dataclass(frozen=True)
class RankReport(Sequence[Mapping[str, Any]]):
    """Result of :func:`rank_report`, a sequence of one mapping per module of an adapter.

    Attributes:
        rows: the mappings. Each contains ``module``, the name of the module; ``r``, its rank;
            ``shape``, the shape ``(m, n)`` of the update; ``fro``, the Frobenius norm of the scaled
            update; and one entry for each kind, such as ``"entropy"``, or for each kind and
            threshold, such as ``"threshold@0.001"``.
    """

    rows: tuple[Mapping[str, Any], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Return one row, or a tuple of rows for a slice."""
        return self.rows[index]

    def to_table(self) -> str:
        """Format the report as a table with a heading and one line per module."""
        names = list(self.rows[0]) if self.rows else ["module"]
        return aligned([names, *([_cell(row[name]) for name in names] for row in self.rows)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Format lines of cells as a table. The first column is left-aligned, all others are
    right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        [text.rjust(width) if i else text.ljust(width) for i, (text, width) in enumerate(cells)]
        for cells in (zip(line, widths, strict=True) for line in lines)
    )
    return "\n".join("  ".join(line).rstrip() for line in padded)


def rank_report(
    source: Source,
    adapter_name: str = "default",
    kinds: Iterable[str] = ("threshold", *KINDS[2:]),
    taus: Iterable[float] = (1e-1, 1e-2, 1e-3),
    k: int = 5,
    layout: str = "r_in",
) -> RankReport:
    """Compute the norm and the effective ranks of the update of every module of an adapter.

    Args:
        source: a :class:`LoraAdapter`; a model with adapters of PEFT or of this package; a folder
            in PEFT's format; (config, state dict); or a state dict alone, for which scaling is 1.
            Names in a state dict are PEFT's (adapter name and ``base_model.model.`` are optional)
            or the paper's code's (``<module>.lora_layer.lora_A``). Other tensors are skipped.
        adapter_name: name of the adapter in a model, or in a state dict with adapter names.
        kinds: kinds of effective rank, see :func:`effective_rank`.
        taus: thresholds for "threshold" and "absolute". Each of these two kinds has one entry per
            threshold.
        k: number of singular values for "top_k_share".
        layout: "r_in" for A ``(r, n)`` and B ``(m, r)``; "in_r", only for a state dict, for A
            ``(n, r)`` and B ``(r, m)``, as in the paper's code.

    Returns:
        a report with one row per module, in the order of the source. Biases, and scales of outputs
        such as DoRA's, are ignored.

    Raises:
        KeyError: If a module lacks one of its two factors. The message contains its name.
        ValueError: If there is no adapter with this name, if an argument is out of range, if shapes
            do not fit, or if values are NaN or infinite.
        TypeError: If a factor does not have a floating dtype.

    Source: "Planning vs Reasoning: Ablations to Test Capabilities of LoRA layers" (arXiv
    2412.00029).
    """
    where = "rank_report"
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    taus = tuple(taus)
    for kind in kinds:
        choice(where, "kinds", kind, KINDS)
    for tau in taus:
        _check_tau(where, "taus", tau, relative=kinds != ("absolute",))
    integer(where, "k", k, 1, expected="at least 1")
    rows: list[Mapping[str, Any]] = []
    for name, (a, b, scaling) in factor_matrices(where, source, adapter_name, layout).items():
        wide_a, wide_b = _factors(f"{where}: {name}", a, b)
        scale = number(f"{where}: {name}", "scaling", float(scaling))  # may be a tensor in PEFT
        spectrum = _spectrum(wide_a, wide_b, abs(scale))
        row: dict[str, Any] = {
            "module": name,
            "r": a.shape[0],
            "shape": (b.shape[0], a.shape[1]),
            "fro": spectrum.norm().item(),
        }
        for kind in kinds:
            if kind in _BY_TAU:
                row |= {f"{kind}@{tau:g}": _rank(spectrum, kind, tau, k) for tau in taus}
            else:
                row[kind] = _rank(spectrum, kind, GRAM_TAU, k)
        rows.append(row)
    return RankReport(tuple(rows))


def _spectrum(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.linalg.svdvals(core(a, b)) * scale


def _gram_spectrum(gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """Return the singular values of ``b a`` in descending order, as square roots of the eigenvalues
    of ``G_b^(1/2) G_a G_b^(1/2)``."""
    values, vectors = torch.linalg.eigh(gram_b)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return torch.linalg.eigvalsh(root @ gram_a @ root).clamp(min=0).sqrt().flip(0)


def _rank(spectrum: Tensor, kind: str, tau: float, k: int) -> float | int:
    counts = kind in _BY_TAU
    if spectrum[0] == 0:
        return 0 if counts else 0.0
    return _RANKS[kind](spectrum, tau, k).item()


def _perplexity(weights: Tensor) -> Tensor:
    return torch.special.entr(weights / weights.sum()).sum().exp()


def _participation(squares: Tensor) -> Tensor:
    return squares.sum().square() / squares.square().sum()


def _factors(where: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for name, t in (("a", a), ("b", b)):
        check_floating(where, name, t)
    fits = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] and a.numel() and b.numel()
    expected, found = "shapes (r, n) and (m, r), neither empty", map(tuple, (a.shape, b.shape))
    require(fits, where, "a and b", expected, " and ".join(map(str, found)))
    return _finite(where, "a", a), _finite(where, "b", b)


def _finite(where: str, name: str, t: Tensor) -> Tensor:
    """Return ``t`` in float64 on the CPU; raise for NaN or infinity."""
    wide = t.detach().to("cpu", torch.float64)
    require(bool(wide.isfinite().all()), where, name, "finite values", "NaN or inf")
    return wide


def _check_tau(where: str, argument: str, tau: float, relative: bool) -> None:
    expected = "a threshold above 0" + (" and below 1" if relative else "")
    number(where, argument, tau, above=0, below=1 if relative else None, expected=expected)


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
