"""Expected flows, and expectation maximisation from them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext.circuits._execution import Weights
from lora_ext.circuits._sums import last_sum, mean
from lora_ext.circuits.errors import require
from lora_ext.circuits.layered import FIRST_LEAF
from lora_ext.circuits.leaves import External, Indicator, Joint
from lora_ext.circuits.parameters import Parameters
from lora_ext.circuits.scopes import variables


class Flows(NamedTuple):
    """Expected use of every unit and weight, given the data.

    Attributes:
        log_prob: ``(B,)``.
        units: ``(B, U)``, the probability that a unit is on the path of a sample, given the row;
            columns as ``Circuit.columns`` gives them.
        weights: ``(num_weights,)``, summed over rows, in the order of ``Circuit.weights``.
    """

    log_prob: Tensor
    units: Tensor
    weights: Tensor


def flows(
    circuit: Parameters, name: str, leaf: Tensor, log_weights: Tensor, root: int | Tensor | None
) -> Flows:
    """``Circuit.flows``, from the values of the leaves and the normalised weights."""
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
    """``Circuit.em_step``."""
    require(circuit.norm == "logits", "em_step: norm", "a circuit of 'logits'", repr(circuit.norm))
    require(0 < step <= 1, "em_step: step", "a number in (0, 1]", step)
    finite = 0 <= pseudocount < math.inf
    require(finite, "em_step: pseudocount", "a number, at least 0", pseudocount)
    filled, missing = circuit._read("em_step: x", x)
    require(len(x) > 0, "em_step: x", "at least one row", "none")
    log_weights = circuit._log_weights()
    leaf = circuit._leaf_values_of("em_step", filled, missing)
    log_prob, units, weight_flows = flows(circuit, "em_step", leaf, log_weights, root)
    if missing.any():
        weight_flows = _seen(circuit, log_weights, units, weight_flows, missing)
    _move_sums(circuit, log_weights, weight_flows, step, pseudocount, keep_zero)
    for family, table, span in circuit._families():
        if isinstance(family, Indicator | External):
            continue
        flow = units[:, FIRST_LEAF:][:, span]
        if isinstance(family, Joint):  # which knows itself what it sees in part
            observed = circuit._joint_data(span, filled, missing)
        else:
            var = circuit._var[span]
            flow = torch.where(missing[:, var], 0, flow)
            observed = filled[:, var].to(circuit.weights.dtype)
        data = {k: t.data for k, t in table.items()}
        family.update(data, circuit._row[span], observed, flow, step, pseudocount)
    return mean(log_prob)


def _seen(
    circuit: Parameters, log_weights: Tensor, units: Tensor, flows: Tensor, missing: Tensor
) -> Tensor:
    """Flows of the weights without those of rows in which a region sees nothing at all.

    There the posterior is the prior, ``units * W``: it would only hold the weights where they are,
    as the padding of a short sequence would the transitions of a chain.
    """
    graph = circuit.graph
    scopes = torch.zeros(missing.shape[1], len(graph.regions), dtype=units.dtype)
    for i, scope in enumerate(graph.scopes):
        scopes[variables(scope), i] = 1
    blind = (~missing).to(units.dtype) @ scopes.to(units.device) == 0  # (B, regions)
    unseen = torch.zeros_like(flows)
    for i in blind.any(0).nonzero()[:, 0].tolist():
        region, first = graph.regions[i], circuit.layered.weight_off[i]
        if region.leaf is None:
            own = slice(first, first + region.units * graph.num_products(region))
            used = torch.where(blind[:, i, None], units[:, circuit.columns(i)], 0)
            weight = log_weights[own].view(region.units, -1).exp()
            unseen[own] += (weight * last_sum(used.T)[:, None]).flatten()
    # Both have rounded: what is left of their difference there is no count.
    seen = flows - unseen
    return torch.where(seen > 1e3 * torch.finfo(flows.dtype).eps * flows, seen, 0)


def _move_sums(
    circuit: Parameters,
    log_weights: Tensor,
    flows: Tensor,
    step: float,
    pseudocount: float,
    keep_zero: bool,
) -> None:
    """``W <- (1 - step) W + step W'`` of every sum that has a flow, in place."""
    rows = (circuit._rows(t) for t in (flows, log_weights, circuit.weights.data))
    for flow, old, target in zip(*rows, strict=True):
        extra = pseudocount / flow.shape[1]
        if keep_zero:
            there = old > -torch.inf
            extra = there * (pseudocount / there.sum(1, keepdim=True).clamp(min=1))
        total = last_sum(flow)[:, None]
        new = (flow + extra) / (total + pseudocount)
        mixed = ((1 - step) * old.exp() + step * new).log()
        target.copy_(torch.where(total > 0, mixed, target))
