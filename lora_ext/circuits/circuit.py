"""A circuit over a region graph as an ``nn.Module``: evaluation and queries.

Sampling, learning and files are functions of their own; the methods here are their documentation.
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
    """What :meth:`Circuit.check` finds.

    Attributes:
        smooth: every term of a sum has the scope of the sum.
        decomposable: the factors of a product share no variable.
        structured_decomposable: products split a scope in one way, as one vtree does.
        deterministic: at most one term of each sum is nonzero, where that can be told; else
            "unknown".
        normalisation_error: how far the worst sum of weights is from 1.
    """

    smooth: bool
    decomposable: bool
    structured_decomposable: bool
    deterministic: _structure.Truth
    normalisation_error: float


class Circuit(Parameters):
    """A probabilistic circuit with parameters of its own, shared by all rows of data.

    Data ``x (B, n)``: integer, where -1 marginalises a variable in its row, or floating, where NaN
    does. Impossible data has log-probability ``-inf``, gradient zero and no NaN.

    A circuit of several root units is several distributions over one body: ``log_prob`` gives all
    of them where ``root`` is open, and every other query needs it: the number of one of them, or a
    tensor ``(B,)`` of one per row, such as the class of each row.

    Evidence is data whose gaps are filled; None stands for one row of nothing, or for one per entry
    of ``root``.

    Args:
        graph: the structure.
        norm: ``"logits"``: weights are log-softmaxed over each sum; ``"none"``: log-weights as they
            are, and :meth:`log_partition` is not zero.
        precision: of ``log_prob``, as ``ops.circuit_layers`` takes it; may be set later.

    Attributes:
        weights: all log-weights, flat; :meth:`region_weights` views those of a region.
        leaves: per family of inputs, its table of parameters.

    Raises:
        PCStructureError: if the graph is not smooth and decomposable; only evaluation of complete
            data would mean anything.
    """

    # --- evaluation -------------------------------------------------------------------------------
    def log_prob(
        self, x: Tensor, external: Tensor | None = None, root: int | Tensor | None = None
    ) -> Tensor:
        """Compute ``log p`` of the variables that are given, the others summed out.

        Differentiable once, in the parameters and in ``external``.

        Args:
            x: ``(B, n)``, -1 or NaN where a variable is marginalised.
            external: ``(B, N)`` log-values of the external leaf units, if there are any.
            root: see the class.

        Returns:
            ``(B,)`` in the dtype of the parameters; ``(B, R)`` if there are R root units and
            ``root`` is open.

        Raises:
            ValueError: on a wrong shape, device or value, naming the variable.
        """
        values = self._log_probs("log_prob", x, external)
        if root is not None:
            values = values.gather(1, self._root_numbers("log_prob", root, len(x))[:, None])
        return values.squeeze(1) if values.shape[1] == 1 else values

    forward = log_prob

    def _log_probs(self, name: str, x: Tensor, external: Tensor | None = None) -> Any:
        """Return a column per root unit, ``(B, R)``."""
        leaf, execution = self._leaf_values(name, x, external), self._run()
        if torch.is_grad_enabled():
            return Evaluate.apply(leaf, self.weights, execution, self.norm, self.precision)
        weights = Weights(self.weights.detach(), self.norm, self.precision)
        return execution.root_values(execution.up(leaf, weights))

    @torch.no_grad()
    def log_partition(self) -> Tensor:
        """Return the log of the sum over all assignments, one number or ``(R,)``; 0 where
        normalised."""
        self._refuse_external("log_partition")
        return self.log_prob(self._nothing())[0]

    def marginal(
        self,
        x: Tensor,
        keep: Iterable[int],
        external: Tensor | None = None,
        root: int | Tensor | None = None,
    ) -> Tensor:
        """Return ``log p(x_keep)``, as :meth:`log_prob`: the other variables of ``x`` are not
        looked at.

        Args:
            x: ``(B, n)``.
            keep: variables by number.
            external, root: as :meth:`log_prob` takes them.

        Raises:
            ValueError: for a variable that is none, and all that :meth:`log_prob` refuses.
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
        """Compute the law of every variable by itself given the evidence, in one pass up and one
        down.

        Args:
            evidence: ``(B, n)``, -1 or NaN where a variable is not given. root: see the class.

        Returns:
            log-probabilities of all values ``(B, n, V)``, means and variances ``(B, n)``. Rows of
            impossible evidence have ``-inf`` and NaN. Probabilities below the smallest number of
            the dtype are 0.

        Raises:
            ValueError: as :meth:`log_prob`, for external variables, and if several roots leave
                ``root`` open.
        """
        return _flows.univariate_marginals(self, evidence, root)

    @torch.no_grad()
    def entropy(self, root: int | None = None) -> Tensor:
        """Compute the entropy in nats, a single number; differential where variables are
        continuous.

        Args:
            root: the number of one of several root units.

        Raises:
            ValueError: if the circuit is not known to be deterministic (:meth:`check`): then no
                formula of its size is known. And for unnormalised circuits and external leaves.

        Source: Vergari et al. 2021, "A compositional atlas of tractable circuit operations".
        """
        return _flows.entropy(self, root)

    @torch.no_grad()
    def kl_divergence(self, other: Circuit, root: int | None = None) -> Tensor:
        """Compute ``sum p log (p / q)`` in nats with ``q`` the other circuit, a single number,
        maybe inf.

        Args:
            other: a circuit of the same graph.
            root: as :meth:`entropy` takes it.

        Raises:
            ValueError: for another graph, and all that :meth:`entropy` refuses.

        Source: as :meth:`entropy`.
        """
        return _flows.kl_divergence(self, other, root)

    @torch.no_grad()
    def conditionals(self, x: Tensor, root: int | Tensor | None = None) -> Tensor:
        """Compute ``log p(x_k | x_<k)`` in variable order, ``(B, n)``; ``-inf`` after an impossible
        prefix.

        The general graph costs n passes; ``ops.circuit_scan`` does cp, hmm and btree in one.

        Args:
            x: ``(B, n)``. root: see the class.

        Raises:
            ValueError: as :meth:`log_prob`, and if several roots leave ``root`` open.
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

    # --- from the root down -----------------------------------------------------------------------
    @torch.no_grad()
    def sample(
        self,
        num_samples: int = 1,
        evidence: Tensor | None = None,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
        root: int | Tensor | None = None,
    ) -> Tensor:
        """Draw exact samples given evidence, the same for the same uniforms.

        Upward once with the evidence, then down from the root: every sum on the way draws a term in
        proportion to weight times value, every leaf its value, by the rule of
        ``reference._circuit.draw``.

        Args:
            num_samples: S per row of evidence.
            evidence: ``(B, n)``, or None, see the class.
            uniforms: ``(B, S, sum regions + n)`` in [0, 1), float32 or float64: one per sum region
                in graph order, one per variable; None: drawn from ``generator``.
            generator: source of uniforms.
            root: see the class. What lies outside its scope stays missing.

        Returns:
            ``(B, S, n)``: int64, or floating where evidence or a family is.

        Raises:
            ValueError: on wrong shapes, impossible evidence, external variables to be drawn,
                several roots that leave ``root`` open or, on the CPU, uniforms outside [0, 1].
        """
        return _sampling.sample(self, num_samples, evidence, uniforms, generator, root)

    @torch.no_grad()
    def map(self, evidence: Tensor | None = None, root: int | Tensor | None = None) -> MapResult:
        """Find the assignment and latents of largest joint probability: max-product, up and down.

        Ties go to the lowest index.

        Args:
            evidence: ``(B, n)`` or None; root: see the class.

        Raises:
            ValueError: on a wrong shape, external variables that are sought, or several roots that
                leave ``root`` open.
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
        """Find the k likeliest pairs of values and states of a chain, such as ``RegionGraph.hmm``.

        With complete evidence these are the k best paths of states. Ties go to the lowest indices.
        Memory is ``B r^2 k`` for r states.

        Args:
            k: how many, at least 1.
            evidence: ``(B, n)`` or None; root: see the class.
            lengths: ``(B,)`` integers in ``1 .. n``: a shorter sequence ends there, and nothing is
                sought behind its end.

        Raises:
            ValueError: for a graph that is no chain, external leaves, continuous variables that are
                sought with k above 1, or arguments out of range.

        Source: list Viterbi decoding, Seshadri and Sundberg 1994.
        """
        return _sampling.k_best(self, k, evidence, lengths, root)

    # --- learning ---------------------------------------------------------------------------------
    @torch.no_grad()
    def flows(
        self, x: Tensor, external: Tensor | None = None, root: int | Tensor | None = None
    ) -> Flows:
        """Compute expected flows: the posterior probability of every unit, and of every weight's
        use.

        They are the derivatives of ``log p(x)`` in the log-values of units and in the normalised
        log-weights. Over the leaf units of one variable they sum to one. Impossible rows have none.

        Args:
            x, external, root: as :meth:`log_prob` takes them.

        Raises:
            ValueError: as :meth:`log_prob`, and if several roots leave ``root`` open.
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

        ``W' = (F + c / I) / (sum F + c)`` of every sum and likewise of every leaf, then
        ``W <- (1 - step) W + step W'``. Sums and leaves without flow stay as they are. With a full
        batch, ``step=1`` and ``pseudocount=0`` the mean log-likelihood never falls; with a
        pseudocount, the sum of all log-likelihoods plus ``c / I`` times all log-weights never does.

        Our choice: a pseudocount of 0.1, a tenth of a row. Without one, a value that the batch
        does not show has probability zero afterwards, and held-out rows ``-inf``.

        Args:
            x: ``(B, n)``; a leaf learns from the rows that show it something, and so does a sum:
                one whose whole scope is missing, such as the end of a short sequence, does not.
            step: in (0, 1].
            pseudocount: c, spread evenly over the terms of a sum and the values of a leaf.
                Gaussians have none.
            keep_zero: sums keep their terms of weight zero at zero, such as the forbidden
                transitions of a left-to-right chain, which a pseudocount would open.
            root: the one to train, or ``(B,)``, the root that each row belongs to.

        Returns:
            Mean log-likelihood of the batch before the step.

        Raises:
            ValueError: for unnormalised circuits, wrong data or a wrong step, or if several roots
                leave ``root`` open.
        """
        return _flows.em_step(self, x, step, pseudocount, keep_zero, root)

    # --- structure and files ----------------------------------------------------------------------
    @torch.no_grad()
    def check(self) -> Report:
        """Return properties of the structure, and how far the worst row of weights is from sum
        one."""
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
        """Read the file ``path`` of :meth:`save`, which is not trusted: the circuit on the CPU, in
        the dtype that was saved.

        Raises:
            ValueError: on anything unexpected, before memory is taken for it.
        """
        graph, norm, tensors = read_file(path)
        circuit = Circuit(graph, norm).to(tensors["weights"].dtype)
        circuit.load_state_dict(tensors)
        return circuit

    def to_dot(self) -> str:
        """Return the region graph in Graphviz' language."""
        return self.graph.to_dot()
