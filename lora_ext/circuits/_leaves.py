"""Input distributions of circuits, and sums in a fixed order for updating their parameters.

A family is a frozen dataclass that defines parameters and computations with them. A circuit stores
the parameters of all leaf units of one family in one table, with one row per distribution. Several
leaf units may use the same row. The leaf units of a family form ``M`` blocks of equal size; the
units of a block have the same variable and consecutive rows.

Letters: ``R`` rows of the table, ``N`` leaf units, ``M`` blocks, ``B`` rows of data, ``A`` draws.

Only ``MultivariateGaussian``, whose units have several variables, receives missing values (NaN).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ext import ops
from lora_ext._checks import integer, require
from lora_ext.reference import log_softmax

Table = dict[str, Tensor]
LOG_TAU = math.log(2 * math.pi)
COUNT = "a whole number, at least 1"


@dataclass(frozen=True)
class Leaf:
    """A family of input distributions: its parameters, and computations with them.

    Arguments of all methods: ``table`` contains the parameters by name, each with one row per
    distribution, as :meth:`table` creates them. ``row`` is int64 and contains the table row of each
    leaf unit, ``(N,)``, or of each draw, ``(A,)``.

    This class has neither parameters nor values. A subclass overrides the methods that the queries
    of its circuits call; the others raise NotImplementedError.
    """

    def num_values(self) -> int | None:
        """Return the number of values ``0 .. num_values - 1``, or None for a continuous family."""
        return None

    def table(self, rows: int) -> Table:
        """Return different initial parameters for each of ``rows`` distributions: float32 tensors
        on the CPU by name, with ``rows`` as the first dimension.
        """
        return {}

    def log_prob(self, table: Table, row: Tensor, x: Tensor) -> Tensor:
        """Compute ``log p(x[b, m])`` under the distributions of block m, ``(B, M, N / M)``.

        Args:
            table: Parameters, see the class.
            row: Table row of each leaf unit, ``(N,)``.
            x: Data ``(B, M)`` without missing values: one value for each block.
        """
        raise NotImplementedError

    def sample(self, table: Table, row: Tensor, u: Tensor) -> Tensor:
        """Draw a value from each distribution of ``row`` by inverting its distribution function.

        For a finite family this is the first value with a cumulative probability above ``u``.

        Args:
            table: Parameters, see the class.
            row: Table row of each draw, ``(A,)``.
            u: Uniform numbers ``(A,)`` in [0, 1); the same numbers give the same values.

        Returns:
            ``(A,)``, int64 if the family is finite, otherwise in the dtype of the parameters.
        """
        raise NotImplementedError

    def mode(self, table: Table, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most probable value of each distribution of ``row (A,)``.

        Returns:
            The values ``(A,)`` and their log-probabilities ``(A,)``.
        """
        raise NotImplementedError

    def log_table(self, table: Table) -> Tensor:
        """Return the log-probabilities of all values of a finite family, ``(R, num_values)``."""
        raise NotImplementedError

    def moments(self, table: Table) -> tuple[Tensor, Tensor]:
        """Compute the mean ``(R,)`` and the variance ``(R,)`` of each distribution."""
        raise NotImplementedError

    def entropy(self, table: Table) -> Tensor:
        """Compute the entropy of each distribution in nats, ``(R,)``.

        For a continuous family this is the differential entropy.
        """
        raise NotImplementedError

    def divergence(self, table: Table, other: Table) -> Tensor:
        """Compute the Kullback-Leibler divergence ``sum p log (p / q)`` in nats, ``(R,)``.

        p and q are the distributions of the same row of ``table`` and ``other``.
        """
        raise NotImplementedError

    def update(
        self, table: Table, row: Tensor, x: Tensor, flow: Tensor, step: float, pseudocount: float
    ) -> None:
        """Update the parameters towards the maximum of ``sum flow * log_prob``, in place.

        Args:
            table: Parameters, see the class.
            row: Table row of each leaf unit, ``(N,)``.
            x: Data ``(B, N)``.
            flow: Expected counts ``(B, N)``, zero if ``x`` is missing.
            step: Step size in (0, 1]; 1 sets the parameters to the maximum.
            pseudocount: Count added to each row, divided evenly among the values.
        """


def normal_quantile(u: Tensor) -> Tensor:
    """Return the standard normal quantile of ``u`` in [0, 1), clamped to finite values."""
    return torch.special.ndtri(u.clamp(2.0**-25, 1 - 2.0**-24))


