"""Queries that choose values from the root down: samples, most probable values, k best paths.

Letters: ``B`` rows of data, ``n`` variables, ``S`` samples per row; in a chain, ``r`` states, ``J``
candidate values of a variable, ``O`` units of a latent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import integer, require
from lora_ext.reference import log_weights

from . import _structure
from ._leaves import COUNT, Indicator
from ._parameters import Parameters, require_tensor
from ._program import FIRST_LEAF
from ._regions import variables
from .multivariate import MultivariateGaussian


class MapResult(NamedTuple):
    """The most probable values and latents of each row.

    Attributes:
        x: Values ``(B, n)`` of all variables; observed values are those of the evidence.
        value: Log-probability ``(B,)`` of the values and the latents.
        exact: True if the circuit is known to be deterministic, so that ``x`` also maximises
            ``log_prob(x)``. Otherwise ``x`` is the max-product approximation.
    """

    x: Tensor
    value: Tensor
    exact: bool


class _Evidence(NamedTuple):
    """Checked rows of evidence and the root unit of each."""

    given: Tensor  # (B, n), the evidence as passed
    filled: Tensor  # (B, n), the evidence with 0 for missing entries
    missing: Tensor  # (B, n) bool, True for missing entries
    start: Tensor  # (B,), index of the root unit

    @classmethod
    def read(
        cls, circuit: Parameters, name: str, evidence: Tensor | None, root: int | Tensor | None
    ) -> _Evidence:
        """Check the evidence and the roots.

        If ``evidence`` is None, all variables are missing, in one row or one per entry of ``root``.
        """
        if evidence is None:
            rows = len(root) if isinstance(root, Tensor) and root.dim() == 1 else 1
            evidence = circuit._nothing(rows)
        filled, missing = circuit._read(name, evidence, "evidence")
        start = circuit._root_numbers(name, root, len(evidence))
        circuit._refuse_external(name)
        return cls(evidence, filled, missing, start)

    def room(self, circuit: Parameters) -> Tensor:
        """Return a copy of the evidence in a dtype that can represent the drawn values."""
        if self.given.is_floating_point():
            return self.given.clone()
        families = [family for family, _, _ in circuit._families()]
        if all(f.num_values() is not None or isinstance(f, Indicator) for f in families):
            return self.given.to(torch.long, copy=True)
        return torch.where(self.given < 0, torch.nan, self.given.to(circuit.weights.dtype))


def best_values(circuit: Parameters, filled: Tensor, missing: Tensor) -> Tensor:
    """Return the log-values of all units by max-product.

    For a missing variable, each leaf unit has the log-probability of its most probable value.
    """
    leaves = circuit._leaf_values_of("map", filled, missing).clone()
    for leaf, table, span in circuit._families():
        if isinstance(leaf, MultivariateGaussian):
            data = circuit._joint_data(span, filled, missing)
            leaves[:, span] = leaf.peak(table, circuit._row[span], data).flatten(1)
        elif not isinstance(leaf, Indicator):
            mode = leaf.mode(table, circuit._row[span])[1]
            absent = missing[:, circuit._var[span]]
            leaves[:, span] = torch.where(absent, mode, leaves[:, span])
    return circuit._run().up(leaves, circuit._weights(), "max")


def _fill(
    circuit: Parameters, x: Tensor, chosen: Tensor, missing: Tensor, uniforms: Tensor | None = None
) -> None:
    """Write values of the chosen leaf units into the missing entries of ``x``, in place.

    The values are drawn with ``uniforms``, which has the shape of ``x``. With None, the values are
    the most probable ones.
    """
    for (leaf, table, span), block in zip(circuit._families(), circuit._blocks, strict=True):
        inside = (chosen >= span.start + FIRST_LEAF) & (chosen < span.stop + FIRST_LEAF)
        if not isinstance(leaf, MultivariateGaussian):
            inside &= missing
        m, v = inside.nonzero(as_tuple=True)
        unit = chosen[m, v] - FIRST_LEAF
        row = circuit._row[unit]
        if isinstance(leaf, Indicator):
            x[m, v] = circuit._indicators[unit].to(x.dtype)
        elif isinstance(leaf, MultivariateGaussian):
            at = m[:, None], circuit._scopes(span)[(unit - span.start) // block]
            known = torch.where(missing[at], torch.nan, x[at].to(circuit.weights.dtype))
            values = leaf.complete(table, row, known, None if uniforms is None else uniforms[at])
            x[at] = torch.where(missing[at], values.to(x.dtype), x[at])
        elif len(m):
            sought = uniforms is None
            values = leaf.mode(table, row)[0] if sought else leaf.sample(table, row, uniforms[m, v])
            x[m, v] = values.to(x.dtype)


# --- the k best pairs of values and states of a chain: list Viterbi decoding ----------------------
class KBest(NamedTuple):
    """The k best pairs of values and states, best first.

    If there are fewer than k possible pairs, the results are padded: ``x`` and ``states`` with -1
    (NaN for floating ``x``), ``value`` with ``-inf``.

    Attributes:
        x: Values ``(B, k, n)``; observed values are those of the evidence.
        states: State of each variable, ``(B, k, n)``: the index of the leaf unit in its region.
        value: Log-probability ``(B, k)`` of values and states.
    """

    x: Tensor
    states: Tensor
    value: Tensor


class _Step(NamedTuple):
    """Indices that describe a position of a chain: latent region, input region and variable."""

    latent: int
    input: int
    variable: int


class _Choice(NamedTuple):
    """Choices at one position of the chain, to read back the best pairs of values and states.

    A candidate of a state is one of its k best continuations from this position to the end. All
    choices are indices ``(B, r, k)``.
    """

    step: _Step
    inside: Tensor  # (B,), whether the position is before the end of a row's sequence
    state: Tensor  # state of this position, by unit of the latent
    rank: Tensor  # candidate of this state, by unit of the latent
    value: Tensor  # rank of the value among all values of its state, by state
    below: Tensor  # candidate of the next position, by state


def _chain(circuit: Parameters) -> list[_Step]:
    """Return the positions of a chain, root first; raise ValueError if the graph is not a chain."""
    graph, regions = circuit.graph, circuit.graph.regions
    expected = "a chain, in which a latent's children are an input of one variable and a latent"
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
        require(good, "k_best", "graph", expected, f"unit {graph.label(latent)}")
        steps.append(_Step(latent, inputs[0], variables(regions[inputs[0]].variables)[0]))
        latent = rest[0] if rest else None
    return steps


def _lengths(lengths: Tensor | None, rows: int, most: int, device: torch.device) -> Tensor:
    if lengths is None:
        return torch.full((rows,), most, device=device)
    require_tensor("k_best", "lengths", lengths)
    found = f"{lengths.dtype} of shape {tuple(lengths.shape)}"
    whole = not lengths.is_floating_point() and lengths.dtype != torch.bool
    whole = whole and lengths.shape == (rows,)
    require(whole, "k_best", "lengths", f"integers of shape ({rows},)", found)
    wrong = lengths[(lengths < 1) | (lengths > most)]
    require(len(wrong) == 0, "k_best", "lengths", f"values in 1 .. {most}", wrong[:1].tolist())
    return lengths.to(device)


def _observed(circuit: Parameters, step: _Step, leaf: Tensor, missing: Tensor, k: int) -> Tensor:
    """Return the log-probabilities of a variable's candidate values, best first, ``(B, r, J)``.

    An observed variable has one candidate.
    """
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
    """Return the k most probable values in each state, and their log-probabilities, ``(r, J)``."""
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
        name, expected = f"variable {step.variable}", "evidence for a continuous variable, or k = 1"
        require(k == 1, "k_best", name, expected, f"k = {k}")
        every = torch.arange(len(units), device=circuit.weights.device)
        value, log_prob = family.mode(table, every)
        return value.view(-1, 1), log_prob[:, None]
    log_prob, value = _largest(family.log_table(table), k)
    return value, log_prob


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of the last axis and their indices; ties keep their order."""
    found, index = values.sort(dim=-1, descending=True, stable=True)
    return found[..., :k], index[..., :k]


