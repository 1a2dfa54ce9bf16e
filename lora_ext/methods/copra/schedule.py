"""Schedule of the layer groups that are active at each step, drawn from the seed and the step."""

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
    """Schedule of layer dropping: the probability and the mask of each training step.

    The probability of step t is ``p(t) = min(p1, p0 + (p1 - p0) ramp(t / E))`` with
    ``E = ceil(rho T)``, and p1 if t >= E. The number of active groups is drawn from the binomial
    distribution of L trials with probability p(t), conditioned on at least ``min_active``. The
    active groups are then drawn uniformly. No draw has to be repeated, even if p is small.

    A mask depends only on the config, ``num_groups``, ``total_steps`` and the step. A resumed run
    with the same arguments and every process of a parallel run therefore draw the same masks, with
    any version of torch.

    Args:
        config: Settings; only p0, p1, ramp_ratio, ramp, min_active and seed are used.
        num_groups: L, number of groups of layers.
        total_steps: T, number of optimizer steps of the whole training.

    Raises:
        ValueError: If ``total_steps`` or ``num_groups`` is below 1, or ``num_groups`` is below
            ``min_active``.
        TypeError: If ``total_steps`` or ``num_groups`` is not an int.

    Source: arXiv 2410.22911; the ramp is that of the authors' follow-up (zwebzone/coto). The
    follow-up redraws empty masks, which gives the same distribution.
    """

    def __init__(self, config: CopraConfig, num_groups: int, total_steps: int):
        for name, value in (("num_groups", num_groups), ("total_steps", total_steps)):
            integer("CopraSchedule", name, value, 1)
        least, expected = config.min_active, f"at most the number of groups, {num_groups}"
        require(least <= num_groups, "CopraSchedule", "min_active", expected, least)
        self.config = config
        self.num_groups = num_groups
        self.total_steps = total_steps
        # Without `round`, 0.07 * 100, which is slightly above 7 in floating point, would become 8.
        self.ramp_steps = max(1, math.ceil(round(config.ramp_ratio * total_steps, 9)))

    def probability(self, step: int) -> float:
        """Return p(t), the probability that a group is active, without regard to ``min_active``.

        Raises:
            ValueError: If the step is negative, or the ramp returns a negative number or NaN.
            TypeError: If the step is not an int.
        """
        integer("CopraSchedule", "step", step, 0)
        p0, p1 = self.config.p0, self.config.p1
        if step >= self.ramp_steps:
            return p1
        ramp, fraction = self.config.ramp, step / self.ramp_steps
        value = ramp(fraction) if callable(ramp) else _RAMPS[ramp](fraction)
        expected = "a function with values in [0, 1]"
        require(value >= 0, "CopraSchedule", "ramp", expected, f"{value!r} at {fraction}")
        return min(p1, p0 + (p1 - p0) * value)

    def mask(self, step: int) -> Tensor:
        """Return the mask ``(num_groups,)`` of the groups that are active at ``step``, bool on the
        CPU.

        Raises:
            ValueError, TypeError: As for :meth:`probability`.
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
        """Return the expected number of active groups at ``step``.

        Raises:
            ValueError, TypeError: As for :meth:`probability`.
        """
        return math.fsum(k * chance for k, chance in self._counts(self.probability(step)).items())

    def mean_activation(self) -> float:
        """Return the mean of p(t) over all steps; ``min_active`` is ignored.

        The mean is roughly the fraction of the adapters' computation that is not skipped. With a
        linear ramp to p1 = 1 and many steps, the mean is near ``rho (p0 + 1) / 2 + 1 - rho``.
        """
        return math.fsum(map(self.probability, range(self.total_steps))) / self.total_steps

    def _counts(self, p: float) -> dict[int, float]:
        """Return the probability of each possible number of active groups."""
        n, least = self.num_groups, self.config.min_active
        if p == 0:
            return {least: 1.0}
        if p == 1:
            return {n: 1.0}
        # The weights are computed from their logarithms, since they would underflow for tiny p.
        odds = math.log(p) - math.log1p(-p)
        logs = [math.log(math.comb(n, k)) + k * odds for k in range(least, n + 1)]
        highest = max(logs)
        weights = [math.exp(value - highest) for value in logs]
        total = math.fsum(weights)
        return {k: weight / total for k, weight in enumerate(weights, least)}


def _uniforms(seed: int, step: int, count: int) -> list[float]:
    """Return ``count`` numbers in [0, 1). Each consists of 53 bits of a hash of the seed, the step
    and a counter."""
    found: list[float] = []
    for block in range(math.ceil(count / 8)):
        digest = hashlib.blake2b(f"{seed}:{step}:{block}".encode()).digest()  # 64 bytes
        words = (int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8))
        found += [(word >> 11) * 2.0**-53 for word in words]
    return found[:count]
