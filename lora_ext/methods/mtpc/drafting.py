"""Windows that start behind a decided token: what a draft with a bridge draws.

Circuits here are over the ``L`` tokens of the head's list, and so are the draws; only the law of
each position, mixed over the components, is spread over the vocabulary for the test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext import ops
from lora_ext.reference import log_softmax

from .layers import Circuit, CircuitHead
from .token_bridge import TokenBridge


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


@dataclass(frozen=True)
class Chain:
    """Windows one behind the other, each from the state that the tokens before it have moved.

    Attributes:
        head: of the windows. bridge: moves the state. embed: tokens ``(...)`` to ``(..., D)``.
        length: how many windows.
    """

    head: CircuitHead
    bridge: TokenBridge
    embed: Callable[[Tensor], Tensor]
    length: int

    def drawn(self, hidden: Tensor, token: Tensor, uniforms: Tensor) -> DraftedWindow:
        """Samples of all windows behind a token, as one window.

        Args:
            hidden: ``(B, D)``, of the token before that one. token: ``(B,)``.
            uniforms: ``(B, K, 2)`` with ``K`` the tokens of all windows.

        Returns:
            a window whose circuit has one component: the mixture, position by position.
        """
        parts: list[tuple[Tensor, ...]] = []
        state, before = hidden, token[:, None]
        for numbers in uniforms.split(self.head.n_token, 1):
            state = self._behind(state, before)
            circuit = self.head.narrow_circuit(state)
            places, conditional, posterior = ops.circuit_sample(self.head.kind, *circuit, numbers)
            leaf = log_softmax(circuit.leaf.to(posterior.dtype))  # (B, n, C, L)
            law = (leaf + posterior.log()[..., None]).logsumexp(2)  # (B, n, L)
            before = self.head.listed.tokens(places)
            parts.append((before, conditional, law))
        tokens, conditional, law = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        mixture = Circuit(self.head.listed.widen(law)[:, :, None], None, None)
        return DraftedWindow(mixture, tokens, conditional, torch.ones_like(conditional)[..., None])

    def likeliest(self, hidden: Tensor, token: Tensor) -> DraftedWindow:
        """As :meth:`drawn`, with the likeliest token after those before it at every position.

        That is what a greedy verifier asks of each token. The likeliest window is another.
        """
        state, parts = hidden, [token[:, None]]
        for _ in range(self.length):
            state = self._behind(state, parts[-1])
            circuit = self.head.narrow_circuit(state)
            places = torch.full((len(state), self.head.n_token), -1, device=state.device)
            for k in range(self.head.n_token):
                at = torch.full_like(token, k)
                law = ops.circuit_conditional_dist(self.head.kind, *circuit, places, at)  # (B, L)
                places[:, k] = law.argmax(-1)
            parts.append(self.head.listed.tokens(places))
        return DraftedWindow.greedy(torch.cat(parts[1:], 1))

    def _behind(self, state: Tensor, tokens: Tensor) -> Tensor:
        """States ``(B, D)`` moved by tokens ``(B, n)``, one after the other."""
        for token in tokens.unbind(1):
            state = self.bridge(state, self.embed(token))
        return state


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
