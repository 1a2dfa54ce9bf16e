"""From hidden states to the weights of a circuit's sums: prior and transitions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext.reference import num_transitions

_STAY = 0.99  # probability of keeping the state under init_identity; our choice


class SumWeights(nn.Module):
    """Logits of the prior, ``prior @ h``, and of ``M`` transitions, ``trans @ h + trans_bias``.

    Args:
        kind: the family of circuits. n_token: ``K``. rank: ``C``. hidden_size: ``D``.
        contextual: whether transitions depend on ``h``; otherwise the bias is all there is.
        share_transitions: one transition matrix is stored and serves all ``M`` steps.
        init_identity: transitions start by keeping the state with probability 0.99; otherwise they
            start near uniform.
        options: dtype and device of the parameters.

    Attributes:
        prior: ``(C, D)``, or None with ``ff``, which has no sum.
        trans_bias: ``(M, C, C)``, or ``(1, C, C)`` where they share one; None where ``M = 0``.
        trans: ``(M, C, C, D)`` or ``(1, C, C, D)``; None also where they do not depend on ``h``.
    """

    def __init__(
        self,
        kind: str,
        n_token: int,
        rank: int,
        hidden_size: int,
        contextual: bool,
        share_transitions: bool,
        init_identity: bool,
        **options: Any,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.init_identity = init_identity
        self.num_transitions = num_transitions(kind, n_token)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **options))

        c, d = rank, hidden_size
        stored = min(self.num_transitions, 1) if share_transitions else self.num_transitions
        self.prior = None if kind == "ff" else parameter(c, d)
        self.trans_bias = parameter(stored, c, c) if stored else None
        self.trans = parameter(stored, c, c, d) if stored and contextual else None

    def reset_parameters(self, bound: float) -> None:
        """New values from torch's generator, uniform in ``±bound``; the bias as ``init_identity``
        has it."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        if self.trans_bias is not None:
            stay = math.log((self.rank - 1) * _STAY / (1 - _STAY)) if self.init_identity else 0.0
            identity = torch.eye(self.rank, device=self.trans_bias.device)
            self.trans_bias.copy_(stay * identity.expand_as(self.trans_bias))

    def forward(self, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits of rows ``(N, D)``: prior ``(N, C)`` and transitions ``(N, M, C, C)``; None where
        there are none."""
        if self.prior is None:
            return None, None
        prior = F.linear(rows, self.prior)
        if self.trans_bias is None:
            return prior, None
        stored, c = self.trans_bias.shape[:2]
        if self.trans is None:
            trans = self.trans_bias[None].to(prior.dtype)  # autocast may have made it narrower
        else:
            trans = F.linear(rows, self.trans.flatten(0, 2), self.trans_bias.flatten())
            trans = trans.view(-1, stored, c, c)
        return prior, trans.expand(len(rows), self.num_transitions, c, c)
