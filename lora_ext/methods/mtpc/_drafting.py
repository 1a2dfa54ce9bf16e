"""The steps of a turn of speculative decoding: draft a window, verify it.

With a bridge, windows start behind a decided token. Their circuits are over the ``L`` tokens of the
head's list, and so are the draws; only the law of each position, mixed over the components, is
spread over the vocabulary for the test.

A draft that starts behind a decided token cannot have that token's hidden state: the model has not
seen it yet. :class:`TokenBridge` guesses it from the state before the token and the token's
embedding.

Source: draft heads that read the token before theirs are Hydra's (Ankner et al. 2024, arXiv
2402.05109) and EAGLE's (Li et al. 2024, arXiv 2401.15077); a circuit behind one is ours
(docs/mtpc.md, "Bridge").
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext import ops
from lora_ext._checks import require
from lora_ext.reference import accumulator, log_softmax

from .layers import Circuit, CircuitHead

#: Whether tokens follow the model's law or are its likeliest.
Mode = Literal["sample", "greedy"]


class TokenBridge(nn.Module):
    """A hidden state, moved to where one more token would bring it:
    ``h + |h| (skip z + down (silu(gate z) * up z))`` with ``z = [h / |h|; e / |e|]``.

    ``|.|`` is the root of the mean square. The three products with ``z`` are one. ``down`` and
    ``skip`` start at zero, so that a new bridge changes nothing.

    Args:
        hidden_size: ``D``, of states and embeddings. width: ``W``, of the gated layer, at least 1.
        dtype, device: of the parameters.

    Attributes:
        read: ``(2 W + D, 2 D)``: gate, up and skip, one below the other.
        down: ``(D, W)``.

    Raises:
        ValueError: a size below 1.
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
        """Draw new values from torch's generator; ``skip`` and ``down`` become zero, so that the
        bridge changes nothing."""
        self.read.reset_parameters()
        nn.init.zeros_(self.read.weight[2 * self.width :])
        nn.init.zeros_(self.down.weight)

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        """Move states to where one more token brings them.

        Args:
            h: ``(..., D)``, hidden states. embedded: ``(..., D)``, embeddings of the tokens that
                follow.

        Returns:
            ``(..., D)`` in the dtype of the parameters.
        """
        h, embedded = (t.to(self.down.weight.dtype) for t in (h, embedded))
        shape = (self.hidden_size,)
        z = torch.cat([F.rms_norm(h, shape), F.rms_norm(embedded, shape)], -1)
        gate, up, skip = self.read(z).split([self.width, self.width, self.hidden_size], -1)
        moved = skip + self.down(F.silu(gate) * up)
        # As the norm's own sum: squares of halves overflow, and a root at zero has no gradient.
        length = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=accumulator(h.dtype))
        size = (length / math.sqrt(self.hidden_size)).to(h.dtype)
        return torch.addcmul(h, size, moved)

    def extra_repr(self) -> str:
        """What ``print`` shows: both sizes."""
        return f"{self.hidden_size}, width={self.width}"


class DraftedWindow(NamedTuple):
    """A window, and what its verification needs to know of the circuit that it was drawn from."""

    circuit: Circuit
    tokens: Tensor  # (B, K)
    conditional: Tensor  # (B, K)
    posterior: Tensor  # (B, K, C)

    @classmethod
    def greedy(cls, tokens: Tensor) -> DraftedWindow:
        """A window alone: greedy verification asks for nothing else."""
        none = torch.empty(0)
        return cls(Circuit(none, None, None), tokens, none, none)

    @classmethod
    def joined(cls, parts: list[tuple[Tensor, Tensor, Tensor]]) -> DraftedWindow:
        """Windows one behind the other, as one of one component: of each the tokens ``(B, n)``,
        their log-probabilities, and the logarithms of the laws that they are of, ``(B, n, V)``."""
        tokens, conditional, law = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        one = torch.ones_like(conditional)[..., None]
        return cls(Circuit(law[:, :, None], None, None), tokens, conditional, one)


