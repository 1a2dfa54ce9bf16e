"""A shared circuit that reads the logits of each row as soft evidence.

The parameters of the shared circuit S do not depend on the row. Its product with the row's logits
``l``, one vector per position, is normalised by ``Z``:

    q(x_1 .. x_K) = S(x_1 .. x_K) prod_k exp(l_k[x_k]) / Z

This is a circuit of the same kind. Its leaves are ``softmax(s_{k,z} + l_k)`` for leaf logits
``s_{k,z}`` of S. The weight of a state, in the prior or in a transition, is its weight in S times
its evidence: the expectation of ``prod_k exp(l_k[x_k])`` over the positions that the state
generates. It is computed from the last position to the first. At a leaf it is
``sum_v softmax(s_{k,z})[v] softmax(l_k)[v]``, one product of all leaves with all rows.

Shape letters: ``N`` rows, ``K`` positions, ``C`` components, ``L`` tokens that have leaves, ``M``
transition matrices.

Source: CoDD (arXiv 2603.00045), equation 5 and section 4.2. docs/notes/mtpc.md, "Soft evidence",
lists what is our choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.layers import recomputed, rows_per_chunk
from lora_ext.reference import accumulator, left_size

from ._emission import EmissionModule, LeafSizes, SumWeights

_LEAF_DEVIATION = 1.0  # of the initial leaf logits, so that states differ; our choice
_MIN_EVIDENCE = 1e-290  # The gradient divides by the evidence, and must be finite in float64.


class SharedCircuit(SumWeights):
    """Parameters of a circuit that all rows share, and its product with the evidence of a row.

    Args:
        kind: circuit family: ``"cp"``, ``"hmm"`` or ``"btree"``.
        sizes: sizes of the head.
        shared: the head's ``share_transitions``.
        stays: the head's ``init_identity``.
        how: dtype and device of the parameters.

    Attributes:
        leaf: logits ``(K, C, L)``.
        prior: logits ``(C, 1)``.
        trans_bias: logits ``(M, C, C)``, or ``(1, C, C)`` if the steps share one matrix; None if
            ``M = 0``.
    """

    def __init__(self, kind: str, sizes: LeafSizes, shared: bool, stays: bool, **how: Any):
        super().__init__(kind, sizes._replace(hidden_size=1), False, shared, stays, **how)
        self.kind = kind
        self.leaf = nn.Parameter(torch.empty(sizes[:3], **how))

    def reset_parameters(self, bound: float) -> None:
        """Draw new values from torch's generator. States with equal leaves would learn nothing, so
        leaf logits are normally distributed."""
        super().reset_parameters(bound)
        nn.init.normal_(self.leaf, std=_LEAF_DEVIATION)

    def circuit(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the circuits of rows with the logits ``(N, K, 1, L)``.

        Returns:
            logits of the leaves ``(N, K, C, L)``, the prior ``(N, C)`` and the transitions
            ``(N, M, C, C)``, in float32 (float64 for float64).
        """
        law, leaf = self._log_laws(logits)
        return (law[:, :, None] + leaf, *self(_log_evidence(law, leaf)))

    def observed(
        self, emission: EmissionModule, rows: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute the log-probability of one token per position, ``(N, K, C)``, and the prior and
        the transitions of :meth:`circuit`.

        If the logits of all rows are too large to store for the backward, the backward recomputes
        them chunk by chunk.

        Args:
            emission: emission with one component, which computes the logits of rows.
            rows: hidden states ``(N, D)``.
            places: indices of the tokens ``(N, K)``; -1 marginalises a position.
        """

        def observe(rows: Tensor, places: Tensor) -> Tensor:
            law, leaf = self._log_laws(emission.logits(rows))
            evidence = _log_evidence(law, leaf)
            index = places.clamp(min=0)
            every = torch.arange(index.shape[1], device=index.device)
            own = law.gather(2, index[..., None]) + leaf.transpose(1, 2)[every, index]
            return torch.stack([torch.where(places[..., None] < 0, 0, own - evidence), evidence])

        # Logits, law and float64 probabilities are stored.
        chunk = rows_per_chunk(4 * places.shape[1] * self.leaf.shape[2])
        if len(rows) <= chunk:
            observed, evidence = observe(rows, places)
        else:
            parts = zip(rows.split(chunk), places.split(chunk), strict=True)
            observed, evidence = torch.cat([recomputed(observe, *part) for part in parts], 1)
        return (observed, *self(evidence))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (evidence, not rows)
        self, evidence: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Multiply prior and transitions by the evidence of their states.

        Args:
            evidence: logarithm of the evidence of every leaf, ``(N, K, C)``.

        Returns:
            logits of the prior ``(N, C)`` and of the transitions ``(N, M, C, C)``; None if the
            circuit has no transitions.
        """
        assert self.prior is not None  # 'ff', without states, is refused
        prior = self.prior[:, 0].to(evidence.dtype).log_softmax(0)
        if self.trans_bias is None:
            return prior + evidence.sum(1), None
        trans = self.trans_bias.to(evidence.dtype).log_softmax(-1)
        trans = trans.expand(self.num_transitions, -1, -1)
        root, below = (_chain if self.kind == "hmm" else _tree)(evidence, trans)
        return prior + root, trans + torch.stack(below, 1)[:, :, None]

    def _log_laws(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithms of the rows' probabilities ``(N, K, L)`` and of the leaves'
        ``(K, C, L)``."""
        law = logits[:, :, 0].to(accumulator(logits.dtype)).log_softmax(-1)
        return law, self.leaf.to(law.dtype).log_softmax(-1)


def _log_evidence(law: Tensor, leaf: Tensor) -> Tensor:
    """Compute the logarithm of ``sum_v law[v] leaf[v]``, ``(N, K, C)``.

    Sums are float64, in which probabilities down to ``exp(-700)`` are positive.
    """
    total = torch.einsum("nkv,kcv->nkc", law.double().exp(), leaf.double().exp())
    return total.clamp(min=_MIN_EVIDENCE).log().to(law.dtype)


def _above(trans: Tensor, below: Tensor) -> Tensor:
    """Return the evidence of the parent's states ``(N, C)`` from that of the child's."""
    return (trans + below[:, None]).logsumexp(-1)


def _chain(evidence: Tensor, trans: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the evidence ``(N, C)`` of the states of the first position, and of those after each
    transition, including all later positions."""
    states = [evidence[:, -1]]
    for k in reversed(range(len(trans))):
        states.append(evidence[:, k] + _above(trans[k], states[-1]))
    *below, root = states
    return root, below[::-1]


def _tree(evidence: Tensor, trans: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the evidence ``(N, C)`` of the states of the root, and of those of all other inner
    nodes in pre-order."""
    below: list[Tensor] = []

    def visit(lo: int, hi: int) -> Tensor:
        middle, parts = lo + left_size(hi - lo), []
        for first, last in ((lo, middle), (middle, hi)):
            if last - first == 1:
                parts.append(evidence[:, first])
                continue
            node = len(below)
            below.append(evidence)  # replaced below, after the nodes inside this one
            below[node] = visit(first, last)
            parts.append(_above(trans[node], below[node]))
        return parts[0] + parts[1]

    return visit(0, evidence.shape[1]), below
