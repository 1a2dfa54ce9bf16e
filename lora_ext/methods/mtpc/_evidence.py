"""Circuit that all rows share, conditioned on the logits of each row as soft evidence.

The parameters of the shared circuit S do not depend on the row. A row has one vector of logits
``l_k`` per position, and the distribution

    q(x_1 .. x_K) = S(x_1 .. x_K) prod_k exp(l_k[x_k]) / Z

This is a circuit of the same kind as S. Its leaves are ``softmax(s_{k,z} + l_k)`` for the leaf
logits ``s_{k,z}`` of S. A state's weight in the prior or in a transition is the weight in S times
the state's evidence, which is the expectation of ``prod_k exp(l_k[x_k])`` over the positions that
the state generates. Evidence is computed from the last position to the first. The evidence of a
leaf is ``sum_v softmax(s_{k,z})[v] softmax(l_k)[v]``, computed for all leaves and rows in one
product.

Shape letters: ``N`` rows, ``K`` positions, ``C`` components, ``L`` tokens that have leaves, ``M``
transition matrices.

Source: CoDD (arXiv 2603.00045), equation 5 and section 4.2. docs/notes/mtpc.md, "Soft evidence",
lists what is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from lora_ext.layers import recomputed, rows_per_chunk
from lora_ext.reference import accumulator, left_size
from lora_ext.rows import capturing

from ._emission import EmissionModule, LeafSizes, SumWeights

_LEAF_DEVIATION = 1.0  # standard deviation of the initial leaf logits; our choice
_MIN_EVIDENCE = 1e-290  # The gradient divides by the evidence, and must be finite in float64.


class _Constants(NamedTuple):
    """Probabilities of the shared circuit, which are the same for all rows."""

    leaf: Tensor  # (K, C, L), logarithms
    leaf_exp: Tensor  # (K, L, C), float64
    prior: Tensor  # (C,), logarithms
    trans: Tensor | None  # (M, C, C), logarithms
    trans_exp: Tensor | None  # (M, C, C), float64, transposed


class SharedCircuit(SumWeights):
    """Parameters of a circuit that all rows share, and its product with the evidence of a row.

    In evaluation mode without gradients, the circuit's probabilities are computed once and stored
    until the version or the memory of a parameter changes. A change through ``.data`` is therefore
    detected only after ``train()``, ``eval()`` or a pass with gradients.

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
        self._kept: tuple[torch.dtype, list[Any], _Constants, list[Tensor]] | None = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as :meth:`torch.nn.Module.train`."""
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def reset_parameters(self, bound: float) -> None:
        """Draw new values from torch's generator. Leaf logits are normally distributed, since
        states with equal leaves would never learn to differ."""
        super().reset_parameters(bound)
        nn.init.normal_(self.leaf, std=_LEAF_DEVIATION)

    def circuit(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the circuits of rows with the logits ``(N, K, 1, L)``.

        Returns:
            logits of the leaves ``(N, K, C, L)``, the prior ``(N, C)`` and the transitions
            ``(N, M, C, C)``, in float32 (float64 for float64).
        """
        law = _log_law(logits)
        fixed = self._constants(law.dtype)
        return law[:, :, None] + fixed.leaf, *self._sums(_log_evidence(law, fixed), fixed)

    def observed(
        self, emission: EmissionModule, rows: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute the log-probability of one token per position, ``(N, K, C)``, and the prior and
        the transitions of :meth:`circuit`.

        If the logits of all rows are too large to store, the backward pass recomputes them, one
        chunk of rows at a time.

        Args:
            emission: emission with one component, which computes the logits of rows.
            rows: hidden states ``(N, D)``.
            places: indices of the tokens ``(N, K)``; -1 marginalises a position.
        """

        def observe(rows: Tensor, places: Tensor) -> Tensor:
            law = _log_law(emission.logits(rows))
            fixed = self._constants(law.dtype)
            evidence = _log_evidence(law, fixed)
            index = places.clamp(min=0)
            every = torch.arange(index.shape[1], device=index.device)
            own = law.gather(2, index[..., None]) + fixed.leaf.transpose(1, 2)[every, index]
            return torch.stack([torch.where(places[..., None] < 0, 0, own - evidence), evidence])

        # For each row, logits, log-probabilities and float64 probabilities are stored.
        chunk = rows_per_chunk(4 * places.shape[1] * self.leaf.shape[2])
        if len(rows) <= chunk:
            observed, evidence = observe(rows, places)
        else:
            parts = zip(rows.split(chunk), places.split(chunk), strict=True)
            observed, evidence = torch.cat([recomputed(observe, *part) for part in parts], 1)
        return observed, *self._sums(evidence, self._constants(evidence.dtype))

    def _sums(self, evidence: Tensor, fixed: _Constants) -> tuple[Tensor, Tensor | None]:
        """Multiply prior and transitions by the evidence of their states.

        Args:
            evidence: logarithm of the evidence of every leaf, ``(N, K, C)``.
            fixed: the circuit's probabilities.

        Returns:
            logits of the prior ``(N, C)`` and of the transitions ``(N, M, C, C)``; the second
            result is None if the circuit has no transitions.
        """
        if fixed.trans is None or fixed.trans_exp is None:
            return fixed.prior + evidence.sum(1), None
        # A factor that all states of a node share cancels, so the largest evidence is scaled to 1.
        weight = (evidence - evidence.detach().amax(-1, keepdim=True)).double().exp()
        weight = weight.clamp(min=_MIN_EVIDENCE)
        states = (_chain if self.kind == "hmm" else _tree)(weight, fixed.trans_exp.unbind())
        logs = torch.stack(states, 1).log().to(evidence.dtype)
        return fixed.prior + logs[:, 0], fixed.trans + logs[:, 1:, None]

    def _constants(self, dtype: torch.dtype) -> _Constants:
        """Return the circuit's probabilities in ``dtype``; reuse them if no parameter changed."""
        assert self.prior is not None  # check_structure rejects 'ff', which has no states
        parameters = [p for p in (self.leaf, self.prior, self.trans_bias) if p is not None]
        fixed = not (self.training or torch.is_grad_enabled())
        states = [_state(parameter) for parameter in parameters] if fixed else [None]
        if (kept := self._kept) is not None and kept[:2] == (dtype, states):
            return kept[2]
        leaf, prior = self.leaf.to(dtype).log_softmax(-1), self.prior[:, 0].to(dtype).log_softmax(0)
        trans = trans_exp = None
        if self.trans_bias is not None:
            trans = self.trans_bias.to(dtype).log_softmax(-1)
            trans = trans.expand(self.num_transitions, -1, -1)
            trans_exp = trans.double().exp().transpose(1, 2)
        found = _Constants(leaf, leaf.double().exp().transpose(1, 2), prior, trans, trans_exp)
        # The aliases keep the memory in use, so that no later parameter has the same address.
        aliases = [p.detach() for p in parameters]
        self._kept = None if None in states else (dtype, states, found, aliases)
        return found


def _state(parameter: Tensor) -> tuple[object, ...] | None:
    """Return values that differ after the parameter has changed; None if the parameter has no such
    values.

    Inference tensors have no version, shared memory can be changed by another process, and a
    captured graph must read the parameter at every replay.
    """
    if type(parameter) is not nn.Parameter or parameter.is_inference():
        return None
    device, stream = parameter.device, None
    if device.type == "cuda":
        if capturing(device):
            return None
        stream = torch.cuda.current_stream(device)
    elif parameter.is_shared():
        return None
    return parameter._version, device, parameter.dtype, parameter.data_ptr(), stream


def _log_law(logits: Tensor) -> Tensor:
    """Return the logarithms of the rows' probabilities, ``(N, K, L)``."""
    return logits[:, :, 0].to(accumulator(logits.dtype)).log_softmax(-1)


def _log_evidence(law: Tensor, fixed: _Constants) -> Tensor:
    """Compute the logarithm of ``sum_v law[v] leaf[v]``, ``(N, K, C)``.

    Sums are float64, in which probabilities down to ``exp(-700)`` are positive.
    """
    total = torch.bmm(law.double().exp().transpose(0, 1), fixed.leaf_exp).transpose(0, 1)
    return total.clamp(min=_MIN_EVIDENCE).log().to(law.dtype)


def _scaled(evidence: Tensor) -> Tensor:
    """Divide the evidence of a node's states ``(N, C)`` by the largest, so that none underflows."""
    evidence = evidence.clamp(min=_MIN_EVIDENCE)
    return evidence / evidence.detach().amax(-1, keepdim=True)


def _chain(evidence: Tensor, trans: Sequence[Tensor]) -> list[Tensor]:
    """Return the evidence ``(N, C)`` of the states of each position, including that of all later
    positions."""
    own = evidence.unbind(1)
    states = [own[-1]]
    for k in reversed(range(len(trans))):
        states.append(_scaled(own[k] * (states[-1] @ trans[k])))
    return states[::-1]


def _tree(evidence: Tensor, trans: Sequence[Tensor]) -> list[Tensor]:
    """Return the evidence ``(N, C)`` of the states of the root and of all other inner nodes, in
    pre-order."""
    own, nodes = evidence.unbind(1), list[Tensor]()

    def visit(lo: int, hi: int) -> Tensor:
        """Append a node and all nodes inside it; return the node's evidence."""
        middle, place = lo + left_size(hi - lo), len(nodes)
        nodes.append(own[0])  # replaced below
        parts: list[Tensor] = []
        for first, last in ((lo, middle), (middle, hi)):
            if last - first == 1:
                parts.append(own[first])
                continue
            inner = len(nodes) - 1  # transitions have no entry for the root
            parts.append(visit(first, last) @ trans[inner])
        nodes[place] = _scaled(parts[0] * parts[1])
        return nodes[place]

    visit(0, len(own))
    return nodes
