"""Walks from the root down: exact samples, and the assignment of largest probability."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext.circuits import checks
from lora_ext.circuits.errors import require
from lora_ext.circuits.layered import FIRST_LEAF
from lora_ext.circuits.leaves import Indicator, Joint
from lora_ext.circuits.parameters import Parameters, require_tensor


class MapResult(NamedTuple):
    """The best tree of the circuit.

    Attributes:
        x: ``(B, n)`` assignment, evidence kept.
        value: ``(B,)`` log-probability of the assignment together with all latents.
        exact: whether ``x`` is also known to maximise ``log_prob(x)``: True only if the circuit is
            deterministic; otherwise this is max-product, an approximation of that.
    """

    x: Tensor
    value: Tensor
    exact: bool


def sample(
    circuit: Parameters,
    num_samples: int,
    evidence: Tensor | None,
    uniforms: Tensor | None,
    generator: torch.Generator | None,
    root: int | Tensor | None,
) -> Tensor:
    """``Circuit.sample``."""
    whole = type(num_samples) is int and num_samples >= 0
    require(whole, "sample: num_samples", "a whole number, at least 0", repr(num_samples))
    evidence = evidence_or_nothing(circuit, evidence, root)
    filled, missing = circuit._read("sample: evidence", evidence)
    start = circuit._root_numbers("sample", root, len(evidence))
    inner = sum(bool(r.partitions) for r in circuit.graph.regions)
    shape = (len(evidence), num_samples, inner + circuit.num_variables)
    device, dtype = circuit.weights.device, circuit.weights.dtype
    if uniforms is None:
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float32, device=device)
    else:
        _check_uniforms(uniforms, shape, device)
    circuit._refuse_external("sample")
    execution, weights = circuit._run(), circuit._weights()
    val = execution.up(circuit._leaf_values_of("sample", filled, missing), weights)
    top = execution.root_values(val).gather(1, start[:, None])[:, 0]
    impossible = (top == -torch.inf).nonzero()
    if len(impossible):
        found = "an impossible row"
        require(False, f"sample: evidence: row {int(impossible[0])}", "a possible row", found)
    u = uniforms.flatten(0, 1)
    chosen = execution.walk(val, weights, start, u[:, :inner])
    row = torch.arange(len(evidence), device=device).repeat_interleave(num_samples)
    x = room_for_values(circuit, evidence)[row]
    _fill(circuit, x, chosen, missing[row], u[:, inner:].to(dtype))
    return x.unflatten(0, (len(evidence), num_samples))


def _check_uniforms(uniforms: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    where, dtypes = "sample: uniforms", (torch.float32, torch.float64)
    require_tensor(where, uniforms)
    require(uniforms.shape == shape, where, f"shape {shape}", tuple(uniforms.shape))
    require(uniforms.dtype in dtypes, where, "float32 or float64", uniforms.dtype)
    require(uniforms.device == device, where, device, uniforms.device)
    if device.type != "cpu":
        return  # the host would wait for it
    outside = uniforms[~((uniforms >= 0) & (uniforms <= 1))]
    if len(outside):
        require(False, where, "numbers in [0, 1]", float(outside[0]))


def best(circuit: Parameters, evidence: Tensor | None, root: int | Tensor | None) -> MapResult:
    """``Circuit.map``."""
    evidence = evidence_or_nothing(circuit, evidence, root)
    filled, missing = circuit._read("map: evidence", evidence)
    start = circuit._root_numbers("map", root, len(evidence))
    val = best_values(circuit, filled, missing)
    chosen = circuit._run().walk(val, circuit._weights(), start)
    x = room_for_values(circuit, evidence)
    _fill(circuit, x, chosen, missing)
    exact = checks.is_deterministic(circuit.graph) is True
    value = circuit._run().root_values(val).gather(1, start[:, None])[:, 0]
    return MapResult(x, value, exact)


def best_values(circuit: Parameters, filled: Tensor, missing: Tensor) -> Tensor:
    """All units by max-product, where missing variables take their mode."""
    circuit._refuse_external("map")
    e = circuit._leaf_values_of("map", filled, missing).clone()
    for leaf, table, span in circuit._families():
        if isinstance(leaf, Joint):
            data = circuit._joint_data(span, filled, missing)
            e[:, span] = leaf.peak(table, circuit._row[span], data).flatten(1)
        elif not isinstance(leaf, Indicator):
            mode = leaf.mode(table, circuit._row[span])[1]
            e[:, span] = torch.where(missing[:, circuit._var[span]], mode, e[:, span])
    return circuit._run().up(e, circuit._weights(), "max")


def evidence_or_nothing(
    circuit: Parameters, evidence: Tensor | None, root: int | Tensor | None
) -> Tensor:
    """The evidence, or as many rows of nothing as there are roots to start from."""
    if evidence is not None:
        return evidence
    return circuit._nothing(len(root) if isinstance(root, Tensor) and root.dim() == 1 else 1)


def room_for_values(circuit: Parameters, evidence: Tensor) -> Tensor:
    """A copy of the evidence that can hold what is drawn."""
    continuous = any(
        leaf.num_values() is None and not isinstance(leaf, Indicator)
        for leaf, _, _ in circuit._families()
    )
    if evidence.is_floating_point():
        return evidence.clone()
    if not continuous:
        return evidence.to(torch.long, copy=True)
    floats = evidence.to(circuit.weights.dtype)
    return torch.where(evidence < 0, torch.nan, floats)


def _fill(
    circuit: Parameters, x: Tensor, chosen: Tensor, missing: Tensor, uniforms: Tensor | None = None
) -> None:
    """Write the values of the chosen leaf units into what is missing of ``x``, in place.

    They are drawn from ``uniforms``, of ``x``'s shape; None: they are the most probable.
    """
    for (leaf, table, span), block in zip(circuit._families(), circuit._blocks, strict=True):
        inside = (chosen >= span.start + FIRST_LEAF) & (chosen < span.stop + FIRST_LEAF)
        if not isinstance(leaf, Joint):
            inside &= missing
        m, v = inside.nonzero(as_tuple=True)
        unit = chosen[m, v] - FIRST_LEAF
        row = circuit._row[unit]
        if isinstance(leaf, Indicator):
            x[m, v] = circuit._indicators[unit].to(x.dtype)
        elif isinstance(leaf, Joint):
            at = m[:, None], circuit._scopes(span)[(unit - span.start) // block]
            known = torch.where(missing[at], torch.nan, x[at].to(circuit.weights.dtype))
            values = leaf.complete(table, row, known, None if uniforms is None else uniforms[at])
            x[at] = torch.where(missing[at], values.to(x.dtype), x[at])
        elif len(m):
            sought = uniforms is None
            values = leaf.mode(table, row)[0] if sought else leaf.sample(table, row, uniforms[m, v])
            x[m, v] = values.to(x.dtype)