def _read_back(
    circuit: Parameters, rows: _Evidence, choices: list[_Choice], value: Tensor, k: int
) -> KBest:
    """Follow the choices from the root down to the k best pairs of values and states."""
    batch, count = value.shape
    row = torch.arange(batch, device=value.device)[:, None]
    room = rows.room(circuit)
    x = room[:, None].repeat(1, count, 1)
    states = torch.full(x.shape, -1, device=value.device)
    possible = value > -torch.inf
    unit = rows.start[:, None].expand(batch, count)
    rank = torch.arange(count, device=value.device).expand(batch, count)
    for choice in choices:
        state, rank = choice.state[row, unit, rank], choice.rank[row, unit, rank]
        inside, v = choice.inside[:, None] & possible, choice.step.variable
        states[..., v] = torch.where(inside, state, -1)
        absent = torch.isnan(room[:, v]) if room.is_floating_point() else room[:, v] < 0
        if absent.any():
            best = _values(circuit, choice.step, k)[0][state, choice.value[row, state, rank]]
            x[..., v] = torch.where(absent[:, None] & inside, best.to(x.dtype), x[..., v])
        unit, rank = state, choice.below[row, state, rank]
    nothing = torch.nan if x.is_floating_point() else -1
    x = torch.where(possible[..., None], x, nothing)
    if count < k:
        pad, extra = torch.nn.functional.pad, k - count
        x, states = pad(x, (0, 0, 0, extra), value=nothing), pad(states, (0, 0, 0, extra), value=-1)
        value = pad(value, (0, extra), value=-torch.inf)
    return KBest(x, states, value)