class Steps:
    """The steps of a :class:`SpeculativeDecoder`, which has the settings."""

    model: Any
    head: CircuitHead
    mode: Mode
    temperature: float
    top_p: float
    bridge: TokenBridge | None
    chain: int

    @property
    def drafted(self) -> int:
        """``K``, the tokens of a call's window or windows."""
        return self.head.n_token * self.chain

    def uniforms(self, generators: list[torch.Generator], device: torch.device) -> Tensor:
        """Draw a turn's random numbers, from each row's own generator: ``(B, 3 K + 1)``, two per
        drafted token, one per test, one for the verifier's token."""
        size = 3 * self.drafted + 1
        return torch.stack([torch.rand(size, generator=g) for g in generators]).to(device)

    def first_token(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Draw the verifier's own token after the prompt, ``(B,)``, where no window was drafted.

        Args:
            logits: ``(B, V)``. uniforms: ``(B,)``.
        """
        if self.mode == "greedy":
            return logits.argmax(-1)
        wide = logits.to(accumulator(logits.dtype)) / self.temperature
        return draw(wide if self.top_p == 1 else nucleus(wide, self.top_p), uniforms)

    def draft(self, hidden: Tensor, pending: Tensor | None, uniforms: Tensor) -> DraftedWindow:
        """Draw a window.

        Args:
            hidden: ``(B, D)``, of the last token that was fed and kept.
            pending: ``(B,)``, the window's first token where it is decided already; with a bridge
                the token before the window.
            uniforms: ``(B, K, 2)``; greedy drafts do not look at them.
        """
        if self.bridge is not None and pending is not None:
            return self._draft_behind(hidden, pending, uniforms)
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
        """Make the circuit of the window. A first token that the head has no leaf for, and so holds
        impossible, is made certain in every component: then it does not change what follows."""
        circuit = self.head.circuit(hidden)
        if pending is None or self.head.shortlist is None:
            return circuit
        lacking = self.head.listed.lacks(pending)[:, None, None]
        first = circuit.leaf[:, 0].masked_fill_(lacking, -torch.inf)  # (B, C, V)
        own = pending[:, None, None].expand(-1, first.shape[1], 1)
        first.scatter_(-1, own, first.gather(-1, own).masked_fill(lacking, 0))
        return circuit

    def _draft_behind(self, hidden: Tensor, token: Tensor, uniforms: Tensor) -> DraftedWindow:
        """Draw all windows behind a token, as one window of one component: the mixture, position by
        position. A greedy draft takes the likeliest token after those before it at every position,
        as the verifier does; the likeliest window is another."""
        head = self.head
        kind = self.head.kind
        listed = self.head.listed
        greedy: list[Tensor] = []
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        state, before = hidden, token[:, None]
        for j in range(self.chain):
            state = self.behind(state, before)
            circuit = head.narrow_circuit(state)
            if self.mode == "greedy":
                places = torch.full((len(state), head.n_token), -1, device=state.device)
                for k in range(head.n_token):
                    at = torch.full_like(token, k)
                    law = ops.circuit_conditional_dist(kind, *circuit, places, at)  # (B, L)
                    places[:, k] = law.argmax(-1)
                before = listed.tokens(places)
                greedy.append(before)
                continue
            numbers = uniforms[:, j * head.n_token : (j + 1) * head.n_token]
            places, conditional, posterior = ops.circuit_sample(kind, *circuit, numbers)
            leaf = log_softmax(circuit.leaf.to(posterior.dtype))  # (B, n, C, L)
            law = (leaf + posterior.log()[..., None]).logsumexp(2)  # (B, n, L)
            before = listed.tokens(places)
            parts.append((before, conditional, listed.widen(law)))
        if self.mode == "greedy":
            return DraftedWindow.greedy(torch.cat(greedy, 1))
        return DraftedWindow.joined(parts)

    def behind(self, state: Tensor, tokens: Tensor) -> Tensor:
        """Move states ``(B, D)`` by tokens ``(B, n)``, one after the other."""
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
            draft: of :meth:`draft`. pending: as there.
            target: ``(B, K + 1, V)``, the verifier's logits before, inside and after the window.
            uniforms: ``(B, K + 1)``.

        Returns:
            how many tokens are kept ``(B,)``, the pending one included, and the next one ``(B,)``.
        """
        evidence = None if pending is None else torch.ones_like(pending)
        if self.mode == "greedy":  # the op reads neither probability nor leaf: any will do
            unused = target.new_zeros(draft.tokens.shape, dtype=accumulator(target.dtype))
            leaf = target[:, :-1, None]
            return ops.spec_verify(
                target, draft.tokens, unused, unused[..., None], leaf, uniforms, evidence, 0.0
            )
        temperature = self.temperature
        if self.top_p < 1:
            wide = target.to(accumulator(target.dtype))
            target, temperature = nucleus(wide / temperature, self.top_p), 1.0
        numbers = [target, draft.conditional, draft.posterior, draft.circuit.leaf]
        if any(t.dtype == torch.float64 for t in numbers):  # the op takes it on both sides only
            numbers = [t.double() for t in numbers]
        target, conditional, posterior, leaf = numbers
        return ops.spec_verify(
            target, draft.tokens, conditional, posterior, leaf, uniforms, evidence, temperature
        )


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """A token of each row's ``softmax(logits)`` ``(B, V)`` by the inverse of its running sums;
    ``uniforms (B,)``."""
    sums = logits.double().softmax(-1).cumsum(-1)
    limit = uniforms[:, None].to(sums) * sums[:, -1:]
    return torch.searchsorted(sums, limit, right=True)[:, 0]


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits with ``-inf`` outside the smallest set of likeliest tokens that has ``top_p``."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(dropped, -torch.inf)
