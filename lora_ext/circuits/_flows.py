"""Expected flows and the queries that use them: univariate marginals, entropy, divergence, EM.

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
from ._leaves import External, Indicator
from ._parameters import Parameters
from ._program import FIRST_LEAF, Weights
from ._scopes import variables
from ._sums import add_at, last_sum
from .multivariate import MultivariateGaussian


class Flows(NamedTuple):
    """Expected use of each unit and weight, given the data.

    Attributes:
        log_prob: Log-probability of each row, ``(B,)``.
        units: Probability that a sample given the row uses the unit, ``(B, U)``.
            ``Circuit.columns`` returns the columns of a region.
        weights: Expected use of each weight, summed over the rows, in the order of
            ``Circuit.weights``.
    """

    log_prob: Tensor
    units: Tensor
    weights: Tensor


def flows(
    circuit: Parameters, name: str, leaf: Tensor, log_weights: Tensor, root: int | Tensor | None
) -> Flows:
    """Compute ``Circuit.flows`` from log-values of the leaves and normalised log-weights."""
    execution, weights = circuit._run(), Weights(log_weights, "none")
    top = circuit._root_numbers(name, root, len(leaf))[:, None]
    val = execution.up(leaf, weights)
    log_probs = execution.root_values(val)
    log_prob = log_probs.gather(1, top)
    possible = (log_prob > -torch.inf).to(val.dtype)
    droots = torch.zeros_like(log_probs).scatter_(1, top, possible)
    units, _, weight_flows = execution.down(droots, val, weights)
    return Flows(log_prob[:, 0], units, weight_flows)


def em_step(
    circuit: Parameters,
    x: Tensor,
    step: float,
    pseudocount: float,
    keep_zero: bool,
    root: int | Tensor | None,
) -> Tensor:
    """Make one step of ``Circuit.em_step`` in place; return the mean log-likelihood before it."""
    finite = 0 <= pseudocount < math.inf
    _require_logits(circuit, "em_step")
    require(0 < step <= 1, "em_step", "step", "a number in (0, 1]", step)
    require(finite, "em_step", "pseudocount", "a number, at least 0", pseudocount)
    filled, missing = circuit._read("em_step", x)
    require(len(x) > 0, "em_step", "x", "at least one row", "none")
    log_weights = circuit._log_weights()
    leaf = circuit._leaf_values_of("em_step", filled, missing)
    log_prob, units, weight_flows = flows(circuit, "em_step", leaf, log_weights, root)
    if missing.any():
        weight_flows = _seen(circuit, log_weights, units, weight_flows, missing)
    rows = (circuit._rows(t) for t in (weight_flows, log_weights, circuit.weights.data))
    for flow, old, target in zip(*rows, strict=True):
        extra = pseudocount / flow.shape[1]
        if keep_zero:
            there = old > -torch.inf
            extra = there * (pseudocount / there.sum(1, keepdim=True).clamp(min=1))
        total = last_sum(flow)[:, None]
        new = (flow + extra) / (total + pseudocount)
        mixed = ((1 - step) * old.exp() + step * new).log()
        target.copy_(torch.where(total > 0, mixed, target))
    for family, table, span in circuit._families():
        if isinstance(family, Indicator | External):
            continue
        flow = units[:, FIRST_LEAF:][:, span]
        if isinstance(family, MultivariateGaussian):  # It handles rows with missing variables.
            observed = circuit._joint_data(span, filled, missing)
        else:
            var = circuit._var[span]
            flow = torch.where(missing[:, var], 0, flow)
            observed = filled[:, var].to(circuit.weights.dtype)
        data = {k: t.data for k, t in table.items()}
        family.update(data, circuit._row[span], observed, flow, step, pseudocount)
    return (last_sum(log_prob.double()) / len(log_prob)).to(log_prob.dtype)


def _seen(
    circuit: Parameters, log_weights: Tensor, units: Tensor, weight_flows: Tensor, missing: Tensor
) -> Tensor:
    """Return weight flows without the flows of rows in which a region's whole scope is missing.

    In such a row the posterior of a region's weights equals the prior, ``units * W``, which would
    only slow down learning. An example is the padding of a short sequence in a chain.
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
    # Both terms are rounded: a difference below 1e3 eps of `weight_flows` is rounding error.
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


