"""Multivariate Gaussians as leaves: each distribution is over all variables of a region.

Rows of data with the same missing variables use the same matrices, so they are computed together.

Letters: those of ``_leaves``; ``d`` variables of a region, ``M`` blocks of ``K`` units. Inside this
module, ``E`` rows of data each have an owner: the block or distribution that evaluates the row.

All queries use one factorisation. Let ``L`` be the Cholesky factor of the covariance, with its rows
sorted so that the observed variables are first, and ``Q R`` the QR decomposition of ``L^T``. Then
``R^T`` is the Cholesky factor of the covariance in this order, ``[[A, 0], [D, C]]``. ``A`` is the
factor of the observed variables. ``D A^-1`` maps the deviation of the observed values from their
mean to the shift of the conditional mean of the missing variables. ``C`` is the factor of the
conditional covariance of the missing variables. No covariance is formed, so no digits are lost.

Source: Ghahramani and Jordan 1994 (EM of mixtures with missing data).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._leaves import LOG_TAU, Leaf, Table, add_at, normal_quantile, require_min_std


class _Group(NamedTuple):
    """Rows of data with the same observed variables: up to ``T`` rows for each of ``G`` owners.

    The owner of a row is the block or the distribution that evaluates the row.
    """

    seen: Tensor  # observed variables, ascending
    hidden: Tensor  # missing variables, ascending
    owner: Tensor  # (G,), indices of the owners
    entry: Tensor  # (G, T), indices of rows of data; padded with the first row of the owner
    inside: Tensor  # (G, T), False for padding

    def fill(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Fill the missing variables of the group's rows of ``x (E, d)`` with values.

        Args:
            x: All rows of data, ``(E, d)``.
            hidden: Values ``(G, T, K, h)`` of the h missing variables.

        Returns:
            ``(G, T, K, d)``.
        """
        full = x[self.entry][:, :, None].repeat(1, 1, hidden.shape[2], 1)
        full[..., self.hidden] = hidden
        return full


class _Given(NamedTuple):
    """Distributions of the h missing variables of a group given the observed ones."""

    log_prob: Tensor  # (G, T, K), log-density of the observed variables
    mean: Tensor  # (G, T, K, h)
    factor: Tensor  # (G, K, h, h), Cholesky factors of the conditional covariances


class _Gaussians(NamedTuple):
    """The distributions of a table: means ``(R, d)`` and Cholesky factors ``(R, d, d)``."""

    mean: Tensor
    factor: Tensor

    def given(self, group: _Group, x: Tensor, row: Tensor, hidden: bool = True) -> _Given:
        """Condition distributions on the observed variables of the rows of a group.

        Args:
            group: Rows of data with the same observed variables.
            x: All rows of data, ``(E, d)``.
            row: Table rows ``(G, K)`` of the distributions of each owner.
            hidden: Whether to compute mean and factor of the missing variables. Otherwise the
                result only has ``log_prob``, and the matrices are smaller.
        """
        mean, factor = _take(row, self.mean)[:, :, None], _take(row, self.factor)
        k, variables = len(group.seen), group.seen
        if len(group.hidden):
            variables = torch.cat([group.seen, group.hidden]) if hidden else variables
            factor = _triangle(factor[..., variables, :])
        known, cross, rest = factor[..., :k, :k], factor[..., k:, :k], factor[..., k:, k:]
        distance = x[group.entry][:, None, :, group.seen] - mean[..., group.seen]  # (G, K, T, k)
        # Whitened deviations: independent standard normal numbers under the distribution.
        units = torch.linalg.solve_triangular(known, distance.mT, upper=False)
        log_prob = _log_peak(known)[..., None] - 0.5 * units.square().sum(-2)
        shifted = mean[..., variables[k:]] + (cross @ units).mT
        return _Given(log_prob.mT, shifted.transpose(1, 2), rest)


def _groups(x: Tensor, owner: Tensor) -> Iterator[_Group]:
    """Split the rows of ``x (E, d)``, owned by ``owner (E,)``, by their missing variables."""
    missing = x.isnan()
    patterns, number, sizes = missing.new_zeros(1, x.shape[1]), torch.zeros_like(owner), [len(x)]
    if missing.any():
        patterns, number, count = missing.unique(dim=0, return_inverse=True, return_counts=True)
        sizes = count.tolist()
    owners = int(owner.max()) + 1 if len(x) else 1
    order = (number * owners + owner).argsort(stable=True)
    for pattern, members in zip(patterns, order.split(sizes), strict=True):
        owned, count = owner[members].unique_consecutive(return_counts=True)
        place = torch.arange(int(count.max()) if len(count) else 0, device=x.device)
        first = (count.cumsum(0) - count)[:, None]
        inside = place < count[:, None]
        entry = members[torch.where(inside, first + place, first)]
        seen, hidden = (t.nonzero()[:, 0] for t in (~pattern, pattern))
        yield _Group(seen, hidden, owned, entry, inside)


