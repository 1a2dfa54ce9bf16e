"""Queries on top of the flows: marginals of every variable, entropy, divergence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext.circuits import checks, learning
from lora_ext.circuits._sums import add_columns
from lora_ext.circuits.errors import require
from lora_ext.circuits.layered import FIRST_LEAF
from lora_ext.circuits.leaves import Indicator, Joint, Leaf
from lora_ext.circuits.parameters import Parameters


class Marginals(NamedTuple):
    """Each variable by itself, given the evidence of its row.

    Attributes:
        log_prob: ``(B, n, V)``, ``log p(x_v = value | evidence)``; ``-inf`` for values that a
            variable does not have, NaN for a continuous variable. What the evidence gives is
            certain.
        mean: ``(B, n)`` of the value. variance: ``(B, n)``.
    """

    log_prob: Tensor
    mean: Tensor
    variance: Tensor


def univariate_marginals(
    circuit: Parameters, evidence: Tensor, root: int | Tensor | None
) -> Marginals:
    """``Circuit.univariate_marginals``: a leaf unit's flow is the probability of its distribution,
    so a variable's law is the mixture of its leaves' by their flows."""
    name = "univariate_marginals"
    filled, missing = circuit._read(f"{name}: evidence", evidence)
    circuit._refuse_external(name)
    leaf = circuit._leaf_values_of(name, filled, missing)
    flows = learning.flows(circuit, name, leaf, circuit._log_weights(), root)
    units = flows.units[:, FIRST_LEAF:]
    rows, n = filled.shape
    supports = [_num_values(circuit, family, span) for family, _, span in circuit._families()]
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
            add_columns(table, var * size + value, flow)
            center = value.to(flow.dtype)
            spread = torch.zeros_like(center)
        elif isinstance(family, Joint):
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
                add_columns(table, columns.flatten(), each.flatten(1))
            else:
                continuous[var] = True
        add_columns(mean, var, flow * center)
        parts.append((var, flow, center, spread))
    for var, flow, center, spread in parts:  # about the mean, because squares would cancel
        add_columns(variance, var, flow * (spread + (center - mean[:, var]).square()))
    found = Marginals(table.view(rows, n, size).log(), mean, variance)
    return _given(found, filled, missing, flows.log_prob > -torch.inf, continuous)


def _num_values(circuit: Parameters, family: Leaf, span: slice) -> int:
    """How many values the variables of a family take; 0 for a continuous one."""
    if isinstance(family, Indicator):
        return int(circuit._indicators[span].max()) + 1
    return family.num_values() or 0


def _given(
    found: Marginals, filled: Tensor, missing: Tensor, possible: Tensor, continuous: Tensor
) -> Marginals:
    """What the evidence says of a variable, in the place of the mixture over its leaves."""
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
    """``Circuit.entropy``: a deterministic circuit has one tree per assignment, so ``log p`` is a
    sum over what the tree uses, and its expectation a sum over the flows."""
    _require_deterministic(circuit, "entropy")
    log_weights, flows = _usage(circuit, "entropy", root)
    total = _expectation(flows.weights, -log_weights)
    for family, parameters, span in circuit._families():
        if not isinstance(family, Indicator):
            each = family.entropy(parameters)[circuit._row[span]]
            total = total + _expectation(flows.units[0, FIRST_LEAF:][span], each)
    return total


def kl_divergence(circuit: Parameters, other: Parameters, root: int | None) -> Tensor:
    """``Circuit.kl_divergence``: both have the same tree for an assignment."""
    name = "kl_divergence"
    same = isinstance(other, Parameters) and other.graph == circuit.graph
    found = "another graph" if isinstance(other, Parameters) else type(other).__name__
    require(same, f"{name}: other", "a circuit of the same graph", found)
    for each in (circuit, other):
        _require_deterministic(each, name)
    log_weights, flows = _usage(circuit, name, root)
    total = _expectation(flows.weights, log_weights - other._log_weights())
    for (family, mine, span), (_, theirs, _) in zip(
        circuit._families(), other._families(), strict=True
    ):
        if not isinstance(family, Indicator):
            each = family.divergence(mine, theirs)[circuit._row[span]]
            total = total + _expectation(flows.units[0, FIRST_LEAF:][span], each)
    return total


def _require_deterministic(circuit: Parameters, name: str) -> None:
    """Refuse circuits in which several trees may share an assignment."""
    norm = circuit.norm
    require(norm == "logits", f"{name}: norm", "a circuit of 'logits'", repr(norm))
    circuit._refuse_external(name)
    known = checks.is_deterministic(circuit.graph)
    found = "one that is not" if known is False else "one of which that is unknown"
    remedy = "; estimate it from samples: -circuit.log_prob(circuit.sample(10000)[0]).mean()"
    require(known is True, f"{name}: graph", "a deterministic circuit", found + remedy)


def _usage(circuit: Parameters, name: str, root: int | None) -> tuple[Tensor, learning.Flows]:
    """Log-weights, and how often a sample uses each part of the circuit."""
    filled, missing = circuit._read(name, circuit._nothing())
    leaf, log_weights = circuit._leaf_values_of(name, filled, missing), circuit._log_weights()
    return log_weights, learning.flows(circuit, name, leaf, log_weights, root)


def _expectation(flow: Tensor, value: Tensor) -> Tensor:
    """What is never used counts 0, also where it is infinite."""
    return torch.where(flow > 0, flow * value, 0).sum()
