"""How a request of continuous batching chooses its tokens, whatever its neighbours do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_ext._checks import check_fields, require, within


@dataclass(frozen=True)
class Sampling:
    """One request's way to choose tokens.

    Args:
        temperature: 0 takes the largest logit, of equals the first; larger is more random.
        top_p: draw from the fewest tokens whose probabilities, the largest first, reach it.
        seed: of the request's own generator: the same draws whatever is in the batch. None: torch's
            generator for all. Requests forked from one share its generator.
        top_k: draw from so many tokens, the likeliest; -1 from all. It comes before ``top_p``.

    Raises:
        ValueError: naming the argument, what was expected and what was found.

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
            "seed": within(-(1 << 63), (1 << 63) - 1, expected="None or an integer of 64 bits"),
            "top_k": within(-1, expected=("an integer", "a number of tokens, or -1 for all")),
        }
        check_fields(self, bounds)
        # torch divides by no integer above 64 bits
        object.__setattr__(self, "temperature", float(self.temperature))
        found = self.top_k
        require(found != 0, "Sampling", "top_k", "a number of tokens, or -1 for all", found)

    @property
    def draws_from_all(self) -> bool:
        """Whether a token is drawn, and from the whole distribution."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k == -1

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return a new generator with the seed; None without one."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sample one token id from ``logits``.

        Args:
            logits: ``(V,)``, floating. generator: on their device; None is torch's own.

        Returns:
            Its number, ``()`` int64. Of logits that have a NaN, or none that is finite, any.
        """
        if self.temperature == 0:
            return logits.argmax()
        # The largest becomes 0 first, so that no quotient overflows.
        heat = (logits - logits.max()).double() / self.temperature
        if 0 < self.top_k < heat.shape[0]:
            least = heat.topk(self.top_k).values[-1]
            heat = heat.masked_fill(heat < least, float("-inf"))  # equals of the last stay
        # An error here, or on a GPU an assertion, would end the steps of all other requests.
        probabilities = heat.softmax(-1).nan_to_num(1.0)
        if self.top_p < 1:
            falling, order = probabilities.sort(descending=True)
            before = falling.cumsum(-1) - falling
            probabilities[order[before >= self.top_p]] = 0
        return torch.multinomial(probabilities, 1, generator=generator)[0]
