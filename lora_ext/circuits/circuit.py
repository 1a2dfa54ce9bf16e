"""A circuit over a region graph as an ``nn.Module``: evaluation and queries.

Letters: ``B`` rows of data, ``n`` variables, ``R`` root units, ``N`` leaf units, ``V`` values.

Sampling, learning and files are implemented in other modules; the methods here document them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import require
from lora_ext.reference import log_weights

from . import _flows, _sampling, _structure
from ._flows import Flows, Marginals
from ._parameters import Parameters, read_file, require_tensor, signed
from ._program import Evaluate, Weights
from ._sampling import KBest, MapResult


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


class Circuit(Parameters):
    """A probabilistic circuit. All rows of data share its parameters.

    Data ``x (B, n)`` are integers or floating-point numbers. An entry is missing if it is -1 in
    integer data or NaN in floating-point data; its variable is then marginalised in its row.
    Impossible data have log-probability ``-inf`` and gradient zero, never NaN.

    Each root unit defines a distribution; several root units share their lower parts. ``log_prob``
    without ``root``, and ``log_partition``, return one value per root unit. All other queries of a
    circuit with several root units require ``root``: the index of a root unit, or a tensor ``(B,)``
    with one index per row, such as the class of each row.

    Evidence is data with missing entries, which a query fills. If it is None, the query uses rows
    without observations: one row, or one per entry of a tensor ``root``.

    Args:
        graph: Structure of the circuit.
        norm: Meaning of the weights. ``"logits"``: they are log-softmaxed over the terms of each
            sum. ``"none"``: they are used as log-weights, and :meth:`log_partition` is not zero.
        precision: Precision of ``log_prob``, see ``ops.circuit_layers``; can be changed later.

    Attributes:
        weights: All log-weights, flat; :meth:`region_weights` returns a view of a region's.
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
            root: Index of a root unit, or one per row, see the class.

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
        """Return the log of the sum over all assignments.

        It is 0 if the circuit is normalised.

        Returns:
            A single number, or ``(R,)`` for R > 1 root units.
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
        """Return the log-probability of the variables ``keep``; other entries of ``x`` are ignored.

        Args:
            x: Data ``(B, n)``.
            keep: Indices of the variables to keep.
            external: See :meth:`log_prob`.
            root: See :meth:`log_prob`.

        Raises:
            ValueError: If ``keep`` has an unknown variable, or if :meth:`log_prob` raises it.
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
    def univariate_marginals(self, evidence: Tensor, root: int | Tensor | None = None) -> Marginals:
        """Compute the marginal distribution of each variable given the evidence, in one upward and
        one downward pass.

        Args:
            evidence: Data ``(B, n)``; -1 or NaN if a variable is missing.
            root: Index of a root unit, or one per row, see the class.

        Returns:
            Log-probabilities of all values ``(B, n, V)``, means and variances ``(B, n)``. For
            impossible evidence the log-probabilities are ``-inf``, and means and variances NaN.
            Probabilities below the smallest number of the dtype are 0.

        Raises:
            ValueError: If the circuit has external leaves; if it has several root units and
                ``root`` is missing; or if :meth:`log_prob` raises it.
        """
        return _flows.univariate_marginals(self, evidence, root)

    @torch.no_grad()
    def entropy(self, root: int | None = None) -> Tensor:
        """Compute the entropy in nats, a single number.

        For continuous variables this is the differential entropy.

        Args:
            root: Index of a root unit; required if there are several.

        Raises:
            ValueError: If the circuit is not known to be deterministic (:meth:`check`), because
                no formula whose size is linear in the circuit is known for other circuits; or if
                the circuit is unnormalised or has external leaves.

        Source: Vergari et al. 2021, "A compositional atlas of tractable circuit operations".
        """
        return _flows.entropy(self, root)

    @torch.no_grad()
    def kl_divergence(self, other: Circuit, root: int | None = None) -> Tensor:
        """Compute the divergence ``sum p log (p / q)`` of this circuit p from ``other``, q.

        The result is a single number in nats, possibly infinite.

        Args:
            other: Circuit with the same graph.
            root: See :meth:`entropy`.

        Raises:
            ValueError: If the graphs differ, or if :meth:`entropy` raises it.

        Source: See :meth:`entropy`.
        """
        return _flows.kl_divergence(self, other, root)

    @torch.no_grad()
    def conditionals(self, x: Tensor, root: int | Tensor | None = None) -> Tensor:
        """Compute ``log p(x_k | x_<k)`` of each variable given the variables with smaller indices.

        This takes n passes for any graph. ``ops.circuit_scan`` takes one pass, but only supports
        the graphs cp, hmm and btree.

        Args:
            x: Data ``(B, n)``.
            root: Index of a root unit, or one per row, see the class.

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

    # --- sampling and maximisation ----------------------------------------------------------------
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

        An upward pass with the evidence computes the values of all units. Then a walk descends from
        the root: at each sum it draws a term with probability proportional to weight times value,
        and at each leaf it draws a value. ``reference._circuit.draw`` defines a draw.

        Args:
            num_samples: Number S of samples per row of evidence.
            evidence: Data ``(B, n)`` with missing entries, or None, see the class.
            uniforms: Uniform numbers ``(B, S, sum regions + n)`` in [0, 1), float32 or float64: one
                per region of sums in graph order, then one per variable. If None, they are drawn
                with ``generator``.
            generator: Generator of the uniform numbers; None for torch's default.
            root: Index of a root unit, or one per row, see the class. Variables outside its scope
                stay missing.

        Returns:
            ``(B, S, n)``: floating if the evidence is, or if a family has continuous values;
            otherwise int64.

        Raises:
            ValueError: If a shape is wrong, the evidence is impossible, the circuit has external
                leaves, or it has several root units and ``root`` is missing. On the CPU also if a
                uniform number is outside [0, 1].
        """
        return _sampling.sample(self, num_samples, evidence, uniforms, generator, root)

    @torch.no_grad()
    def map(self, evidence: Tensor | None = None, root: int | Tensor | None = None) -> MapResult:
        """Find the values and latents with the largest joint probability, by max-product.

        Ties are resolved to the lowest index.

        Args:
            evidence: Data ``(B, n)`` with missing entries, or None, see the class.
            root: Index of a root unit, or one per row, see the class.

        Raises:
            ValueError: If a shape is wrong, the circuit has external leaves, or it has several root
                units and ``root`` is missing.
        """
        return _sampling.best(self, evidence, root)

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
            evidence: Data ``(B, n)`` with missing entries, or None, see the class.
            lengths: Length of each row's sequence, ``(B,)`` integers in ``1 .. n``. Variables after
                the end stay missing. None for n.
            root: Index of a root unit, or one per row, see the class.

        Raises:
            ValueError: If the graph is not a chain, a leaf is external, a continuous variable is
                missing with k above 1, or an argument is out of range.

        Source: list Viterbi decoding, Seshadri and Sundberg 1994.
        """
        return _sampling.k_best(self, k, evidence, lengths, root)

    # --- learning ---------------------------------------------------------------------------------
    @torch.no_grad()
    def flows(
        self, x: Tensor, external: Tensor | None = None, root: int | Tensor | None = None
    ) -> Flows:
        """Compute expected flows: the posterior probability that a unit or a weight is used.

        Flows are the derivatives of ``log p(x)`` with respect to the log-values of units and the
        normalised log-weights. They sum to 1 over the leaf units of a variable, and are 0 in
        impossible rows.

        Args:
            x: See :meth:`log_prob`.
            external: See :meth:`log_prob`.
            root: Index of a root unit, or one per row, see the class.

        Raises:
            ValueError: If there are several root units and ``root`` is missing, or if
                :meth:`log_prob` raises it.
        """
        leaf = self._leaf_values("flows", x, external)
        return _flows.flows(self, "flows", leaf, self._log_weights(), root)

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
        return _flows.em_step(self, x, step, pseudocount, keep_zero, root)

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
