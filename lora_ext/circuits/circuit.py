"""A circuit over a region graph as an ``nn.Module``: evaluation and queries.

Letters: ``B`` rows of data, ``n`` variables, ``R`` root units, ``N`` leaf units, ``V`` values.

Flows and learning are in ``_flows.py``, sampling in ``_sampling.py``, parameters and files in
``_parameters.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import require
from lora_ext.reference import log_weights

from . import _structure
from ._flows import FlowQueries
from ._parameters import read_file, require_tensor, signed
from ._program import Evaluate, Weights
from ._sampling import SampleQueries


class Report(NamedTuple):
    """The result of :meth:`Circuit.check`.

    Attributes:
        smooth: Whether every term of a sum has the scope of the sum.
        decomposable: Whether the factors of each product share no variable.
        structured_decomposable: Whether all products with the same scope split it into the same
            parts, as in a circuit that follows one vtree (a binary tree of variables).
        deterministic: Whether at most one term of each sum is nonzero on any input; ``"unknown"``
            if the check cannot decide.
        normalisation_error: Largest difference between 1 and the sum of the weights of a sum unit.
    """

    smooth: bool
    decomposable: bool
    structured_decomposable: bool
    deterministic: _structure.Truth
    normalisation_error: float


class Circuit(FlowQueries, SampleQueries):
    """A probabilistic circuit. All rows of data share its parameters.

    Data ``x (B, n)`` are integers or floating-point numbers. An entry is missing if it is -1 in
    integer data or NaN in floating-point data; its variable is then marginalised in its row.
    Impossible data have log-probability ``-inf`` and gradient zero, never NaN.

    Each root unit defines a distribution; several root units share their lower parts. ``log_prob``
    without ``root``, and ``log_partition``, return one value per root unit. All other queries of a
    circuit with several root units require ``root``: the index of a root unit, or a tensor ``(B,)``
    with one index per row, such as the class of each row.

    Evidence is data with missing entries, which a query fills. If ``evidence`` is None, a query
    uses rows in which all variables are missing: one row, or one per entry of a tensor ``root``.

    Args:
        graph: Structure of the circuit.
        norm: Meaning of the weights. ``"logits"``: they are log-softmaxed over the terms of each
            sum. ``"none"``: they are used as log-weights, and :meth:`log_partition` may differ from
            zero.
        precision: Precision of ``log_prob``, see ``ops.circuit_layers``; can be changed later.

    Attributes:
        weights: Log-weights of all sums, one-dimensional; :meth:`region_weights` returns the
            weights of one region.
        leaves: Tables of parameters, one per family of input distributions.

    Raises:
        PCStructureError: If the graph is not smooth and decomposable, because such a circuit could
            only be evaluated on complete data.
    """

    # --- evaluation -------------------------------------------------------------------------------
    def log_prob(
        self, x: Tensor, external: Tensor | None = None, root: int | Tensor | None = None
    ) -> Tensor:
        """Compute ``log p`` of the observed variables; missing variables are marginalised.

        The result is differentiable once in the parameters and in ``external``.

        Args:
            x: Data ``(B, n)``; -1 or NaN if a variable is missing.
            external: Log-values ``(B, N)`` of the external leaf units, if the circuit has any.
            root: Index of a root unit, or ``(B,)`` with one index per row.

        Returns:
            ``(B,)`` in the dtype of the parameters; ``(B, R)`` for R > 1 root units without
            ``root``.

        Raises:
            ValueError: If a shape, device or value is wrong; the message names the variable.
        """
        values = self._log_probs("log_prob", x, external)
        if root is not None:
            values = values.gather(1, self._root_numbers("log_prob", root, len(x))[:, None])
        return values.squeeze(1) if values.shape[1] == 1 else values

    forward = log_prob

    def _log_probs(self, name: str, x: Tensor, external: Tensor | None = None) -> Any:
        """Return the log-probabilities under each root unit, ``(B, R)``."""
        leaf, execution = self._leaf_values(name, x, external), self._run()
        if torch.is_grad_enabled():
            return Evaluate.apply(leaf, self.weights, execution, self.norm, self.precision)
        weights = Weights(self.weights.detach(), self.norm, self.precision)
        return execution.root_values(execution.up(leaf, weights))

    @torch.no_grad()
    def log_partition(self) -> Tensor:
        """Return the logarithm of the sum (or integral) of the circuit over all assignments.

        The result is 0 if the circuit is normalised.

        Returns:
            A scalar tensor, or ``(R,)`` for R > 1 root units.
        """
        self._refuse_external("log_partition")
        return self.log_prob(self._nothing())[0]

    def marginal(
        self,
        x: Tensor,
        keep: Iterable[int],
        external: Tensor | None = None,
        root: int | Tensor | None = None,
    ) -> Tensor:
        """Return the log-probability of the variables in ``keep``; the others are marginalised.

        Args:
            x: Data ``(B, n)``.
            keep: Indices of the variables to keep.
            external: See :meth:`log_prob`.
            root: See :meth:`log_prob`.

        Raises:
            ValueError: If ``keep`` contains an unknown variable, or if :meth:`log_prob` raises it.
        """
        require_tensor("marginal", "x", x)
        names = list(keep)
        wrong = [v for v in names if v not in range(self.num_variables)]
        expected = f"variables in 0 .. {self.num_variables - 1}"
        require(not wrong, "marginal", "keep", expected, wrong[:1])
        kept = torch.zeros(self.num_variables, dtype=torch.bool, device=x.device)
        kept[names] = True
        x = signed(x)
        nothing = torch.nan if x.is_floating_point() else -1
        return self.log_prob(torch.where(kept, x, nothing), external, root)

    @torch.no_grad()
    def conditionals(self, x: Tensor, root: int | Tensor | None = None) -> Tensor:
        """Compute ``log p(x_k | x_<k)`` of each variable given the variables with smaller indices.

        The circuit is evaluated n + 1 times. ``ops.circuit_scan`` needs a single pass, but supports
        only the graphs cp, hmm and btree.

        Args:
            x: Data ``(B, n)``.
            root: Index of a root unit, or ``(B,)`` with one index per row.

        Returns:
            ``(B, n)``; ``-inf`` after an impossible prefix.

        Raises:
            ValueError: If there are several root units and ``root`` is missing, or if
                :meth:`log_prob` raises it.
        """
        self._read("conditionals", x)
        top = self._root_numbers("conditionals", root, len(x))[:, None]
        x = signed(x)
        before = self._log_probs("conditionals", self._nothing()).expand(len(x), -1).gather(1, top)
        out: list[Tensor] = []
        nothing = torch.nan if x.is_floating_point() else -1
        position = torch.arange(self.num_variables, device=x.device)
        for k in range(self.num_variables):
            given = torch.where(position <= k, x, nothing)
            prefix = self._log_probs("conditionals", given).gather(1, top)
            possible = before > -torch.inf
            out.append(torch.where(possible, prefix - torch.where(possible, before, 0), before))
            before = prefix
        return torch.cat(out, 1)

    # --- structure and files ----------------------------------------------------------------------
    @torch.no_grad()
    def check(self) -> Report:
        """Check the structure and whether the weights of each sum add up to 1."""
        error = 0.0
        for rows in self._rows(self.weights):
            w = log_weights(rows, self.norm)
            error = max(error, float((w.exp().sum(-1) - 1).abs().max()))
        return Report(
            _structure.why_not_smooth(self.graph) is None,
            _structure.why_not_decomposable(self.graph) is None,
            _structure.is_structured_decomposable(self.graph),
            _structure.is_deterministic(self.graph),
            error,
        )

    @staticmethod
    def load(path: str | Path) -> Circuit:
        """Load a circuit that :meth:`save` wrote, on the CPU and in the saved dtype.

        The file is not trusted: it is checked before memory is allocated for its tensors.

        Raises:
            ValueError: If the file has unexpected content.
        """
        graph, norm, tensors = read_file(path)
        circuit = Circuit(graph, norm).to(tensors["weights"].dtype)
        circuit.load_state_dict(tensors)
        return circuit

    def to_dot(self) -> str:
        """Return the region graph in the Graphviz language."""
        return self.graph.to_dot()
