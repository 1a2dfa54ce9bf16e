"""Per-request sampling in continuous batching, independent of the other requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_ext._checks import check_fields, require, within


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one request.

    Args:
        temperature: divisor of the logits. 0 selects the token with the largest logit, the first
            one in a tie.
        top_p: tokens are drawn from the smallest set of most likely tokens whose probabilities sum
            to at least this value.
        seed: seed of a generator for this request, so that its tokens do not depend on the batch.
            None uses torch's default generator. Forked requests share a generator.
        top_k: number of most likely tokens to draw from; -1 for all. Applied before ``top_p``.

    Raises:
        ValueError: If an argument is invalid; the message names it.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", for ``top_p``.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = -1

    def __post_init__(self) -> None:
        bounds = {
            "temperature": within(0),
            "top_p": within(above=0, maximum=1),
            "seed": within(-(1 << 63), (1 << 63) - 1, expected="None or a 64-bit integer"),
            "top_k": within(-1, expected=("an integer", "a number of tokens, or -1 for all")),
        }
        check_fields(self, bounds)
        # Stored as a float, because torch cannot divide by integers of more than 64 bits.
        object.__setattr__(self, "temperature", float(self.temperature))
        found = self.top_k
        require(found != 0, "Sampling", "top_k", "a number of tokens, or -1 for all", found)

    @property
    def draws_from_all(self) -> bool:
        """True if tokens are drawn from the whole distribution."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k == -1

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return a new generator with the seed, or None if there is no seed."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sample one token id from ``logits``.

        Args:
            logits: floating-point logits ``(V,)`` of the V tokens.
            generator: generator on the device of ``logits``, or None for torch's default generator.

        Returns:
            A token id, ``()`` int64; any id if a logit is NaN or no logit is finite.
        """
        if self.temperature == 0:
            return logits.argmax()
        # The largest logit becomes 0 before the division, so that no quotient overflows.
        heat = (logits - logits.max()).double() / self.temperature
        if 0 < self.top_k < heat.shape[0]:
            least = heat.topk(self.top_k).values[-1]
            # Logits equal to the k-th largest are kept too.
            heat = heat.masked_fill(heat < least, float("-inf"))
        # multinomial rejects NaN, on a GPU by an assertion, which would end all other requests.
        probabilities = heat.softmax(-1).nan_to_num(1.0)
        if self.top_p < 1:
            falling, order = probabilities.sort(descending=True)
            before = falling.cumsum(-1) - falling
            probabilities[order[before >= self.top_p]] = 0
        return torch.multinomial(probabilities, 1, generator=generator)[0]
