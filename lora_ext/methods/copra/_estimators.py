"""Three estimators of Shapley values: which coalitions they ask for, and what they make of them.

A coalition is a number whose bit i says whether player i takes part. None of the three looks at a
value before it has named all coalitions, so that these can be evaluated many at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Estimator(NamedTuple):
    """What to ask for, and the values ``(n,)`` and standard errors ``(n,)`` that follow."""

    coalitions: list[int]  # may come more than once
    combine: Callable[[Tensor], tuple[Tensor, Tensor]]  # of their values, float64, in order


def exact(n: int) -> Estimator:
    """All ``2^n`` coalitions, by the definition: each player's weighted mean gain over those of
    the others. The standard error is 0."""

    def combine(v: Tensor) -> tuple[Tensor, Tensor]:
        number = torch.arange(2**n)
        sizes = sum((number >> i & 1 for i in range(n)), torch.zeros_like(number))
        # |S|! (n - |S| - 1)! / n! of a coalition of the others
        weights = [1 / (n * math.comb(n - 1, size)) for size in range(n)]
        weight = torch.tensor([*weights, 0.0], dtype=torch.float64)[sizes]
        phi = torch.zeros(n, dtype=torch.float64)
        for i in range(n):
            without = number[(number >> i & 1) == 0]
            phi[i] = (weight[without] * (v[without | 1 << i] - v[without])).sum()
        return phi, torch.zeros_like(phi)

    return Estimator(list(range(2**n)), combine)


def permutation(
    n: int, orders: int, antithetic: bool, generator: torch.Generator | None
) -> Estimator:
    """Gains along random orders of joining; a sample is an order, or one and its reverse."""
    drawn: list[list[int]] = []
    for _ in range(orders):
        order = torch.randperm(n, generator=generator).tolist()
        drawn += [order, order[::-1]] if antithetic else [order]
    asked = [coalition for order in drawn for coalition in _joining(order)]

    def combine(v: Tensor) -> tuple[Tensor, Tensor]:
        gains = v.view(len(drawn), n + 1).diff(dim=1)  # by place in the order
        by_player = torch.empty_like(gains).scatter_(1, torch.tensor(drawn), gains)
        samples = by_player.view(orders, -1, n).mean(1)
        return samples.mean(0), _error_of_mean(samples)

    return Estimator(asked, combine)


def owen(n: int, draws: int, levels: int, generator: torch.Generator | None) -> Estimator:
    """Gains over random coalitions of the others, by the probability q of each of them.

    ``phi_i`` is the integral over q in [0, 1] of the mean gain, here the mean over midpoints.
    """
    asked: list[int] = []
    inside: list[list[bool]] = []
    for level in range(levels):
        q = (level + 0.5) / levels
        for _ in range(draws):
            members = (torch.rand(n, generator=generator) < q).tolist()
            inside.append(members)
            coalition = sum(1 << i for i in range(n) if members[i])
            asked += [coalition, *(coalition ^ 1 << i for i in range(n))]

    def combine(v: Tensor) -> tuple[Tensor, Tensor]:
        table = v.view(levels * draws, n + 1)
        changes = table[:, 1:] - table[:, :1]  # by the player's coming, or by its going
        gains = torch.where(torch.tensor(inside), -changes, changes)
        if draws == 1:  # between the levels, which is more than within them
            return gains.mean(0), _error_of_mean(gains)
        by_level = gains.view(levels, draws, n)
        errors = torch.stack([_error_of_mean(level) for level in by_level])
        return gains.mean(0), errors.square().sum(0).sqrt() / levels

    return Estimator(asked, combine)


def _joining(order: list[int]) -> list[int]:
    """The coalitions along an order, from the empty to the full one."""
    found = [0]
    for player in order:
        found.append(found[-1] | 1 << player)
    return found


def _error_of_mean(samples: Tensor) -> Tensor:
    """``(n,)`` standard errors of the mean of ``(samples, n)``; NaN of a single one."""
    if len(samples) == 1:
        return torch.full_like(samples[0], math.nan)
    return samples.std(0) / math.sqrt(len(samples))