class SampleQueries(Parameters):
    """Base class of ``Circuit`` that adds the queries that draw or choose values."""

    @torch.no_grad()
    def sample(
        self,
        num_samples: int = 1,
        evidence: Tensor | None = None,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
        root: int | Tensor | None = None,
    ) -> Tensor:
        """Draw exact samples given evidence; the same uniforms give the same samples.

        An upward pass with the evidence computes the values of all units. Then, from the root down,
        a term of each sum is drawn with probability proportional to weight times value, and a value
        at each leaf. ``reference._circuit.draw`` defines how a uniform number selects an index.

        Args:
            num_samples: Number S of samples per row of evidence.
            evidence: Data ``(B, n)`` with missing entries; None if all variables are missing.
            uniforms: Uniform numbers ``(B, S, sum regions + n)`` in [0, 1), float32 or float64: one
                per region of sums in graph order, then one per variable. If None, they are drawn
                with ``generator``.
            generator: Generator of the uniform numbers; None for torch's default.
            root: Index of a root unit, or ``(B,)`` with one index per row. Variables outside the
                scope of the root unit stay missing.

        Returns:
            ``(B, S, n)``: floating if the evidence is, or if a family has continuous values;
            otherwise int64.

        Raises:
            ValueError: If a shape is wrong, the evidence is impossible, the circuit has external
                leaves, or it has several root units and ``root`` is missing. On the CPU also if a
                uniform number is outside [0, 1].
        """
        integer("sample", "num_samples", num_samples, 0, expected="a whole number, at least 0")
        rows = _Evidence.read(self, "sample", evidence, root)
        inner = sum(bool(r.partitions) for r in self.graph.regions)
        shape = (len(rows.given), num_samples, inner + self.num_variables)
        device, dtype = self.weights.device, self.weights.dtype
        if uniforms is None:
            uniforms = torch.rand(shape, generator=generator, dtype=torch.float32, device=device)
        else:
            where, dtypes = ("sample", "uniforms"), (torch.float32, torch.float64)
            require_tensor(*where, uniforms)
            require(uniforms.shape == shape, *where, f"shape {shape}", tuple(uniforms.shape))
            require(uniforms.dtype in dtypes, *where, "float32 or float64", uniforms.dtype)
            require(uniforms.device == device, *where, device, uniforms.device)
            if device.type == "cpu":  # On a GPU the check would make the host wait.
                outside = uniforms[~((uniforms >= 0) & (uniforms <= 1))]
                if len(outside):
                    found = float(outside[0])
                    raise ValueError(f"sample: uniforms: expected numbers in [0, 1], found {found}")
        execution, weights = self._run(), self._weights()
        leaf = self._leaf_values_of("sample", rows.filled, rows.missing)
        val = execution.up(leaf, weights)
        top = execution.root_values(val).gather(1, rows.start[:, None])[:, 0]
        impossible = (top == -torch.inf).nonzero()
        if len(impossible):
            where = f"sample: evidence: row {int(impossible[0])}"
            raise ValueError(f"{where}: expected a possible row, found log-probability -inf")
        u = uniforms.flatten(0, 1)
        chosen = execution.walk(val, weights, rows.start, u[:, :inner])
        row = torch.arange(len(rows.given), device=device).repeat_interleave(num_samples)
        x = rows.room(self)[row]
        _fill(self, x, chosen, rows.missing[row], u[:, inner:].to(dtype))
        return x.unflatten(0, (len(rows.given), num_samples))

    @torch.no_grad()
    def map(self, evidence: Tensor | None = None, root: int | Tensor | None = None) -> MapResult:
        """Find the values and latents with the largest joint probability, by max-product.

        Ties are resolved to the lowest index.

        Args:
            evidence: Data ``(B, n)`` with missing entries; None if all variables are missing.
            root: Index of a root unit, or ``(B,)`` with one index per row.

        Raises:
            ValueError: If a shape is wrong, the circuit has external leaves, or it has several root
                units and ``root`` is missing.
        """
        rows = _Evidence.read(self, "map", evidence, root)
        val = best_values(self, rows.filled, rows.missing)
        execution = self._run()
        chosen = execution.walk(val, self._weights(), rows.start)
        x = rows.room(self)
        _fill(self, x, chosen, rows.missing)
        exact = _structure.is_deterministic(self.graph) is True
        return MapResult(x, execution.root_values(val).gather(1, rows.start[:, None])[:, 0], exact)

    @torch.no_grad()
    def k_best(
        self,
        k: int,
        evidence: Tensor | None = None,
        lengths: Tensor | None = None,
        root: int | Tensor | None = None,
    ) -> KBest:
        """Find the k most probable pairs of values and states of a chain.

        A chain is a graph such as ``RegionGraph.hmm``; a pair consists of the values of all
        variables and the path of states. With complete evidence these are the k best paths. Ties
        are resolved to the lowest indices. With r states, the method allocates ``B r^2 k`` numbers.

        Args:
            k: Number of pairs, at least 1.
            evidence: Data ``(B, n)`` with missing entries; None if all variables are missing.
            lengths: Length of each row's sequence, ``(B,)`` integers in ``1 .. n``. Variables after
                the end stay missing. None for n.
            root: Index of a root unit, or ``(B,)`` with one index per row.

        Raises:
            ValueError: If the graph is not a chain, a leaf is external, a continuous variable is
                missing with k above 1, or an argument is out of range.

        Source: list Viterbi decoding, Seshadri and Sundberg 1994.
        """
        integer("k_best", "k", k, 1, expected=COUNT)
        steps = _chain(self)
        rows = _Evidence.read(self, "k_best", evidence, root)
        lengths = _lengths(lengths, len(rows.given), len(steps), rows.start.device)
        leaf = self._leaf_values_of("k_best", rows.filled, rows.missing)
        below: Tensor | None = None  # candidates of the next position, (B, r, k)
        choices: list[_Choice] = []
        for place in range(len(steps) - 1, -1, -1):
            step = steps[place]
            each = _observed(self, step, leaf, rows.missing, k)  # (B, r, J)
            if below is not None:
                inside = (lengths > place + 1)[:, None, None]
                certain = torch.full_like(below, -torch.inf)
                certain[..., 0] = 0
                below = torch.where(inside, below, certain)
            width = 1 if below is None else below.shape[2]
            joint = each[..., None] if below is None else each[..., None] + below[:, :, None]
            candidates, index = _largest(joint.flatten(2), k)
            w = log_weights(self.region_weights(step.latent).detach(), self.norm)
            terms = (w[..., None] + candidates[:, None]).flatten(2)  # (B, O, r k)
            below, chosen = _largest(terms, k)
            count = candidates.shape[2]
            parts = chosen // count, chosen % count, index // width, index % width
            choices.append(_Choice(step, lengths > place, *parts))
        assert below is not None
        row = torch.arange(len(rows.given), device=lengths.device)
        return _read_back(self, rows, choices[::-1], below[row, rows.start], k)
