"""One module's factors out of those of several clients. All in float64 on the CPU.

A client's rank may be smaller than that of the global adapter: it then has the first rows of A and
the first columns of B. Sums go from client to client in the order that is given, element by
element, so that no result depends on the number of threads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext.adapter import norm_of


class Part(NamedTuple):
    """What one client says of one tensor, and its weight."""

    weight: float
    value: Tensor
    otherwise: float  # its weight where those of all are 0


class PairPart(NamedTuple):
    """What one client says of one module."""

    weight: float
    a: Tensor  # (r, I)
    b: Tensor  # (O, r)


def mean_of(start: Tensor, parts: Sequence[Part], axis: int, zero_pad: bool) -> Tensor:
    """The weighted mean, rank by rank over the clients that have the rank; shaped like ``start``.

    Args:
        start: the global value, which ranks that nobody has keep. parts: at least one.
        axis: of the ranks. zero_pad: whether a client's missing ranks count as zeros.
    """
    result = start.clone()
    bounds = {0, start.shape[axis], *(part.value.shape[axis] for part in parts)}
    for low, high in itertools.pairwise(sorted(bounds)):
        ranks = result.narrow(axis, low, high - low)
        having: list[Part] = []
        for part in parts:
            if part.value.shape[axis] >= high:
                having.append(part._replace(value=part.value.narrow(axis, low, high - low)))
            elif zero_pad:
                having.append(part._replace(value=torch.zeros_like(ranks)))
        if having:
            ranks.copy_(mean(having))
    return result


def mean(parts: Sequence[Part]) -> Tensor:
    """The weighted mean, around the first value: that of equal values is exactly what they are."""
    weights = [part.weight for part in parts]
    if not any(weights):
        weights = [part.otherwise for part in parts]
    total = sum(weights)
    first = parts[0].value
    away = torch.zeros_like(first)
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        away += (weight / total) * (part.value - first)  # a share: no weight makes it overflow
    return first + away


def by_norm(parts: Sequence[PairPart]) -> list[float]:
    """Weights times the norm of each client's ``B A``; the weights where all norms are 0."""
    scaled = [part.weight * norm_of(part.a.flatten(1), part.b.flatten(1)) for part in parts]
    return scaled if any(scaled) else [part.weight for part in parts]


def stack_of(parts: Sequence[PairPart]) -> tuple[Tensor, Tensor]:
    """Factors of ``sum w_i B_i A_i``, the weights as they are, their roots in either factor."""
    roots = [math.sqrt(abs(part.weight)) for part in parts]
    a = torch.cat([root * part.a.flatten(1) for root, part in zip(roots, parts, strict=True)])
    signs = [math.copysign(root, part.weight) for root, part in zip(roots, parts, strict=True)]
    b = torch.cat([s * part.b.flatten(1) for s, part in zip(signs, parts, strict=True)], 1)
    return a, b


def normalised(parts: Sequence[PairPart], to: float = 1.0) -> list[PairPart]:
    """The same with weights that sum up to ``to``."""
    total = sum(part.weight for part in parts)
    return [part._replace(weight=to * (part.weight / total)) for part in parts]


def noise_of(parts: Sequence[PairPart], mean_a: Tensor, mean_b: Tensor) -> tuple[float, float]:
    """``|| sum w_i B_i A_i - (mean B)(mean A) ||_F`` and ``|| sum w_i B_i A_i ||_F``; weights sum
    up to 1, and ranks that no part has are left out of the means."""
    a, b = stack_of(parts)
    size = norm_of(a, b)
    if len(parts) == 1:
        return 0.0, size
    rank = max(len(part.a) for part in parts)
    mean_a, mean_b = mean_a.flatten(1)[:rank], mean_b.flatten(1)[:, :rank]
    difference = norm_of(torch.cat([a, mean_a]), torch.cat([b, -mean_b], 1))
    return difference, size
