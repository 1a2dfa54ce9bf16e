"""Prediction of a guide's state from the model's hidden state, instead of filtering the prompt.

Source: LTLA (arXiv 2511.16054), which predicts the prior of its hidden Markov model by a network.
Our choice: a single layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import integer, number, require

from ._guide import Guide

_WHERE = "PriorHead"


class PriorHead(nn.Module):
    """Layer ``A = softmax(P h)``: distribution of the guide's state at the next token.

    ``h`` is the model's hidden state: the input of its LM head. With
    ``ConstraintProcessor(..., prior=head(hidden))``, generation starts from the distribution after
    the prompt; ``hidden`` are the hidden states at the last token of each prompt.

    Letters: ``B`` rows, ``D`` features of a hidden state, ``H`` states of the guide.

    Args:
        guide: Guide whose state is predicted.
        hidden_size: Number of features ``D``; None for the number in ``guide.prior``, the weight
            learned with the guide.

    Attributes:
        weight: Weight ``P (H, D)``, initialised with ``guide.prior``. If ``guide.prior`` is None,
            the weight is initialised with zeros, which give a uniform distribution.

    Raises:
        ValueError: If ``hidden_size`` differs from that of ``guide.prior``, or both are None.
    """

    def __init__(self, guide: Guide, hidden_size: int | None = None):
        super().__init__()
        self.guide = guide
        known = None if guide.prior is None else guide.prior.shape[1]
        if hidden_size is not None:
            integer(_WHERE, "hidden_size", hidden_size, 1)
        size = known if hidden_size is None else hidden_size
        expected = "a number (no guide.prior)" if known is None else f"{known}, as in guide.prior"
        require(size is not None and known in (None, size), _WHERE, "hidden_size", expected, size)
        if guide.prior is not None:
            self.weight = nn.Parameter(guide.prior.clone())
        else:
            assert size is not None
            self.weight = nn.Parameter(guide.initial.new_zeros(guide.num_states, size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states ``(B, D)`` to distributions ``(B, H)`` in the dtype of the guide."""
        return (hidden.to(self.weight) @ self.weight.t()).softmax(-1)

    def log_prob(self, hidden: Tensor, following: Tensor) -> Tensor:
        """Return the guide's log-probability of the tokens after each hidden state, ``(B,)``.

        The value is ``log sum_z A(z) p(x_1 .. x_m | z)``, where ``p(. | z)`` is the guide's
        probability of the tokens if state z emits the first one.

        Args:
            hidden: Hidden states ``(B, D)``.
            following: The next m tokens, ``(B, m)`` int64; -1 after the end of a text.
        """
        law, guide = self(hidden), self.guide
        behind, scale = torch.ones_like(law), law.new_zeros(len(law))
        for t in reversed(range(following.shape[1])):
            token = following[:, t]
            seen = guide.by_token[token.clamp(min=0)] * behind
            seen = torch.where((token >= 0)[:, None], seen, 1.0)
            top = seen.amax(-1, keepdim=True).clamp(min=torch.finfo(law.dtype).tiny)
            scale = scale + top[:, 0].log()
            behind = seen / top
            if t:
                behind = behind @ guide.transition.t()
        return (law * behind).sum(-1).log() + scale

    def fit(
        self,
        hidden: Tensor,
        following: Tensor,
        *,
        steps: int = 200,
        batch: int = 256,
        learning_rate: float = 0.05,
        apart: int | None = None,
        seed: int = 0,
        progress: Any = None,
    ) -> float:
        """Fit the layer to positions of texts by maximising :meth:`log_prob`.

        Args:
            hidden: Hidden states ``(N, D)`` at N positions.
            following: The next m tokens of each position, ``(N, m)``, see :meth:`log_prob`.
            steps: Number of steps of Adam, with a cosine learning rate that decays to zero.
            batch: Number of positions per step.
            learning_rate: Initial learning rate.
            apart: Number of positions at the end of ``hidden`` that are held out; None for a tenth.
            seed: Seed of the batches.
            progress: Function that shows the progress, see :func:`distil`.

        Returns:
            Negative log-likelihood in nats per token on the held-out positions.

        Raises:
            ValueError: If there are fewer than two positions, or a number is out of range.
        """
        integer(_WHERE, "steps", steps, 0)
        integer(_WHERE, "batch", batch, 1)
        number(_WHERE, "learning_rate", learning_rate, above=0)
        fits = len(hidden) == len(following) >= 2 and hidden.shape[1:] == self.weight.shape[1:]
        shapes = f"{tuple(hidden.shape)} and {tuple(following.shape)}"
        expected = f"shapes (N, {self.weight.shape[1]}) and (N, m) with N at least 2"
        require(fits, _WHERE, "hidden and following", expected, shapes)
        apart = max(1, len(hidden) // 10) if apart is None else apart
        integer(_WHERE, "apart", apart, 1, len(hidden) - 1)
        optimizer = torch.optim.Adam([self.weight], learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        drawing = torch.Generator().manual_seed(seed)
        listed: Any = range(steps)
        for _ in listed if progress is None else progress(listed, desc="prior", total=steps):
            chosen = torch.randint(len(hidden) - apart, (batch,), generator=drawing)
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = -self.log_prob(hidden[chosen], following[chosen]).mean()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            total = -self.log_prob(hidden[-apart:], following[-apart:]).double().sum()
        return float(total / (following[-apart:] >= 0).sum())
