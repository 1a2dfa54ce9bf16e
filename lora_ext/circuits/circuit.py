"""A circuit over a region graph as an ``nn.Module``: evaluation and queries.

Sampling, learning and files are implemented in other modules and documented by the methods here.
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
        structured_decomposable: Whether all products split a scope in one way, as one vtree does.
        deterministic: Whether at most one term of each sum is nonzero on any input; ``"unknown"``
            if the check cannot decide.
        normalisation_error: Largest distance of a sum of weights from 1.
    """

    smooth: bool
    decomposable: bool
    structured_decomposable: bool
    deterministic: _structure.Truth
    normalisation_error: float


class Circuit(Parameters):
    """A probabilistic circuit whose parameters are shared by all rows of data.

    Data ``x (B, n)`` are integers, where -1 marginalises a variable in its row, or floating, where
    NaN does. Impossible data have log-probability ``-inf`` and gradient zero, never NaN.

    A circuit with several root units has several distributions that share their lower parts.
    ``log_prob`` without ``root`` returns all of them. Every other query needs ``root``: the index
    of one of them, or a tensor ``(B,)`` with one index per row, such as the class of each row.

    Evidence is data with missing entries, which a query fills. None is one row without
    observations, or one per entry of ``root``.

    Args:
        graph: The structure.
        norm: ``"logits"``: weights are log-softmaxed over each sum. ``"none"``: log-weights are
            used as they are, and :meth:`log_partition` is not zero.
        precision: Precision of ``log_prob``, see ``ops.circuit_layers``; may be set later.

    Attributes:
        weights: All log-weights, flat; :meth:`region_weights` is a view of those of a region.
        leaves: For each family of inputs, its table of parameters.

    Raises:
        PCStructureError: If the graph is not smooth and decomposable; only evaluation of complete
            data would have a meaning.
    """

    # --- evaluation -------------------------------------------------------------------------------
    def log_prob(
        self, x: Tensor, external: Tensor | None = None, root: int | Tensor | None = None
    ) -> Tensor:
        """Compute ``log p`` of the observed variables; missing ones are marginalised.

        The result is once differentiable in the parameters and in ``external``.

        Args:
            x: ``(B, n)``, -1 or NaN where a variable is missing.
            external: ``(B, N)`` log-values of the external leaf units, if there are any.
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
        """Return the log of the sum over all assignments, one number or ``(R,)``; 0 if the circuit
        is normalised.
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
        """Return ``log p(x_keep)``; the other variables of ``x`` are ignored.

        Args:
            x: ``(B, n)``.
            keep: Variables by number.
            external: See :meth:`log_prob`.
            root: See :meth:`log_prob`.

        Raises:
            ValueError: If ``keep`` has an unknown variable, and as :meth:`log_prob`.
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
            evidence: ``(B, n)``, -1 or NaN where a variable is missing.
            root: Index of a root unit, or one per row, see the class.

        Returns:
            Log-probabilities of all values ``(B, n, V)``, means and variances ``(B, n)``. Rows of
            impossible evidence have ``-inf`` and NaN. Probabilities below the smallest number of
            the dtype are 0.

        Raises:
            ValueError: As :meth:`log_prob`, for external leaves, and if ``root`` is missing for
                several root units.
        """
        return _flows.univariate_marginals(self, evidence, root)

    @torch.no_grad()
    def entropy(self, root: int | None = None) -> Tensor:
        """Compute the entropy in nats, a single number; the differential entropy for continuous
        variables.

        Args:
            root: Index of one of several root units.

        Raises:
            ValueError: If the circuit is not known to be deterministic (:meth:`check`): no formula
                of its size is known for others. Also for unnormalised circuits and external leaves.

        Source: Vergari et al. 2021, "A compositional atlas of tractable circuit operations".
        """
        return _flows.entropy(self, root)

    @torch.no_grad()
    def kl_divergence(self, other: Circuit, root: int | None = None) -> Tensor:
        """Compute the divergence ``sum p log (p / q)`` in nats, a single number, possibly infinite;
        q is ``other``.

        Args:
            other: A circuit of the same graph.
            root: See :meth:`entropy`.

        Raises:
            ValueError: If the graphs differ, and as :meth:`entropy`.

        Source: as :meth:`entropy`.
        """
        return _flows.kl_divergence(self, other, root)

    @torch.no_grad()
    def conditionals(self, x: Tensor, root: int | Tensor | None = None) -> Tensor:
        """Compute ``log p(x_k | x_<k)`` in variable order, ``(B, n)``; ``-inf`` after an impossible
        prefix.

        This needs n passes for any graph; ``ops.circuit_scan`` needs one for cp, hmm and btree.

        Args:
            x: ``(B, n)``.
            root: Index of a root unit, or one per row, see the class.

        Raises:
            ValueError: As :meth:`log_prob`, and if ``root`` is missing for several root units.
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

        An upward pass with the evidence is followed by a walk down from the root. Each sum on the
        way draws a term in proportion to weight times value, each leaf draws its value, by the rule
        of ``reference._circuit.draw``.

        Args:
            num_samples: Number S of samples per row of evidence.
            evidence: ``(B, n)``, or None, see the class.
            uniforms: ``(B, S, sum regions + n)`` in [0, 1), float32 or float64: one per region of
                sums in graph order, then one per variable. None: drawn with ``generator``.
            generator: Source of uniforms.
            root: Index of a root unit, or one per row, see the class. Variables outside its scope
                stay missing.

        Returns:
            ``(B, S, n)``: int64, or floating if the evidence or a family is.

        Raises:
            ValueError: If shapes are wrong, the evidence is impossible, the circuit has external
                leaves, ``root`` is missing for several root units or, on the CPU, uniforms are
                outside [0, 1].
        """
        return _sampling.sample(self, num_samples, evidence, uniforms, generator, root)

    @torch.no_grad()
    def map(self, evidence: Tensor | None = None, root: int | Tensor | None = None) -> MapResult:
        """Find the assignment and latents of largest joint probability by max-product.

        The lowest index wins a tie.

        Args:
            evidence: ``(B, n)`` or None, see the class.
            root: Index of a root unit, or one per row, see the class.

        Raises:
            ValueError: If a shape is wrong, the circuit has external leaves, or ``root`` is missing
                for several root units.
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
        """Find the k most probable pairs of values and states of a chain, such as
        ``RegionGraph.hmm``.

        With complete evidence these are the k best paths of states. The lowest indices win a tie.
        Memory is ``B r^2 k`` for r states.

        Args:
            k: Number of pairs, at least 1.
            evidence: ``(B, n)`` or None, see the class.
            lengths: ``(B,)`` integers in ``1 .. n``, the lengths of shorter sequences: variables
                after the end stay missing.
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

        Flows are the derivatives of ``log p(x)`` in the log-values of units and in the normalised
        log-weights. They sum to 1 over the leaf units of a variable, and are 0 in impossible rows.

        Args:
            x: See :meth:`log_prob`.
            external: See :meth:`log_prob`.
            root: Index of a root unit, or one per row, see the class.

        Raises:
            ValueError: As :meth:`log_prob`, and if ``root`` is missing for several root units.
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
        """Make one step of expectation maximisation on a batch, in place.

        Each sum with I terms and flows F, and likewise each leaf, gets the new weights ``W' = (F +
        c / I) / (sum F + c)`` and then ``W <- (1 - step) W + step W'``. Sums and leaves without
        flow are not changed. With a full batch, ``step=1`` and ``pseudocount=0`` the mean
        log-likelihood never decreases. With a pseudocount, the sum of all log-likelihoods plus ``c
        / I`` times all log-weights never decreases.

        Our choice: a pseudocount of 0.1, a tenth of a row. Without one, a value that does not occur
        in the batch has probability zero afterwards, and held-out rows with it have ``-inf``.

        Args:
            x: ``(B, n)``. A leaf or sum does not learn from rows in which its whole scope is
                missing, such as the padding of a short sequence.
            step: Step size in (0, 1].
            pseudocount: The count c, spread evenly over the terms of a sum and the values of a
                leaf. Gaussians have none.
            keep_zero: Whether terms of weight zero keep weight zero, such as the forbidden
                transitions of a left-to-right chain; a pseudocount would allow them.
            root: Index of the root unit to train, or ``(B,)`` with the root unit of each row.

        Returns:
            Mean log-likelihood of the batch before the step.

        Raises:
            ValueError: If the circuit is unnormalised, the data or the step are wrong, or ``root``
                is missing for several root units.
        """
        return _flows.em_step(self, x, step, pseudocount, keep_zero, root)

    # --- structure and files ----------------------------------------------------------------------
    @torch.no_grad()
    def check(self) -> Report:
        """Return properties of the structure and the largest error of a sum of weights."""
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
        """Return the circuit in a file of :meth:`save`, on the CPU in the saved dtype.

        The file is not trusted.

        Raises:
            ValueError: If the file has unexpected content, before memory is allocated for it.
        """
        graph, norm, tensors = read_file(path)
        circuit = Circuit(graph, norm).to(tensors["weights"].dtype)
        circuit.load_state_dict(tensors)
        return circuit

    def to_dot(self) -> str:
        """Return the region graph in the Graphviz language."""
        return self.graph.to_dot()