def _each(x: Tensor, owner: Tensor, answer: Callable[[_Group], Tensor]) -> Tensor:
    """Apply ``answer`` to each group of rows, and return the results by row, ``(E, ...)``.

    ``answer(group)`` returns ``(G, T, ...)`` for the rows of a group.
    """
    groups = list(_groups(x, owner))
    values = torch.cat([answer(g)[g.inside] for g in groups])
    order = torch.cat([g.entry[g.inside] for g in groups])
    return values[order.argsort()]


def _take(row: Tensor, table: Tensor) -> Tensor:
    """Return ``table[row]``, using ``embedding`` because its backward adds in a fixed order."""
    return F.embedding(row, table.flatten(1)).view(*row.shape, *table.shape[1:])


def _gaussians(table: Table) -> _Gaussians:
    log_diagonal, lower = table["log_diagonal"], table["lower"]
    rows, size = log_diagonal.shape
    i, j = torch.tril_indices(size, size, -1, device=lower.device)
    flat = lower.new_zeros(rows, size * size).index_copy(1, i * size + j, lower)
    factor = flat.view(rows, size, size) + torch.diag_embed(log_diagonal.exp())
    return _Gaussians(table["mean"], factor)


def _log_peak(factor: Tensor) -> Tensor:
    """Return the log-density at the mean from the Cholesky factor of the covariance."""
    log_scale = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * factor.shape[-1] * LOG_TAU - log_scale