def _per_row(row: Tensor, values: Tensor, rows: int) -> Tensor:
    """Sum ``values (B, N)`` over the data, and over the leaf units of each table row, ``(R,)``."""
    return sums_at(row.expand_as(values), values, rows)


def _mix(old: Tensor, new: Tensor, step: float) -> Tensor:
    return (1 - step) * old + step * new


def require_min_std(where: str, min_std: float) -> None:
    """Raise ValueError unless ``min_std`` is positive and finite."""
    require(0 < min_std < math.inf, where, "min_std", "a positive number", min_std)


class Finite(Leaf):
    """A family over finitely many values. All methods use :meth:`log_table`."""

    def moments(self, table: Table) -> tuple[Tensor, Tensor]:
        p = self.log_table(table).exp()
        value = torch.arange(p.shape[1], dtype=p.dtype, device=p.device)
        mean = p @ value
        return mean, (p * (value - mean[:, None]).square()).sum(1)

    def entropy(self, table: Table) -> Tensor:
        log_p = self.log_table(table)
        return -torch.where(log_p > -math.inf, log_p.exp() * log_p, 0).sum(1)

    def divergence(self, table: Table, other: Table) -> Tensor:
        log_p, log_q = self.log_table(table), self.log_table(other)
        return torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0).sum(1)

    def looked_up(self, table: Table) -> tuple[Tensor, str]:
        """Return the arguments ``table (R, num_values)`` and ``norm`` of ``ops.circuit_table``."""
        return self.log_table(table), "none"

    def log_prob(self, table: Table, row: Tensor, x: Tensor) -> Tensor:
        values, norm = self.looked_up(table)
        block = len(row) // x.shape[1]
        first = row[::block].contiguous()
        return ops.circuit_table(values, x.long(), first, block, norm).unflatten(1, (-1, block))

    def sample(self, table: Table, row: Tensor, u: Tensor) -> Tensor:
        return _draw(self.log_table(table).exp(), row, u)

    def mode(self, table: Table, row: Tensor) -> tuple[Tensor, Tensor]:
        value, index = self.log_table(table).max(1)
        return index[row], value[row]


def _draw(p: Tensor, row: Tensor, uniform: Tensor) -> Tensor:
    """Draw one index per entry of ``row`` from the weights ``p[row]``.

    The result is that of ``reference._circuit.draw(p[row], uniform)``. The cumulative sums of a row
    are computed once for all of its draws.
    """
    num_values = p.shape[1]
    sums = p.double().cumsum(1)
    limit = uniform.double() * sums[row, -1]
    below = torch.zeros_like(row)  # number of cumulative sums that do not exceed the limit
    for step in (1 << k for k in reversed(range(num_values.bit_length()))):
        more = below + step
        inside = sums[row, more.clamp(max=num_values) - 1] <= limit
        below = torch.where(inside & (more <= num_values), more, below)
    place = torch.arange(num_values, device=p.device)
    # If rounding leads past the last value, the last value with a positive weight is drawn.
    last = torch.where(p > 0, place, 0).amax(1)
    return torch.where(below < num_values, below, last[row])


@dataclass(frozen=True)
class Categorical(Finite):
    """A categorical distribution over ``num_categories`` values.

    Parameters: ``logits (R, num_categories)``, which are log-softmaxed over the values. A value
    with logit ``-inf`` has probability 0.

    Args:
        num_categories: Number of values ``0 .. num_categories - 1``.

    Raises:
        ValueError: If ``num_categories`` is not a whole number of at least 1.
    """

    num_categories: int

    def __post_init__(self) -> None:
        integer("Categorical", "num_categories", self.num_categories, 1, expected=COUNT)

    def num_values(self) -> int | None:
        return self.num_categories

    def table(self, rows: int) -> Table:
        return {"logits": torch.randn(rows, self.num_categories)}

    def log_table(self, table: Table) -> Tensor:
        return log_softmax(table["logits"])

    def looked_up(self, table: Table) -> tuple[Tensor, str]:
        return table["logits"], "logits"

    def update(
        self, table: Table, row: Tensor, x: Tensor, flow: Tensor, step: float, pseudocount: float
    ) -> None:
        logits = table["logits"]
        at = row * logits.shape[1] + x.long()
        counts = sums_at(at, flow, logits.numel()).view_as(logits)
        total = counts.sum(1, keepdim=True)
        new = (counts + pseudocount / logits.shape[1]) / (total + pseudocount)
        mixed = _mix(log_softmax(logits.double()).exp(), new, step).log()
        logits.copy_(torch.where(total > 0, mixed, logits.double()))


