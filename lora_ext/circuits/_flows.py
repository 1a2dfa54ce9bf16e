"""Flows, and the queries that use them: univariate marginals, entropy, divergence and EM.

The flow of a unit or a weight is its expected number of uses in a sample, given the data.
Letters: ``B`` rows of data, ``n`` variables, ``V`` values, ``U`` units, ``d`` variables of a unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import require

from . import _structure
from ._leaves import External, Indicator, add_at, last_sum
from ._parameters import Parameters
from ._program import FIRST_LEAF, Weights
from ._regions import variables
from .multivariate import MultivariateGaussian


class Flows(NamedTuple):
    """Flows of a circuit's units and weights: their expected numbers of uses in a sample.

    Attributes:
        log_prob: Log-probability of each row, ``(B,)``.
        units: Flow of each unit in each row, ``(B, U)``. ``Circuit.columns`` returns the columns of
            a region.
        weights: Flow of each weight, summed over the rows, in the order of ``Circuit.weights``.
    """

    log_prob: Tensor
    units: Tensor
    weights: Tensor


def _flows_of(
    circuit: Parameters, name: str, leaf: Tensor, log_weights: Tensor, root: int | Tensor | None
) -> Flows:
    """Compute the flows of a circuit from log-values of the leaves and normalised log-weights."""
    execution, weights = circuit._run(), Weights(log_weights, "none")
    top = circuit._root_numbers(name, root, len(leaf))[:, None]
    val = execution.up(leaf, weights)
    log_probs = execution.root_values(val)
    log_prob = log_probs.gather(1, top)
    possible = (log_prob > -torch.inf).to(val.dtype)
    droots = torch.zeros_like(log_probs).scatter_(1, top, possible)
    units, _, weight_flows = execution.down(droots, val, weights)
    return Flows(log_prob[:, 0], units, weight_flows)


def _seen(
    circuit: Parameters, log_weights: Tensor, units: Tensor, weight_flows: Tensor, missing: Tensor
) -> Tensor:
    """Return ``weight_flows`` without the rows in which a region's variables are all missing.

    In such a row (padding of a short sequence in a chain, for example), the posterior of the
    region's weights is the prior, ``units * W``. Including such rows would only slow down learning.
    """
    graph = circuit.graph
    scopes = torch.zeros(missing.shape[1], len(graph.regions), dtype=units.dtype)
    for i, scope in enumerate(graph.scopes):
        scopes[variables(scope), i] = 1
    blind = (~missing).to(units.dtype) @ scopes.to(units.device) == 0  # (B, regions)
    unseen = torch.zeros_like(weight_flows)
    for i in blind.any(0).nonzero()[:, 0].tolist():
        region, first = graph.regions[i], circuit.layered.weight_off[i]
        if region.leaf is None:
            own = slice(first, first + region.units * graph.num_products(region))
            used = torch.where(blind[:, i, None], units[:, circuit.columns(i)], 0)
            weight = log_weights[own].view(region.units, -1).exp()
            unseen[own] += (weight * last_sum(used.T)[:, None]).flatten()
    # Both numbers are rounded, so a difference below 1e3 eps of `weight_flows` is rounding error.
    seen, eps = weight_flows - unseen, torch.finfo(weight_flows.dtype).eps
    return torch.where(seen > 1e3 * eps * weight_flows, seen, 0)


# --- queries --------------------------------------------------------------------------------------
class Marginals(NamedTuple):
    """Marginal distributions of single variables, given the evidence of a row.

    Attributes:
        log_prob: ``log p(x_v = value | evidence)``, ``(B, n, V)``; ``-inf`` for values that a
            variable does not have, NaN for a continuous variable. An observed value has probability
            1.
        mean: Mean of each variable, ``(B, n)``.
        variance: Variance of each variable, ``(B, n)``.
    """

    log_prob: Tensor
    mean: Tensor
    variance: Tensor


def _given(
    found: Marginals, filled: Tensor, missing: Tensor, possible: Tensor, continuous: Tensor
) -> Marginals:
    """Return ``found``, corrected for observed variables, impossible rows and continuous variables.

    Observed variables get their observed value with probability 1. Moments of impossible rows and
    log-probabilities of continuous variables become NaN.
    """
    log_prob, mean, variance = found
    value = torch.arange(log_prob.shape[2], device=filled.device)
    certain = torch.where(value == filled[..., None], 0.0, -torch.inf).to(log_prob.dtype)
    known = possible[:, None] & ~missing
    log_prob = torch.where(known[..., None], certain, log_prob)
    log_prob = log_prob.masked_fill(continuous[:, None], torch.nan)
    mean = torch.where(known, filled.to(mean.dtype), mean).masked_fill(
        ~possible[:, None], torch.nan
    )
    variance = variance.masked_fill(known, 0).masked_fill(~possible[:, None], torch.nan)
    return Marginals(log_prob, mean, variance)


def _require_logits(circuit: Parameters, name: str) -> None:
    norm = circuit.norm
    require(norm == "logits", name, "norm", "a circuit with norm 'logits'", repr(norm))


def _require_deterministic(circuit: Parameters, name: str) -> None:
    """Raise ValueError unless a circuit is normalised, deterministic and without external leaves.

    Otherwise, several trees of units may be nonzero for one assignment, and the formulas of entropy
    and divergence do not hold.
    """
    _require_logits(circuit, name)
    circuit._refuse_external(name)
    known = _structure.is_deterministic(circuit.graph)
    found = "a nondeterministic one" if known is False else "one not known to be deterministic"
    remedy = "; estimate it from samples, as in -circuit.log_prob(circuit.sample(10000)[0]).mean()"
    require(known is True, name, "graph", "a deterministic circuit", found + remedy)


def _usage(circuit: Parameters, name: str, root: int | None) -> tuple[Tensor, Flows]:
    """Return the normalised log-weights, and the flows of a row with all variables missing."""
    leaf = circuit._leaf_values(name, circuit._nothing(), None)
    log_weights = circuit._log_weights()
    return log_weights, _flows_of(circuit, name, leaf, log_weights, root)


def _total(
    used: Flows, of_weights: Tensor, of_family: Callable[..., Tensor], *circuits: Parameters
) -> Tensor:
    """Return the expectation of a sum over the weights and leaves that a sample uses.

    Args:
        used: Flows of a row with all variables missing.
        of_weights: Value of each weight.
        of_family: Function ``of_family(family, *tables)`` that returns the value of each table row;
            ``tables`` are the tables of the family in ``circuits``.
        circuits: One circuit, or two with the same graph.
    """
    total = _expectation(used.weights, of_weights)
    for parts in zip(*(circuit._families() for circuit in circuits), strict=True):
        family, _, span = parts[0]
        if not isinstance(family, Indicator):
            each = of_family(family, *(table for _, table, _ in parts))[circuits[0]._row[span]]
            total = total + _expectation(used.units[0, FIRST_LEAF:][span], each)
    return total


def _expectation(flow: Tensor, value: Tensor) -> Tensor:
    """Return the sum of flow times value; a term with flow 0 is 0 even if its value is infinite."""
    return torch.where(flow > 0, flow * value, 0).sum()


class FlowQueries(Parameters):
    """Base class of ``Circuit`` that adds the queries based on flows."""

    @torch.no_grad()
    def univariate_marginals(self, evidence: Tensor, root: int | Tensor | None = None) -> Marginals:
        """Compute the marginal distribution of each variable given the evidence, in one upward and
        one downward pass.

        The marginal of a variable is the mixture of its leaf distributions, weighted by their
        flows.

        Args:
            evidence: Data ``(B, n)``; -1 or NaN if a variable is missing.
            root: Index of a root unit, or ``(B,)`` with one index per row.

        Returns:
            Log-probabilities of all values ``(B, n, V)``, means and variances ``(B, n)``. For
            impossible evidence the log-probabilities are ``-inf``, and means and variances NaN.
            Probabilities below the smallest number of the dtype are 0.

        Raises:
            ValueError: If the circuit has external leaves; if it has several root units and
                ``root`` is missing; or if :meth:`log_prob` raises it.
        """
        name = "univariate_marginals"
        filled, missing = self._read(name, evidence, "evidence")
        self._refuse_external(name)
        leaf = self._leaf_values_of(name, filled, missing)
        use = _flows_of(self, name, leaf, self._log_weights(), root)
        units = use.units[:, FIRST_LEAF:]
        rows, n = filled.shape
        supports = [  # number of values of each family, 0 for a continuous family
            int(self._indicators[span].max()) + 1
            if isinstance(family, Indicator)
            else family.num_values() or 0
            for family, _, span in self._families()
        ]
        size = max(supports, default=0)
        table, mean, variance = (units.new_zeros(rows, k) for k in (n * size, n, n))
        continuous = torch.zeros(n, dtype=torch.bool, device=units.device)
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for (family, parameters, span), block, values in zip(
            self._families(), self._blocks, supports, strict=True
        ):
            var, row, flow = self._var[span], self._row[span], units[:, span]
            if isinstance(family, Indicator):
                value = self._indicators[span]
                add_at(table, var * size + value, flow)
                center = value.to(flow.dtype)
                spread = torch.zeros_like(center)
            elif isinstance(family, MultivariateGaussian):
                data = self._joint_data(span, filled, missing)
                moments = family.moments_given(parameters, row, data)
                center, spread = (t.flatten(1) for t in moments)  # (B, N d)
                scopes = self._scopes(span)
                var = scopes[:, None].expand(-1, block, -1).flatten()
                flow = flow.repeat_interleave(scopes.shape[1], 1)
                continuous[var] = True
            else:
                center, spread = (t[row] for t in family.moments(parameters))
                if values:
                    p = family.log_table(parameters).exp()[row].unflatten(0, (-1, block))
                    each = torch.einsum("bmk,mkv->bmv", flow.unflatten(1, (-1, block)), p)
                    columns = size * var[::block, None] + torch.arange(values, device=var.device)
                    add_at(table, columns.flatten(), each.flatten(1))
                else:
                    continuous[var] = True
            add_at(mean, var, flow * center)
            parts.append((var, flow, center, spread))
        # Sums are over deviations from the mean, since mean(x^2) - mean(x)^2 would lose digits.
        for var, flow, center, spread in parts:
            add_at(variance, var, flow * (spread + (center - mean[:, var]).square()))
        found = Marginals(table.view(rows, n, size).log(), mean, variance)
        return _given(found, filled, missing, use.log_prob > -torch.inf, continuous)

    @torch.no_grad()
    def entropy(self, root: int | None = None) -> Tensor:
        """Compute the entropy of the circuit in nats, a scalar tensor.

        For continuous variables this is the differential entropy.

        In a deterministic circuit only one tree of units is nonzero for an assignment. ``log p`` is
        then a sum over the weights and leaves of this tree. Its expectation is a sum over all
        weights and leaves, each term multiplied by its flow.

        Args:
            root: Index of a root unit; required if there are several.

        Raises:
            ValueError: If the circuit is not known to be deterministic (:meth:`check`), because no
                formula that is linear in the size of the circuit is known for other circuits; or if
                the circuit is unnormalised or has external leaves.

        Source: Vergari et al. 2021, "A compositional atlas of tractable circuit operations".
        """
        _require_deterministic(self, "entropy")
        log_weights, used = _usage(self, "entropy", root)
        return _total(used, -log_weights, lambda family, table: family.entropy(table), self)

    @torch.no_grad()
    def kl_divergence(self, other: Parameters, root: int | None = None) -> Tensor:
        """Compute the divergence ``sum p log (p / q)`` of this circuit p from ``other``, q.

        The result is a scalar tensor in nats, possibly infinite.

        Both circuits must have the same graph and be deterministic. An assignment then has the same
        tree of nonzero units in both. The sum over flows of :meth:`entropy` therefore applies to
        ``log p / q``.

        Args:
            other: Circuit with the same graph.
            root: See :meth:`entropy`.

        Raises:
            ValueError: If the graphs differ, or if :meth:`entropy` raises it.

        Source: See :meth:`entropy`.
        """
        name = "kl_divergence"
        same = isinstance(other, Parameters) and other.graph == self.graph
        found = other.graph if isinstance(other, Parameters) else type(other).__name__
        require(same, name, "other", f"a circuit of the same graph, {self.graph}", found)
        for each in (self, other):
            _require_deterministic(each, name)
        log_weights, used = _usage(self, name, root)
        ratios = log_weights - other._log_weights()
        return _total(used, ratios, lambda family, *tables: family.divergence(*tables), self, other)

    @torch.no_grad()
    def flows(
        self, x: Tensor, external: Tensor | None = None, root: int | Tensor | None = None
    ) -> Flows:
        """Compute flows: how often a sample is expected to use each unit and weight, given ``x``.

        The flows are the derivatives of ``log p(x)`` with respect to the log-values of units and
        the normalised log-weights. Their sum over the leaf units of a variable is 1. In impossible
        rows, all flows are 0.

        Args:
            x: See :meth:`log_prob`.
            external: See :meth:`log_prob`.
            root: Index of a root unit, or ``(B,)`` with one index per row.

        Raises:
            ValueError: If there are several root units and ``root`` is missing, or if
                :meth:`log_prob` raises it.
        """
        leaf = self._leaf_values("flows", x, external)
        return _flows_of(self, "flows", leaf, self._log_weights(), root)

    @torch.no_grad()
    def em_step(
        self,
        x: Tensor,
        step: float = 1.0,
        pseudocount: float = 0.1,
        keep_zero: bool = False,
        root: int | Tensor | None = None,
    ) -> Tensor:
        """Make one step of expectation maximisation (EM) on a batch, in place.

        For a sum with I terms, weights W, flows F (see :meth:`flows`) and pseudocount c, the step
        computes ``W' = (F + c / I) / (sum F + c)`` and then ``W <- (1 - step) W + step W'``. Leaves
        are updated in the same way. Sums and leaves without flow are not changed. If the batch is
        the whole data set, ``step=1`` and ``pseudocount=0``, the mean log-likelihood never
        decreases. With a pseudocount, the sum of all log-likelihoods plus ``c / I`` times the sum
        of all log-weights never decreases.

        Our choice: a pseudocount of 0.1, a tenth of a row. Without a pseudocount, the step would
        set the probability of a value that does not occur in the batch to zero, and held-out rows
        with this value would have log-probability ``-inf``.

        Args:
            x: Data ``(B, n)``. A leaf or sum does not learn from rows in which its whole scope is
                missing, such as the padding of a short sequence.
            step: Step size in (0, 1].
            pseudocount: Count c, divided evenly among the terms of a sum or the values of a leaf.
                It does not affect Gaussians.
            keep_zero: Whether terms of weight zero keep this weight, such as the forbidden
                transitions of a left-to-right chain. Otherwise a pseudocount makes them possible.
            root: Index of the root unit to train, or ``(B,)`` with the root unit of each row.

        Returns:
            Mean log-likelihood of the batch before the step.

        Raises:
            ValueError: If the circuit is unnormalised, the data or the step are wrong, or there are
                several root units and ``root`` is missing.
        """
        finite = 0 <= pseudocount < math.inf
        _require_logits(self, "em_step")
        require(0 < step <= 1, "em_step", "step", "a number in (0, 1]", step)
        require(finite, "em_step", "pseudocount", "a number, at least 0", pseudocount)
        filled, missing = self._read("em_step", x)
        require(len(x) > 0, "em_step", "x", "at least one row", "none")
        log_weights = self._log_weights()
        leaf = self._leaf_values_of("em_step", filled, missing)
        log_prob, units, weight_flows = _flows_of(self, "em_step", leaf, log_weights, root)
        if missing.any():
            weight_flows = _seen(self, log_weights, units, weight_flows, missing)
        rows = (self._rows(t) for t in (weight_flows, log_weights, self.weights.data))
        for flow, old, target in zip(*rows, strict=True):
            extra = pseudocount / flow.shape[1]
            if keep_zero:
                there = old > -torch.inf
                extra = there * (pseudocount / there.sum(1, keepdim=True).clamp(min=1))
            total = last_sum(flow)[:, None]
            new = (flow + extra) / (total + pseudocount)
            mixed = ((1 - step) * old.exp() + step * new).log()
            target.copy_(torch.where(total > 0, mixed, target))
        for family, table, span in self._families():
            if isinstance(family, Indicator | External):
                continue
            flow = units[:, FIRST_LEAF:][:, span]
            if isinstance(family, MultivariateGaussian):  # its update accepts missing variables
                observed = self._joint_data(span, filled, missing)
            else:
                var = self._var[span]
                flow = torch.where(missing[:, var], 0, flow)
                observed = filled[:, var].to(self.weights.dtype)
            data = {k: t.data for k, t in table.items()}
            family.update(data, self._row[span], observed, flow, step, pseudocount)
        return (last_sum(log_prob.double()) / len(log_prob)).to(log_prob.dtype)