def _by_block(row: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x`` as ``(B M, d)``, the block of each row, and the table rows of each block."""
    rows, blocks, _ = x.shape
    owner = torch.arange(blocks, device=x.device).repeat(rows)
    return x.flatten(0, 1), owner, row.view(blocks, -1)


def _of_blocks(
    row: Tensor, x: Tensor, answer: Callable[[_Group, Tensor, Tensor], Tensor]
) -> Tensor:
    """Apply ``answer`` to all blocks and rows of data; return the results ``(B, M, K, ...)``.

    ``answer(group, data, units)`` returns ``(G, T, K, ...)``; ``units (G, K)`` are the table rows
    of each owner of the group.
    """
    flat, owner, units = _by_block(row, x)
    found = _each(flat, owner, lambda group: answer(group, flat, units[group.owner]))
    return found.unflatten(0, x.shape[:2])


def _triangle(rows: Tensor) -> Tensor:
    """Return the Cholesky factor of ``rows @ rows.mT`` without forming this product.

    Args:
        rows: ``(..., k, d)`` of rank k.
    """
    lower = torch.linalg.qr(rows.mT).R.mT
    return lower * lower.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


@dataclass(frozen=True)
class MultivariateGaussian(Leaf):
    """A multivariate Gaussian: each unit is a distribution over the d variables of its region.

    Parameters: ``mean (R, d)``, and the Cholesky factor of the covariance. The table stores the
    factor as the logarithms of its diagonal, ``log_diagonal (R, d)``, and its entries below the
    diagonal, row by row, ``lower (R, d (d - 1) / 2)``. Any values define a valid distribution if
    the exponential of ``log_diagonal`` is neither 0 nor infinite in its dtype. Pseudocounts have no
    effect.

    A unit of a region is one leaf unit here, whereas in other families it is one leaf unit per
    variable. Each block of leaf units receives d variables. Data are ``(B, M, d)`` in floating
    point, NaN if missing.

    Args:
        min_std: Lower bound of the standard deviation in every direction, applied by EM.
    """

    min_std: float = 1e-3

    def __post_init__(self) -> None:
        require_min_std("MultivariateGaussian", self.min_std)

    def table(self, rows: int, size: int = 1) -> Table:
        """Return initial parameters of ``rows`` distributions over ``size`` variables."""
        return {
            "mean": torch.randn(rows, size),
            "log_diagonal": torch.zeros(rows, size),
            "lower": torch.zeros(rows, size * (size - 1) // 2),
        }

    def log_prob(self, table: Table, row: Tensor, x: Tensor) -> Tensor:
        gaussians = _gaussians(table)

        return _of_blocks(row, x, lambda *of: gaussians.given(*of, hidden=False).log_prob)

    def peak(self, table: Table, row: Tensor, x: Tensor) -> Tensor:
        """Return the log-density with the missing variables at their most probable values."""
        gaussians = _gaussians(table)

        def answer(group: _Group, flat: Tensor, units: Tensor) -> Tensor:
            given = gaussians.given(group, flat, units)
            return given.log_prob + _log_peak(given.factor)[:, None]

        return _of_blocks(row, x, answer)

    def moments_given(self, table: Table, row: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and variance of each variable given the observed ones.

        Returns:
            Two tensors ``(B, M, N / M, d)``. Observed variables have variance 0.
        """
        gaussians = _gaussians(table)

        def answer(group: _Group, flat: Tensor, units: Tensor) -> Tensor:
            given = gaussians.given(group, flat, units)
            variance = given.factor.square().sum(-1)[:, None].expand_as(given.mean)
            certain = torch.zeros_like(flat)
            pairs = group.fill(flat, given.mean), group.fill(certain, variance)
            return torch.stack(pairs, -1)

        mean, variance = _of_blocks(row, x, answer).unbind(-1)
        return mean, variance

    def complete(self, table: Table, row: Tensor, x: Tensor, u: Tensor | None = None) -> Tensor:
        """Return data ``(A, d)`` with all missing entries filled.

        Args:
            table: Parameters, see the base class.
            row: Table row ``(A,)`` of the distribution of each row of data.
            x: Data ``(A, d)``.
            u: Uniform numbers ``(A, d)`` in [0, 1) for drawing missing entries; None for their most
                probable values.
        """
        gaussians = _gaussians(table)

        def answer(group: _Group) -> Tensor:
            given = gaussians.given(group, x, group.owner[:, None])
            value = given.mean
            if u is not None:
                z = normal_quantile(u.to(x.dtype))[group.entry][..., group.hidden]
                value = value + (z @ given.factor[:, 0].mT)[:, :, None]
            return group.fill(x, value)[:, :, 0]

        return _each(x, row, answer)

    def mode(self, table: Table, row: Tensor) -> tuple[Tensor, Tensor]:
        return table["mean"][row], _log_peak(_gaussians(table).factor)[row]

    def entropy(self, table: Table) -> Tensor:
        return 0.5 * table["mean"].shape[1] - _log_peak(_gaussians(table).factor)

    def divergence(self, table: Table, other: Table) -> Tensor:
        (mean, factor), (there, spread) = _gaussians(table), _gaussians(other)
        both = torch.cat([factor, (mean - there)[..., None]], -1)
        units = torch.linalg.solve_triangular(spread, both, upper=False)
        distance = 0.5 * (units.square().sum((1, 2)) - mean.shape[1])
        return (other["log_diagonal"] - table["log_diagonal"]).sum(1) + distance

    def update(
        self, table: Table, row: Tensor, x: Tensor, flow: Tensor, step: float, pseudocount: float
    ) -> None:
        old = _gaussians({k: t.double() for k, t in table.items()})
        count, mean, covariance = _expected(old, row, x.double(), flow.double())
        # The result has the moments of a mixture of the old and the new Gaussian, so that a step
        # does not decrease the likelihood. Mixing only the covariances could decrease it.
        far = (mean - old.mean)[..., None]
        mixed = (1 - step) * old.factor @ old.factor.mT + step * covariance
        values, vectors = torch.linalg.eigh(mixed + step * (1 - step) * far * far.mT)
        factor = _triangle(vectors * values.clamp(min=self.min_std**2).sqrt()[:, None])
        i, j = torch.tril_indices(*factor.shape[1:], offset=-1, device=factor.device)
        new = {
            "mean": torch.lerp(old.mean, mean, step),
            "log_diagonal": factor.diagonal(dim1=1, dim2=2).log(),
            "lower": factor[:, i, j],
        }
        for name, target in table.items():
            target.copy_(torch.where(count[:, None] > 0, new[name], target.double()))


def _expected(
    old: _Gaussians, row: Tensor, x: Tensor, flow: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the expected count ``(R,)``, mean and covariance of the data of each table row.

    A missing value contributes its conditional mean and covariance given the observed values. A row
    without counts keeps its old mean.
    """
    flat, owner, units = _by_block(row, x)
    weight = flow.reshape(-1, units.shape[1])
    count, total = torch.zeros_like(old.mean[:, 0]), torch.zeros_like(old.mean)
    scatter = torch.zeros_like(old.factor)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for group in _groups(flat, owner):
        if not len(group.seen):
            continue
        rows = units[group.owner]
        given = old.given(group, flat, rows)
        w = (weight[group.entry] * group.inside[..., None]).transpose(1, 2)  # (G, K, T)
        value = group.fill(flat, given.mean).transpose(1, 2)  # (G, K, T, d)
        _add(count, rows, w.sum(2))
        _add(total, rows, (w[..., None] * (value - old.mean[rows][:, :, None])).sum(2))
        spread = scatter.new_zeros(*rows.shape, *scatter.shape[1:])
        spread[..., group.hidden[:, None], group.hidden] = given.factor @ given.factor.mT
        _add(scatter, rows, w.sum(2)[..., None, None] * spread)
        parts.append((rows, w, value))
    safe = torch.where(count > 0, count, 1)
    mean = old.mean + total / safe[:, None]
    # Sums are over deviations from the new mean: differences of large squares lose digits.
    for rows, w, value in parts:
        away = value - mean[rows][:, :, None]
        _add(scatter, rows, (w[..., None] * away).mT @ away)
    return count, mean, scatter / safe[:, None, None]


def _add(target: Tensor, row: Tensor, values: Tensor) -> None:
    """Add ``values (G, K, ...)`` to ``target[row]``, in place and in a fixed order."""
    each = target[0].numel()
    index = row.flatten()[:, None] * each + torch.arange(each, device=row.device)
    add_at(target.view(-1), index.flatten(), values.flatten())