def univariate_marginals(
    circuit: Parameters, evidence: Tensor, root: int | Tensor | None
) -> Marginals:
    """Compute ``Circuit.univariate_marginals``.

    The marginal of a variable is the mixture of its leaf distributions, weighted by their flows.
    """
    name = "univariate_marginals"
    filled, missing = circuit._read(name, evidence, "evidence")
    circuit._refuse_external(name)
    leaf = circuit._leaf_values_of(name, filled, missing)
    use = flows(circuit, name, leaf, circuit._log_weights(), root)
    units = use.units[:, FIRST_LEAF:]
    rows, n = filled.shape
    supports = [  # number of values of each family, 0 for a continuous family
        int(circuit._indicators[span].max()) + 1
        if isinstance(family, Indicator)
        else family.num_values() or 0
        for family, _, span in circuit._families()
    ]
    size = max(supports, default=0)
    table, mean, variance = (units.new_zeros(rows, k) for k in (n * size, n, n))
    continuous = torch.zeros(n, dtype=torch.bool, device=units.device)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for (family, parameters, span), block, values in zip(
        circuit._families(), circuit._blocks, supports, strict=True
    ):
        var, row, flow = circuit._var[span], circuit._row[span], units[:, span]
        if isinstance(family, Indicator):
            value = circuit._indicators[span]
            add_at(table, var * size + value, flow)
            center = value.to(flow.dtype)
            spread = torch.zeros_like(center)
        elif isinstance(family, MultivariateGaussian):
            data = circuit._joint_data(span, filled, missing)
            moments = family.moments_given(parameters, row, data)
            center, spread = (t.flatten(1) for t in moments)  # (B, N d)
            scopes = circuit._scopes(span)
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


def _given(
    found: Marginals, filled: Tensor, missing: Tensor, possible: Tensor, continuous: Tensor
) -> Marginals:
    """Correct the marginals of observed variables, impossible rows and continuous variables.

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


def entropy(circuit: Parameters, root: int | None) -> Tensor:
    """Compute ``Circuit.entropy``.

    In a deterministic circuit only one tree of units is nonzero for an assignment. ``log p`` is
    then a sum over the weights and leaves of this tree, and its expectation is a sum over all
    weights and leaves, multiplied by their flows.
    """
    _require_deterministic(circuit, "entropy")
    log_weights, used = _usage(circuit, "entropy", root)
    return _total(used, -log_weights, lambda family, table: family.entropy(table), circuit)


def kl_divergence(circuit: Parameters, other: Parameters, root: int | None) -> Tensor:
    """Compute ``Circuit.kl_divergence``.

    Both circuits have the same graph and are deterministic, so an assignment has the same tree of
    nonzero units in both. The sum over flows of :func:`entropy` therefore applies to ``log p / q``.
    """
    name = "kl_divergence"
    same = isinstance(other, Parameters) and other.graph == circuit.graph
    found = other.graph if isinstance(other, Parameters) else type(other).__name__
    require(same, name, "other", f"a circuit of the same graph, {circuit.graph}", found)
    for each in (circuit, other):
        _require_deterministic(each, name)
    log_weights, used = _usage(circuit, name, root)
    ratios = log_weights - other._log_weights()
    return _total(used, ratios, lambda family, *tables: family.divergence(*tables), circuit, other)


def _require_logits(circuit: Parameters, name: str) -> None:
    norm = circuit.norm
    require(norm == "logits", name, "norm", "a circuit with norm 'logits'", repr(norm))


def _require_deterministic(circuit: Parameters, name: str) -> None:
    """Raise ValueError unless a circuit is normalised, deterministic and without external leaves.

    In other circuits an assignment may have several trees of nonzero units.
    """
    _require_logits(circuit, name)
    circuit._refuse_external(name)
    known = _structure.is_deterministic(circuit.graph)
    found = "a nondeterministic one" if known is False else "one not known to be deterministic"
    remedy = "; estimate it from samples, as in -circuit.log_prob(circuit.sample(10000)[0]).mean()"
    require(known is True, name, "graph", "a deterministic circuit", found + remedy)


def _usage(circuit: Parameters, name: str, root: int | None) -> tuple[Tensor, Flows]:
    """Return the normalised log-weights and the flows of a row without observations."""
    leaf = circuit._leaf_values(name, circuit._nothing(), None)
    log_weights = circuit._log_weights()
    return log_weights, flows(circuit, name, leaf, log_weights, root)


def _total(
    used: Flows, of_weights: Tensor, of_family: Callable[..., Tensor], *circuits: Parameters
) -> Tensor:
    """Return the expectation of a sum over the weights and leaves that a sample uses.

    Args:
        used: Flows of a row without observations.
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