class _Trials(Finite):
    """A distribution of the number of successes in ``total`` independent trials.

    Parameters: ``logit (R,)`` of the probability that a trial succeeds.
    """

    total: int

    def num_values(self) -> int | None:
        return self.total + 1

    def table(self, rows: int) -> Table:
        return {"logit": torch.randn(rows)}

    def log_table(self, table: Table) -> Tensor:
        logit = table["logit"][:, None]
        k = torch.arange(self.total + 1, dtype=logit.dtype, device=logit.device)
        choose = (
            math.lgamma(self.total + 1) - torch.lgamma(k + 1) - torch.lgamma(self.total - k + 1)
        )
        # A count of 0 adds 0, even if its log-probability is -inf: 0 * -inf would be NaN.
        hits = torch.where(k > 0, k * F.logsigmoid(logit), 0)
        misses = torch.where(k < self.total, (self.total - k) * F.logsigmoid(-logit), 0)
        return choose + hits + misses

    def update(
        self, table: Table, row: Tensor, x: Tensor, flow: Tensor, step: float, pseudocount: float
    ) -> None:
        logit = table["logit"]
        hits, misses = (_per_row(row, flow * t, len(logit)) for t in (x, self.total - x))
        seen = hits + misses > 0
        hits, misses = (t + pseudocount * self.total / 2 for t in (hits, misses))
        old, count = logit.double(), hits + misses
        # The logit is log p - log q with q = 1 - p. A separate computation keeps q precise if p is
        # near 1.
        p = _mix(old.sigmoid(), hits / count, step)
        q = _mix((-old).sigmoid(), misses / count, step)
        logit.copy_(torch.where(seen, p.log() - q.log(), old))


@dataclass(frozen=True)
class Bernoulli(_Trials):
    """A Bernoulli distribution over 0 and 1.

    Parameters: ``logit (R,)``, ``log p(1) - log p(0)``.
    """

    total = 1

    def log_table(self, table: Table) -> Tensor:
        # The result is bit-identical to that of the base class, in half the time.
        return torch.stack([F.logsigmoid(-table["logit"]), F.logsigmoid(table["logit"])], 1)


@dataclass(frozen=True)
class Binomial(_Trials):
    """A binomial distribution: the number of successes in ``total`` independent trials.

    Parameters: ``logit (R,)``, ``log p - log (1 - p)`` for the probability p that a trial succeeds.

    Args:
        total: Number of trials; values are ``0 .. total``.

    Raises:
        ValueError: If ``total`` is not a whole number of at least 1.
    """

    total: int

    def __post_init__(self) -> None:
        integer("Binomial", "total", self.total, 1, expected=COUNT)


