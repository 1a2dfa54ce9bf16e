"""Windows that start behind a decided token: what a draft with a bridge draws.

Circuits here are over the ``L`` tokens of the head's list, and so are the draws; only the law of
each position, mixed over the components, is spread over the vocabulary for the test.

A draft that starts behind a decided token cannot have that token's hidden state: the model has not
seen it yet. :class:`TokenBridge` guesses it from the state before the token and the token's
embedding.

Source: draft heads that read the token before theirs are Hydra's (Ankner et al. 2024, arXiv
2402.05109) and EAGLE's (Li et al. 2024, arXiv 2401.15077); a circuit behind one is ours
(docs/mtpc.md, "Bridge").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext import ops
from lora_ext._checks import require
from lora_ext.reference import accumulator, log_softmax

from .layers import Circuit, CircuitHead


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
        """Samples of all windows behind a token, as one window of one component: the mixture,
        position by position.

        Args:
            hidden: ``(B, D)``, of the token before that one. token: ``(B,)``.
            uniforms: ``(B, K, 2)`` with ``K`` the tokens of all windows.
        """
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        state, before = hidden, token[:, None]
        for numbers in uniforms.split(self.head.n_token, 1):
            state = self.behind(state, before)
            circuit = self.head.narrow_circuit(state)
            places, conditional, posterior = ops.circuit_sample(self.head.kind, *circuit, numbers)
            leaf = log_softmax(circuit.leaf.to(posterior.dtype))  # (B, n, C, L)
            law = (leaf + posterior.log()[..., None]).logsumexp(2)  # (B, n, L)
            before = self.head.listed.tokens(places)
            parts.append((before, conditional, self.head.listed.widen(law)))
        return DraftedWindow.joined(parts)

    def likeliest(self, hidden: Tensor, token: Tensor) -> DraftedWindow:
        """As :meth:`drawn`, with the likeliest token after those before it at every position.

        That is what a greedy verifier asks of each token. The likeliest window is another.
        """
        state, parts = hidden, [token[:, None]]
        for _ in range(self.length):
            state = self.behind(state, parts[-1])
            circuit = self.head.narrow_circuit(state)
            places = torch.full((len(state), self.head.n_token), -1, device=state.device)
            for k in range(self.head.n_token):
                at = torch.full_like(token, k)
                law = ops.circuit_conditional_dist(self.head.kind, *circuit, places, at)  # (B, L)
                places[:, k] = law.argmax(-1)
            parts.append(self.head.listed.tokens(places))
        return DraftedWindow.greedy(torch.cat(parts[1:], 1))

    def behind(self, state: Tensor, tokens: Tensor) -> Tensor:
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
