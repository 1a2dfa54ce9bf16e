"""Steps of an iteration of speculative decoding: draft a window, then verify it.

With a bridge, a window starts after a decided token. The window's circuit and samples contain only
the ``L`` tokens of the head's shortlist. For verification, only the distribution at each position,
summed over the components, is expanded to the vocabulary.

The hidden state after a decided token is not known when a draft starts, since the model has not
been run on that token. :class:`TokenBridge` estimates this state from the state before the token
and the token's embedding.

Shape letters: ``B`` rows, ``K`` drafted tokens, ``n`` tokens per window, ``C`` components, ``V``
vocabulary, ``D`` hidden width.

Source: draft heads that read the previous token are Hydra's (Ankner et al. 2024, arXiv 2402.05109)
and EAGLE's (Li et al. 2024, arXiv 2401.15077); a circuit after that token is our choice
(docs/mtpc.md, "Bridge").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext import ops
from lora_ext._checks import require
from lora_ext.control import Constraints, Guide
from lora_ext.reference import accumulator, log_softmax

from .layers import Circuit, CircuitHead
from .tail import DraftTail

#: "sample" draws from the model's distribution; "greedy" uses its most likely tokens.
Mode = Literal["sample", "greedy"]
#: Use of the pending token, which the last call has decided and the model has not processed yet:
#: as evidence for the next window ("condition"), or as input of a separate pass ("restart").
WindowRule = Literal["condition", "restart"]


class TokenBridge(nn.Module):
    """Network that estimates the hidden state after one more token:
    ``h + |h| (skip z + down (silu(gate z) * up z))`` with ``z = [h / |h|; e / |e|]``.

    ``h`` is the hidden state before the token, ``e`` the token's embedding and ``|.|`` the root
    mean square. The three products with ``z`` are computed as one product. ``down`` and ``skip``
    start at zero, so that a new bridge returns ``h``.

    Args:
        hidden_size: ``D``, width of states and embeddings.
        width: ``W``, width of the gated layer, at least 1.
        dtype: dtype of the parameters.
        device: device of the parameters.

    Attributes:
        read: ``(2 W + D, 2 D)``: gate, up and skip, stacked in this order.
        down: ``(D, W)``.

    Raises:
        ValueError: If a size is below 1.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("width", width)):
            require(size >= 1, "TokenBridge", name, "at least 1", size)
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.hidden_size, self.width = hidden_size, width
        self.read = nn.Linear(2 * hidden_size, 2 * width + hidden_size, bias=False, **options)
        self.down = nn.Linear(width, hidden_size, bias=False, **options)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new values from torch's generator, and zero ``skip`` and ``down``, so that the
        bridge returns ``h``."""
        self.read.reset_parameters()
        nn.init.zeros_(self.read.weight[2 * self.width :])
        nn.init.zeros_(self.down.weight)

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        """Estimate the hidden states after one more token.

        Args:
            h: hidden states ``(..., D)`` before the token.
            embedded: embeddings ``(..., D)`` of the tokens that follow.

        Returns:
            ``(..., D)`` in the dtype of the parameters.
        """
        h, embedded = (t.to(self.down.weight.dtype) for t in (h, embedded))
        shape = (self.hidden_size,)
        z = torch.cat([F.rms_norm(h, shape), F.rms_norm(embedded, shape)], -1)
        gate, up, skip = self.read(z).split([self.width, self.width, self.hidden_size], -1)
        moved = skip + self.down(F.silu(gate) * up)
        # The squares of float16 would overflow, and the gradient of a square root at 0 is inf.
        length = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=accumulator(h.dtype))
        size = (length / math.sqrt(self.hidden_size)).to(h.dtype)
        return torch.addcmul(h, size, moved)

    def extra_repr(self) -> str:
        """Return the hidden width and the width of the gated layer, for ``print``."""
        return f"{self.hidden_size}, width={self.width}"


class DraftedWindow(NamedTuple):
    """Drafted window, with the probabilities under the draft that the acceptance test needs."""

    circuit: Circuit
    tokens: Tensor  # (B, K)
    conditional: Tensor  # (B, K), log-probability of each token given the previous ones
    posterior: Tensor  # (B, K, C), probabilities of the components given the previous tokens

    @classmethod
    def greedy(cls, tokens: Tensor) -> DraftedWindow:
        """Return a window that contains only tokens; greedy verification uses no other field."""
        none = torch.empty(0)
        return cls(Circuit(none, None, None), tokens, none, none)

    @classmethod
    def joined(cls, parts: list[tuple[Tensor, Tensor, Tensor]]) -> DraftedWindow:
        """Concatenate independently drafted windows into one without latent states.

        Args:
            parts: for each window its tokens ``(B, n)``, their log-probabilities ``(B, n)``, and
                the log-distributions ``(B, n, V)`` that they were drawn from.
        """
        tokens, conditional, law = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        one = torch.ones_like(conditional)[..., None]
        return cls(Circuit(law[:, :, None], None, None), tokens, conditional, one)


@dataclass(eq=False, repr=False)
class Steps:
    """Draft and verification of a :class:`SpeculativeDecoder`, which documents the attributes."""

    model: Any
    head: CircuitHead
    mode: Mode = "sample"
    window: WindowRule = "condition"
    temperature: float = 1.0
    top_p: float = 1.0
    tail: DraftTail | None = None
    bridge: TokenBridge | None = None
    chain: int = 1
    constraint: Constraints = None
    guide: Guide | None = None

    @property
    def drafted(self) -> int:
        """``K``, number of tokens in all windows that a call drafts."""
        return self.head.n_token * self.chain

    def uniforms(self, generators: list[torch.Generator], device: torch.device) -> Tensor:
        """Draw the random numbers of an iteration, ``(B, 3 K + 1)``, from each row's generator: two
        per drafted token, one per acceptance test, and one for the verifier's token."""
        size = 3 * self.drafted + 1
        return torch.stack([torch.rand(size, generator=g) for g in generators]).to(device)

    def first_token(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Draw the first token of each row, ``(B,)``, from the verifier's logits, without a draft.

        Args:
            logits: the verifier's logits ``(B, V)``.
            uniforms: random numbers ``(B,)``.
        """
        if self.mode == "greedy":
            return logits.argmax(-1)
        wide = logits.to(accumulator(logits.dtype)) / self.temperature
        return draw(wide if self.top_p == 1 else nucleus(wide, self.top_p), uniforms)

    def draft(self, hidden: Tensor, pending: Tensor | None, uniforms: Tensor) -> DraftedWindow:
        """Draw a window of tokens from the circuit.

        Args:
            hidden: hidden state ``(B, D)`` of each row's last kept token that the model has
                processed.
            pending: ``(B,)``, each row's first token of the window if it is decided already; with a
                bridge, the token before the window.
            uniforms: random numbers ``(B, K, 2)``; greedy drafts do not use them.
        """
        if self.bridge is not None and pending is not None:
            return self._draft_with_bridge(hidden, pending, uniforms)
        circuit = self.circuit(hidden, pending)
        kind = self.head.kind
        evidence = None
        if pending is not None:
            evidence = pending.new_full((len(pending), self.head.n_token), -1)
            evidence[:, 0] = pending
        if self.mode == "greedy":
            tokens, _ = ops.circuit_argmax(kind, *circuit, evidence)
            return DraftedWindow.greedy(tokens)
        return DraftedWindow(circuit, *ops.circuit_sample(kind, *circuit, uniforms, evidence))

    def circuit(self, hidden: Tensor, pending: Tensor | None) -> Circuit:
        """Return the circuit of the window.

        A pending token outside the head's shortlist would have probability 0. The token gets
        probability 1 in every component instead, so that it does not change the distribution of
        later tokens.
        """
        circuit = self.head.circuit(hidden)
        if pending is None or self.head.shortlist is None:
            return circuit
        lacking = self.head.listed.lacks(pending)[:, None, None]
        first = circuit.leaf[:, 0].masked_fill_(lacking, -torch.inf)  # (B, C, V)
        own = pending[:, None, None].expand(-1, first.shape[1], 1)
        first.scatter_(-1, own, first.gather(-1, own).masked_fill(lacking, 0))
        return circuit

    def _draft_with_bridge(self, hidden: Tensor, token: Tensor, uniforms: Tensor) -> DraftedWindow:
        """Draw all windows after a token, and return them as one window with a single component:
        the circuit's distribution at each position.

        A greedy draft uses the most likely token given the previous ones at every position, as the
        verifier does. This choice is not always the most likely window.
        """
        head, listed = self.head, self.head.listed
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        state, before, none = hidden, token[:, None], torch.empty(len(hidden), 0)
        for j in range(self.chain):
            state = self.advance_states(state, before)
            circuit = head.narrow_circuit(state)
            if self.mode == "greedy":
                places = torch.full((len(state), head.n_token), -1, device=state.device)
                for k in range(head.n_token):
                    at = torch.full_like(token, k)
                    law = ops.circuit_conditional_dist(head.kind, *circuit, places, at)  # (B, L)
                    places[:, k] = law.argmax(-1)
                before = listed.tokens(places)
                parts.append((before, none, none))
                continue
            numbers = uniforms[:, j * head.n_token : (j + 1) * head.n_token]
            places, conditional, posterior = ops.circuit_sample(head.kind, *circuit, numbers)
            leaf = log_softmax(circuit.leaf.to(posterior.dtype))  # (B, n, C, L)
            law = (leaf + posterior.log()[..., None]).logsumexp(2)  # (B, n, L)
            before = listed.tokens(places)
            parts.append((before, conditional, listed.widen(law)))
        if self.mode == "greedy":
            return DraftedWindow.greedy(torch.cat([tokens for tokens, _, _ in parts], 1))
        return DraftedWindow.joined(parts)

    def advance_states(self, state: Tensor, tokens: Tensor) -> Tensor:
        """Advance states ``(B, D)`` by tokens ``(B, n)`` with the bridge, token by token."""
        assert self.bridge is not None
        embed = self.model.get_input_embeddings()
        for token in tokens.unbind(1):
            state = self.bridge(state, embed(token))
        return state

    def verify(
        self, draft: DraftedWindow, target: Tensor, pending: Tensor | None, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Accept a prefix of the window and draw the token after it.

        Args:
            draft: result of :meth:`draft`.
            target: ``(B, K + 1, V)``, the verifier's logits for the tokens of the window and for
                the token after it.
            pending: as in :meth:`draft`.
            uniforms: random numbers ``(B, K + 1)``.

        Returns:
            number of tokens that are kept ``(B,)``, including the pending token, and the next token
            ``(B,)``.
        """
        evidence = None if pending is None else torch.ones_like(pending)
        if self.mode == "greedy":  # at temperature 0 the op reads no probabilities and no leaves
            unused = target.new_zeros(draft.tokens.shape, dtype=accumulator(target.dtype))
            numbers, temperature = [target, unused, unused[..., None], target[:, :-1, None]], 0.0
        else:
            temperature = self.temperature
            if self.top_p < 1:
                wide = target.to(accumulator(target.dtype))
                target, temperature = nucleus(wide / temperature, self.top_p), 1.0
            numbers = [target, draft.conditional, draft.posterior, draft.circuit.leaf]
            if any(t.dtype == torch.float64 for t in numbers):  # The op requires float64 for all.
                numbers = [t.double() for t in numbers]
        target, *proposal = numbers
        return ops.spec_verify(target, draft.tokens, *proposal, uniforms, evidence, temperature)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample one token of each row of ``softmax(logits)``, ``(B, V)``, by inverting its cumulative
    sums at ``uniforms (B,)``."""
    sums = logits.double().softmax(-1).cumsum(-1)
    limit = uniforms[:, None].to(sums) * sums[:, -1:]
    return torch.searchsorted(sums, limit, right=True)[:, 0]


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Set logits to ``-inf`` outside the smallest set of most likely tokens that has probability
    ``top_p`` or more."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(dropped, -torch.inf)
