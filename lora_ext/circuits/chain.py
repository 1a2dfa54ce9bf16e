"""The k best of a chain: Viterbi's recursion with k candidates where it keeps one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext.circuits.errors import require
from lora_ext.circuits.layered import FIRST_LEAF
from lora_ext.circuits.leaves import Indicator
from lora_ext.circuits.parameters import Parameters, require_tensor
from lora_ext.circuits.sampling import evidence_or_nothing, room_for_values
from lora_ext.circuits.scopes import variables
from lora_ext.reference import log_weights


class KBest(NamedTuple):
    """The best pairs of values and states, best first; where there are fewer, -1 and ``-inf``.

    Attributes:
        x: ``(B, k, n)``, evidence kept.
        states: ``(B, k, n)``, the leaf unit of each variable.
        value: ``(B, k)``, log-probability of values and states together.
    """

    x: Tensor
    states: Tensor
    value: Tensor


class _Step(NamedTuple):
    """A place of the chain: its latent, and the input that it sees."""

    latent: int
    input: int
    variable: int


class _Choice(NamedTuple):
    """How the candidates of a place came about, all ``(B, r, k)``: indices into what they join."""

    state: Tensor  # of this place, below a unit of the latent
    rank: Tensor  # which candidate of that state
    value: Tensor  # by state: which of its values
    below: Tensor  # by state: which candidate of the next place


def k_best(
    circuit: Parameters,
    k: int,
    evidence: Tensor | None,
    lengths: Tensor | None,
    root: int | Tensor | None,
) -> KBest:
    """``Circuit.k_best``."""
    whole = isinstance(k, int) and not isinstance(k, bool) and k >= 1
    require(whole, "k_best: k", "a whole number, at least 1", repr(k))
    steps = _chain(circuit)
    evidence = evidence_or_nothing(circuit, evidence, root)
    filled, missing = circuit._read("k_best: evidence", evidence)
    circuit._refuse_external("k_best")
    top = circuit._root_numbers("k_best", root, len(evidence))
    lengths = _lengths(lengths, len(evidence), len(steps), top.device)
    leaf = circuit._leaf_values_of("k_best", filled, missing)
    below: Tensor | None = None  # (B, r, k) of the next place
    choices: list[_Choice] = []
    for place in range(len(steps) - 1, -1, -1):
        step = steps[place]
        each = _observed(circuit, step, leaf, missing, k)  # (B, r, J)
        if below is not None:
            inside = (lengths > place + 1)[:, None, None]
            certain = torch.full_like(below, -torch.inf)
            certain[..., 0] = 0
            below = torch.where(inside, below, certain)
        width = 1 if below is None else below.shape[2]
        joint = each[..., None] if below is None else each[..., None] + below[:, :, None]
        candidates, index = _largest(joint.flatten(2), k)
        w = log_weights(circuit.region_weights(step.latent).detach(), circuit.norm)
        terms = (w[..., None] + candidates[:, None]).flatten(2)  # (B, O, r k)
        below, chosen = _largest(terms, k)
        count = candidates.shape[2]
        choices.append(_Choice(chosen // count, chosen % count, index // width, index % width))
    assert below is not None
    rows = torch.arange(len(top), device=top.device)
    return _read_back(circuit, steps, choices[::-1], below[rows, top], evidence, lengths, top, k)


def _chain(circuit: Parameters) -> list[_Step]:
    """The places of a chain from the root down."""
    graph, regions = circuit.graph, circuit.graph.regions
    expected = "a chain, each latent above one input of one variable and the next latent"
    steps: list[_Step] = []
    latent: int | None = graph.roots[0]
    while latent is not None:
        region = regions[latent]
        children = region.partitions[0].children if region.partitions else ()
        inputs = [c for c in children if regions[c].leaf is not None]
        rest = [c for c in children if regions[c].leaf is None]
        good = (
            len(graph.roots) == 1
            and len(region.partitions) == 1
            and region.partitions[0].kind == "hadamard"
            and len(inputs) == 1
            and len(rest) <= 1
            and regions[inputs[0]].variables.bit_count() == 1
        )
        require(good, "k_best: graph", expected, f"unit {graph.label(latent)}")
        steps.append(_Step(latent, inputs[0], variables(regions[inputs[0]].variables)[0]))
        latent = rest[0] if rest else None
    return steps


def _lengths(lengths: Tensor | None, rows: int, most: int, device: torch.device) -> Tensor:
    if lengths is None:
        return torch.full((rows,), most, device=device)
    require_tensor("k_best: lengths", lengths)
    found = f"{lengths.dtype} of shape {tuple(lengths.shape)}"
    whole = not lengths.is_floating_point() and lengths.dtype != torch.bool
    whole = whole and lengths.shape == (rows,)
    require(whole, "k_best: lengths", f"integers of shape ({rows},)", found)
    wrong = lengths[(lengths < 1) | (lengths > most)]
    require(len(wrong) == 0, "k_best: lengths", f"1 .. {most}", wrong[:1].tolist())
    return lengths.to(device)


def _observed(circuit: Parameters, step: _Step, leaf: Tensor, missing: Tensor, k: int) -> Tensor:
    """Log-probabilities of the values that a place may take, best first, ``(B, r, J)``."""
    first = circuit.columns(step.input)[0] - FIRST_LEAF
    given = leaf[:, first : first + len(circuit.columns(step.input)), None]
    absent = missing[:, step.variable]
    if not absent.any():
        return given
    _, values = _values(circuit, step, k)  # (r, J)
    alone = torch.full((*given.shape[:2], values.shape[1]), -torch.inf).to(values)
    alone[..., :1] = given
    return torch.where(absent[:, None, None], values, alone)


def _values(circuit: Parameters, step: _Step, k: int) -> tuple[Tensor, Tensor]:
    """The best values of each state of a place, and their log-probabilities, ``(r, J)`` each."""
    units = circuit.columns(step.input)
    first = units[0] - FIRST_LEAF
    span = slice(first, first + len(units))
    family = circuit.graph.regions[step.input].leaf
    assert family is not None
    if isinstance(family, Indicator):
        value = circuit._indicators[span, None]
        return value, torch.zeros_like(value, dtype=circuit.weights.dtype)
    table = {name: t.detach() for name, t in circuit.region_leaves(step.input).items()}
    if family.num_values() is None:
        where = f"k_best: variable {step.variable}"
        require(k == 1, where, "evidence, or k = 1, of a continuous variable", f"k = {k}")
        every = torch.arange(len(units), device=circuit.weights.device)
        value, log_prob = family.mode(table, every)
        return value.view(-1, 1), log_prob[:, None]
    log_prob, value = _largest(family.log_table(table), k)
    return value, log_prob


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last axis and their indices, lowest index first among equals."""
    found, index = values.sort(dim=-1, descending=True, stable=True)
    return found[..., :k], index[..., :k]