@dataclass(frozen=True)
class Gaussian(Leaf):
    """A normal distribution over real numbers.

    Parameters: ``mean (R,)`` and ``log_std (R,)``, the logarithm of the standard deviation.
    Pseudocounts have no effect, because no number is impossible under a Gaussian.

    Args:
        min_std: Lower bound of standard deviations in EM.

    Raises:
        ValueError: If ``min_std`` is not positive and finite.
    """

    min_std: float = 1e-3

    def __post_init__(self) -> None:
        require_min_std("Gaussian", self.min_std)

    def table(self, rows: int) -> Table:
        return {"mean": torch.randn(rows), "log_std": torch.zeros(rows)}

    def log_prob(self, table: Table, row: Tensor, x: Tensor) -> Tensor:
        mean, log_std = (  # F.embedding, because its backward adds in a fixed order
            F.embedding(row, table[k][:, None]).view(x.shape[1], -1) for k in ("mean", "log_std")
        )
        x = x[..., None]
        return -0.5 * (((x - mean) * (-log_std).exp()).square() + LOG_TAU) - log_std

    def sample(self, table: Table, row: Tensor, u: Tensor) -> Tensor:
        z = normal_quantile(u.to(table["mean"].dtype))
        return table["mean"][row] + table["log_std"][row].exp() * z

    def moments(self, table: Table) -> tuple[Tensor, Tensor]:
        return table["mean"], (2 * table["log_std"]).exp()

    def entropy(self, table: Table) -> Tensor:
        return 0.5 * (1 + LOG_TAU) + table["log_std"]

    def divergence(self, table: Table, other: Table) -> Tensor:
        (mean, variance), (there, spread) = self.moments(table), self.moments(other)
        distance = (variance + (mean - there).square()) / (2 * spread)
        return other["log_std"] - table["log_std"] + distance - 0.5

    def mode(self, table: Table, row: Tensor) -> tuple[Tensor, Tensor]:
        return table["mean"][row], -0.5 * LOG_TAU - table["log_std"][row]

    def update(
        self, table: Table, row: Tensor, x: Tensor, flow: Tensor, step: float, pseudocount: float
    ) -> None:
        mean, log_std = table["mean"].double(), table["log_std"].double()
        # Sums are over deviations from the mean, since mean(x^2) - mean(x)^2 would lose digits.
        count = _per_row(row, flow, len(mean))
        seen, safe = count > 0, torch.where(count > 0, count, 1)
        new_mean = mean + _per_row(row, flow * (x - mean[row]), len(mean)) / safe
        new_variance = _per_row(row, flow * (x - new_mean[row]).square(), len(mean)) / safe
        # The result has the variance of a mixture of the old and the new Gaussian, so that a step
        # does not decrease the likelihood. Mixing only the variances could decrease it.
        between = step * (1 - step) * (mean - new_mean).square()
        variance = _mix((2 * log_std).exp(), new_variance, step) + between
        new_log_std = 0.5 * variance.clamp(min=self.min_std**2).log()
        table["log_std"].copy_(torch.where(seen, new_log_std, log_std))
        table["mean"].copy_(torch.where(seen, _mix(mean, new_mean, step), mean))


@dataclass(frozen=True)
class Indicator(Leaf):
    """An indicator without parameters: unit ``u`` of the region is 1 if ``x == values[u]``, else 0.

    Args:
        values: Whole numbers of at least 0, one per unit of the region.

    Raises:
        ValueError: If a value is not a whole number of at least 0.
    """

    values: tuple[int, ...]

    def __post_init__(self) -> None:
        known = all(isinstance(v, int) and v >= 0 for v in self.values)
        require(known, "Indicator", "values", "whole numbers, at least 0", self.values)
        object.__setattr__(self, "values", tuple(self.values))


@dataclass(frozen=True)
class External(Leaf):
    """A distribution that the caller evaluates, such as the head of a network.

    :meth:`lora_ext.circuits.Circuit.log_prob` accepts ``external (B, N)``, the log-values of the N
    external leaf units in their order. These units have no parameters and cannot be sampled.
    """


# --- sums in a fixed order ------------------------------------------------------------------------
# The order does not depend on the number of threads. If indices repeat, `index_put_` on the CPU and
# `index_add_` on CUDA add with atomics, in an order that may vary. `index_add_` on the CPU and
# `index_put_` on CUDA add in a fixed order.


def add_at(target: Tensor, index: Tensor, values: Tensor) -> None:
    """Add ``values[..., j]`` to ``target[..., index[j]]`` in place; indices may repeat.

    ``target`` has one or two dimensions, ``index`` has one.
    """
    if target.device.type == "cpu":
        target.index_add_(-1, index, values)
    else:
        every = [None] * (target.dim() - 1)
        torch.ops.aten.index_put_(target, [*every, index], values, True)


def sums_at(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the sums of ``values`` by index, ``(size,)``.

    The result is float64, because long sums of small counts would lose digits in float32.
    """
    sums = torch.zeros(size, dtype=torch.float64, device=values.device)
    add_at(sums, index.flatten(), values.double().flatten())
    return sums


def in_rows(t: Tensor) -> Tensor:
    """Return ``t`` with a new first axis, of size 2 if ``t`` is a single row and 1 otherwise.

    torch divides the sum of a single long row among its threads, so the bits of the sum would
    depend on the number of threads. The sums of two rows are not divided.
    """
    return t.expand(2, *t.shape) if t.numel() == t.shape[-1] else t[None]


def last_sum(t: Tensor) -> Tensor:
    """Return ``t.sum(-1)`` in an order independent of the number of threads."""
    return in_rows(t).sum(-1)[0]
