"""How a request of continuous batching chooses its tokens, whatever its neighbours do."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """One request's way to choose tokens.

    Args:
        temperature: 0 takes the largest logit, of equals the first; larger is more random.
        top_p: draw from the fewest tokens whose probabilities, the largest first, reach it.
        seed: of the request's own generator: the same draws whatever is in the batch. None: torch's
            generator for all. Requests forked from one share its generator.

    Raises:
        ValueError: naming the argument, what was expected and what was found.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", for ``top_p``.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        t, p, seed = self.temperature, self.top_p, self.seed
        if not (isinstance(t, numbers.Real) and 0 <= t < float("inf")):
            raise ValueError(f"Sampling: temperature: expected a number from 0, found {t!r}")
        if not (isinstance(p, numbers.Real) and 0 < p <= 1):
            raise ValueError(f"Sampling: top_p: expected a number in (0, 1], found {p!r}")
        if seed is not None and not (isinstance(seed, int) and -(1 << 63) <= seed < 1 << 63):
            raise ValueError(
                f"Sampling: seed: expected None or an integer of 64 bits, found {seed!r}"
            )

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A new one of the seed."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A token.

        Args:
            logits: ``(V,)``, floating. generator: on their device; None is torch's own.

        Returns:
            Its number, ``()`` int64.
        """
        if self.temperature == 0:
            return logits.argmax()
        # The largest becomes 0 first, so that no quotient overflows.
        probabilities = ((logits - logits.max()).double() / self.temperature).softmax(-1)
        if self.top_p < 1:
            falling, order = probabilities.sort(descending=True)
            before = falling.cumsum(-1) - falling
            probabilities[order[before >= self.top_p]] = 0
        return torch.multinomial(probabilities, 1, generator=generator)[0]
