"""The schedule: which groups of layers train at a step, from the seed and the step alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_ext._checks import integer, require

from .config import CopraConfig

_RAMPS: dict[str, Callable[[float], float]] = {
    "linear": lambda fraction: fraction,
    "sine": lambda fraction: math.sin(math.pi / 2 * fraction),
    "exponential": lambda fraction: math.expm1(fraction) / math.expm1(1.0),
    "constant": lambda fraction: 0.0,
}


class CopraSchedule:
    """Probabilities and masks of the steps ``0 .. total_steps - 1``.

    ``p(t) = min(p1, p0 + (p1 - p0) ramp(t / E))`` with ``E = ceil(rho T)``, and p1 from step E on.
    The number of active groups follows the binomial of p(t) under the condition that it is at
    least ``min_active``; which ones they are is drawn evenly. Both take the same time for every p.

    A mask depends on nothing but the seed, the step and the number of groups: a resumed run, a
    recomputed block and every process of a parallel run draw the same one, on any version of torch.

    Args:
        config: of it p0, p1, ramp_ratio, ramp, min_active and seed.
        num_groups: L, groups of layers.
        total_steps: T, optimizer steps of the whole training.

    Raises:
        TypeError: ``total_steps`` or ``num_groups`` that are no ints. ValueError: one of them below
            1, or fewer groups than ``min_active``.

    Source: arXiv 2410.22911; the authors' follow-up (zwebzone/coto) for the ramp. It draws masks
    anew until one is not empty, which is the same law.
    """

    def __init__(self, config: CopraConfig, num_groups: int, total_steps: int):
        for name, value in (("num_groups", num_groups), ("total_steps", total_steps)):
            integer("CopraSchedule", name, value, 1)
        least, expected = config.min_active, f"at most the {num_groups} groups"
        require(least <= num_groups, "CopraSchedule", "min_active", expected, least)
        self.config = config
        self.num_groups = num_groups
        self.total_steps = total_steps
        # 0.07 * 100 is a little more than 7 in floating point.
        self.ramp_steps = max(1, math.ceil(round(config.ramp_ratio * total_steps, 9)))

    def probability(self, step: int) -> float:
        """p(t), the probability of each group before the condition.

        Raises:
            TypeError: a step that is no int. ValueError: one below 0; a ramp whose value is below 0
                or no number.
        """
        integer("CopraSchedule", "step", step, 0)
        p0, p1 = self.config.p0, self.config.p1
        if step >= self.ramp_steps:
            return p1
        ramp, fraction = self.config.ramp, step / self.ramp_steps
        value = ramp(fraction) if callable(ramp) else _RAMPS[ramp](fraction)
        expected = "a fraction in [0, 1]"
        require(value >= 0, "CopraSchedule", "ramp", expected, f"{value!r} at {fraction}")
        return min(p1, p0 + (p1 - p0) * value)

    def mask(self, step: int) -> Tensor:
        """``(num_groups,)`` bool on the CPU: the groups that train at the step.

        Raises:
            TypeError, ValueError: as :meth:`probability`.
        """
        p = self.probability(step)
        count_draw, *draws = _uniforms(self.config.seed, step, self.num_groups + 1)
        total, active = 0.0, self.num_groups
        for count, chance in self._counts(p).items():
            total += chance
            if count_draw < total:
                active = count
                break
        mask = torch.zeros(self.num_groups, dtype=torch.bool)
        mask[sorted(range(self.num_groups), key=draws.__getitem__)[:active]] = True
        return mask

    def expected_active(self, step: int) -> float:
        """The mean number of active groups at the step, the condition included.

        Raises:
            TypeError, ValueError: as :meth:`probability`.
        """
        return math.fsum(k * chance for k, chance in self._counts(self.probability(step)).items())

    def mean_activation(self) -> float:
        """The mean of p(t) over all steps: about what part of the adapters' work is done.

        With a linear ramp to p1 = 1 it tends to ``rho (p0 + 1) / 2 + 1 - rho``. The condition of
        ``min_active`` is left out.
        """
        return math.fsum(map(self.probability, range(self.total_steps))) / self.total_steps

    def _counts(self, p: float) -> dict[int, float]:
        """The probability of each possible number of active groups."""
        n, least = self.num_groups, self.config.min_active
        if p == 0:
            return {least: 1.0}
        if p == 1:
            return {n: 1.0}
        # Logarithms, as the weights of a tiny p vanish in floating point.
        odds = math.log(p) - math.log1p(-p)
        logs = [math.log(math.comb(n, k)) + k * odds for k in range(least, n + 1)]
        highest = max(logs)
        weights = [math.exp(value - highest) for value in logs]
        total = math.fsum(weights)
        return {k: weight / total for k, weight in enumerate(weights, least)}


def _uniforms(seed: int, step: int, count: int) -> list[float]:
    """Numbers in [0, 1) that follow from the arguments: a hash of a counter, 53 bits of it each."""
    found: list[float] = []
    for block in range(math.ceil(count / 8)):
        digest = hashlib.blake2b(f"{seed}:{step}:{block}".encode()).digest()  # 64 bytes
        words = (int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8))
        found += [(word >> 11) * 2.0**-53 for word in words]
    return found[:count]