def _read_back(
    circuit: Parameters,
    steps: list[_Step],
    choices: list[_Choice],
    value: Tensor,
    evidence: Tensor,
    lengths: Tensor,
    top: Tensor,
    k: int,
) -> KBest:
    """Follow the choices from the root down."""
    rows, count = value.shape
    row = torch.arange(rows, device=value.device)[:, None]
    room = room_for_values(circuit, evidence)
    x = room[:, None].repeat(1, count, 1)
    states = torch.full(x.shape, -1, device=value.device)
    unit, rank = top[:, None].expand(rows, count), torch.arange(count, device=value.device)
    rank = rank.expand(rows, count)
    for place, (step, choice) in enumerate(zip(steps, choices, strict=True)):
        state = choice.state[row, unit, rank]
        rank = choice.rank[row, unit, rank]
        inside = (lengths > place)[:, None] & (value > -torch.inf)
        states[..., step.variable] = torch.where(inside, state, -1)
        absent = torch.isnan(room) if room.is_floating_point() else room < 0
        if absent[:, step.variable].any():
            best = _values(circuit, step, k)[0][state, choice.value[row, state, rank]]
            chosen = torch.where(
                absent[:, step.variable, None] & inside, best.to(x.dtype), x[..., step.variable]
            )
            x[..., step.variable] = chosen
        unit, rank = state, choice.below[row, state, rank]
    nothing = torch.nan if x.is_floating_point() else -1
    x = torch.where((value > -torch.inf)[..., None], x, nothing)
    if count < k:
        extra = k - count
        pad = torch.nn.functional.pad
        x, states = pad(x, (0, 0, 0, extra), value=nothing), pad(states, (0, 0, 0, extra), value=-1)
        value = pad(value, (0, extra), value=-torch.inf)
    return KBest(x, states, value)
