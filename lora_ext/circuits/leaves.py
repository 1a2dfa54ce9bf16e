"""Input distributions of circuits.

A family is a frozen value that says what its parameters are and how to use them; circuits keep the
parameters of all leaf units of one family in one table, a row per distribution. Letters: ``R`` rows
of the table, ``N`` leaf units, each with its row; ``B`` rows of data. Leaf units come in blocks of
equal size that see one variable and have consecutive rows.

An observation that is missing (-1, or NaN in floating data) never reaches a family.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ext.reference.circuit import draw, log_softmax

Table = dict[str, Tensor]
_LOG_TAU = math.log(2 * math.pi)


@dataclass(frozen=True)
class Leaf:
    """A family without parameters or support; the families below say what they have."""

    def num_values(self) -> int | None:
        """Values run over ``0 .. num_values - 1``; None for a continuous family."""
        return None

    def table(self, rows: int) -> Table:
        """Fresh parameters for ``rows`` distributions, all different."""
        return {}

    def log_prob(self, table: Table, row: Tensor, x: Tensor) -> Tensor:
        """``log p(x[b, m])`` under the distributions of block m, ``(B, M, N / M)``.

        Args:
            table: parameters of the family.
            row: ``(N,)``.
            x: ``(B, M)``, M blocks.
        """
        raise NotImplementedError

    def sample(self, table: Table, row: Tensor, u: Tensor) -> Tensor:
        """The value whose cumulative probability first exceeds ``u``, per entry of ``row``."""
        raise NotImplementedError

    def mode(self, table: Table, row: Tensor) -> tuple[Tensor, Tensor]:
        """Most probable value and its log-probability, per entry of ``row``."""
        raise NotImplementedError

    def update(
        self, table: Table, row: Tensor, x: Tensor, flow: Tensor, step: float, pseudocount: float
    ) -> None:
        """Move the parameters towards the maximum of ``sum flow * log_prob``, in place.

        Args:
            table: parameters of the family.
            row: ``(N,)``.
            x: ``(B, N)`` data.
            flow: ``(B, N)`` expected counts, zero where ``x`` is missing.
            step: how far, 1 is all the way.
            pseudocount: added to every row's counts, spread evenly.
        """


def _sums_at(index: Tensor, counts: Tensor, size: int) -> Tensor:
    """Counts added up by index, ``(size,)``; in a fixed order on every device."""
    sums = counts.new_zeros(size)
    return torch.ops.aten.index_put_(sums, [index], counts, True)


def _per_row(table: Tensor, row: Tensor, counts: Tensor) -> Tensor:
    """Counts ``(N,)`` of leaf units added up over the units of each row, ``(R,)``."""
    return _sums_at(row, counts, table.shape[0])


def _mix(old: Tensor, new: Tensor, step: float) -> Tensor:
    return (1 - step) * old + step * new


class _Finite(Leaf):
    """A family over finitely many values: all it needs is the table of log-probabilities."""

    def log_table(self, table: Table) -> Tensor:
        """``(R, num_values)``."""
        raise NotImplementedError

    def log_prob(self, table: Table, row: Tensor, x: Tensor) -> Tensor:
        log_table = self.log_table(table)
        values, block = log_table.shape[1], len(row) // x.shape[1]
        # A value's probabilities under all units of a block lie together: one copy per entry of x.
        blocks = log_table.unflatten(0, (-1, block)).transpose(1, 2).reshape(-1, block)
        return F.embedding(row[::block] // block * values + x.long(), blocks)

    def sample(self, table: Table, row: Tensor, u: Tensor) -> Tensor:
        return draw(self.log_table(table).exp()[row], u)

    def mode(self, table: Table, row: Tensor) -> tuple[Tensor, Tensor]:
        value, index = self.log_table(table).max(1)
        return index[row], value[row]


@dataclass(frozen=True)
class Categorical(_Finite):
    """One of ``num_categories`` values; logits ``(R, num_categories)``."""

    num_categories: int

    def num_values(self) -> int | None:
        return self.num_categories

    def table(self, rows: int) -> Table:
        return {"logits": torch.randn(rows, self.num_categories)}

    def log_table(self, table: Table) -> Tensor:
        logits = table["logits"]
        # torch's, in one pass, knows no row of nothing but -inf.
        if logits.device.type == "cpu" and logits.detach().amax(1).isfinite().all():
            return F.log_softmax(logits, 1)
        return log_softmax(logits)

    def update(
        self, table: Table, row: Tensor, x: Tensor, flow: Tensor, step: float, pseudocount: float
    ) -> None:
        logits = table["logits"]
        at = (row * logits.shape[1] + x.long()).flatten()
        counts = _sums_at(at, flow.flatten(), logits.numel()).view_as(logits)
        total = counts.sum(1, keepdim=True)
        new = (counts + pseudocount / logits.shape[1]) / (total + pseudocount)
        mixed = _mix(log_softmax(logits).exp(), new, step).log()
        logits.copy_(torch.where(total > 0, mixed, logits))


@dataclass(frozen=True)
class Bernoulli(_Finite):
    """0 or 1; the logit of 1, ``(R,)``."""

    def num_values(self) -> int | None:
        return 2

    def table(self, rows: int) -> Table:
        return {"logit": torch.randn(rows)}

    def log_table(self, table: Table) -> Tensor:
        return torch.stack([F.logsigmoid(-table["logit"]), F.logsigmoid(table["logit"])], 1)

    def update(
        self, table: Table, row: Tensor, x: Tensor, flow: Tensor, step: float, pseudocount: float
    ) -> None:
        _update_logit(table["logit"], row, x, flow, step, pseudocount, 1)


@dataclass(frozen=True)
class Binomial(_Finite):
    """Successes in ``total`` trials; the logit of a success, ``(R,)``."""

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
        return choose + k * F.logsigmoid(logit) + (self.total - k) * F.logsigmoid(-logit)

    def update(
        self, table: Table, row: Tensor, x: Tensor, flow: Tensor, step: float, pseudocount: float
    ) -> None:
        _update_logit(table["logit"], row, x, flow, step, pseudocount, self.total)


def _update_logit(
    logit: Tensor,
    row: Tensor,
    x: Tensor,
    flow: Tensor,
    step: float,
    pseudocount: float,
    trials: int,
) -> None:
    hits = _per_row(logit, row, (flow * x).sum(0)) + pseudocount * trials / 2
    count = _per_row(logit, row, flow.sum(0))
    new = hits / ((count + pseudocount) * trials)
    logit.copy_(torch.where(count > 0, _mix(torch.sigmoid(logit), new, step).logit(), logit))


@dataclass(frozen=True)
class Gaussian(Leaf):
    """A real number; mean and log of the standard deviation, ``(R,)`` each.

    ``min_std`` bounds what EM may shrink the deviation to.
    """

    min_std: float = 1e-3

    def table(self, rows: int) -> Table:
        return {"mean": torch.randn(rows), "log_std": torch.zeros(rows)}

    def log_prob(self, table: Table, row: Tensor, x: Tensor) -> Tensor:
        mean, log_std = (table[k][row].view(x.shape[1], -1) for k in ("mean", "log_std"))
        x = x[..., None]
        return -0.5 * (((x - mean) * (-log_std).exp()).square() + _LOG_TAU) - log_std

    def sample(self, table: Table, row: Tensor, u: Tensor) -> Tensor:
        z = torch.special.ndtri(u.to(table["mean"].dtype).clamp(2.0**-25, 1 - 2.0**-24))
        return table["mean"][row] + table["log_std"][row].exp() * z

    def mode(self, table: Table, row: Tensor) -> tuple[Tensor, Tensor]:
        return table["mean"][row], -0.5 * _LOG_TAU - table["log_std"][row]

    def update(
        self, table: Table, row: Tensor, x: Tensor, flow: Tensor, step: float, pseudocount: float
    ) -> None:
        mean, log_std = table["mean"], table["log_std"]
        count = _per_row(mean, row, flow.sum(0))
        seen, safe = count > 0, count.clamp(min=torch.finfo(mean.dtype).tiny)
        new_mean = _per_row(mean, row, (flow * x).sum(0)) / safe
        spread = (x - new_mean[row]).square()
        new_variance = _per_row(mean, row, (flow * spread).sum(0)) / safe
        moved = _mix(mean, new_mean, step)
        # Second moments mix, not variances: a step of less than 1 stays an increase.
        second = _mix((2 * log_std).exp() + mean**2, new_variance + new_mean**2, step)
        variance = (second - moved**2).clamp(min=self.min_std**2)
        log_std.copy_(torch.where(seen, 0.5 * variance.log(), log_std))
        mean.copy_(torch.where(seen, moved, mean))


@dataclass(frozen=True)
class Indicator(Leaf):
    """Unit ``u`` of the region says ``x == values[u]``: 1 or 0, no parameters."""

    values: tuple[int, ...]

    def table(self, rows: int) -> Table:
        raise NotImplementedError  # circuits keep the values beside the structure


@dataclass(frozen=True)
class External(Leaf):
    """The caller gives the log-value of every unit, in the order of the leaf units."""


FAMILIES: dict[str, type[Leaf]] = {
    family.__name__.lower(): family
    for family in (Categorical, Bernoulli, Binomial, Gaussian, Indicator, External)
}


def leaf_to_json(leaf: Leaf) -> dict[str, Any]:
    """The family's name and fields."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(leaf).items()}
    return {"family": type(leaf).__name__.lower(), **fields}


def leaf_from_json(data: Any, where: str) -> Leaf:
    """Parse an untrusted description.

    Raises:
        ValueError: naming the field.
    """
    if not isinstance(data, dict) or data.get("family") not in list(FAMILIES):
        raise ValueError(f"{where}: family: expected one of {[*FAMILIES]}, found {data!r:.100}")
    family = FAMILIES[data["family"]]
    names = family.__dataclass_fields__.keys()
    if data.keys() - {"family"} != names:
        raise ValueError(f"{where}: expected the fields {[*names]}, found {[*data]!r:.200}")
    values: dict[str, Any] = {}
    for name in names:
        value = data[name]
        if name == "values":
            good = isinstance(value, list) and all(_is_count(v, 0) for v in value)
            value = tuple(value) if good else value
        elif name == "min_std":
            good = type(value) in (int, float) and 0 < value < math.inf
        else:
            good = _is_count(value, 1)
        if not good:
            raise ValueError(f"{where}: {name}: not acceptable, found {value!r:.100}")
        values[name] = value
    return family(**values)


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**31
