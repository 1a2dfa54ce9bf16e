"""Groups of layers by importance: exact k-means in one dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from lora_ext._checks import integer, require

from ._patterns import normalised


def cluster_weights(
    scores: Tensor | Sequence[float], k: int = 3, levels: Sequence[float] = (1, 2, 3)
) -> Tensor:
    """Return g, a weight for each layer by the group of its score.

    The groups minimise the sum of squares within groups: the sorted scores are cut by dynamic
    programming. Equal scores share a group. Of two equally good cuts, the earlier one is taken.
    With fewer distinct scores than k, there are as many groups as distinct scores, with the lowest
    levels; if all scores are equal, so are the weights.

    Args:
        scores: ``(L,)``, finite.
        k: Number of groups.
        levels: Weight of each group before normalisation, from the group of the lowest scores.

    Returns:
        ``(L,)`` float64 with sum 1.

    Raises:
        ValueError, TypeError: If k is not an integer from 1, there are fewer than k levels, a level
            is not finite and above 0, or scores have another shape or are not finite.

    Source: arXiv 2506.12213, FIM-HLA: three groups, weights 1, 2 and 3. The authors' code numbers
    its groups in no order; in the paper the weights rise with the score.
    """
    where = "cluster_weights"
    k = integer(where, "k", k, 1)
    require(len(levels) >= k, where, "levels", f"at least k = {k} of them", list(levels))
    positive = all(math.isfinite(level) and level > 0 for level in levels)
    require(positive, where, "levels", "finite numbers above 0", list(levels))
    values = torch.as_tensor(scores, dtype=torch.float64).detach().cpu()
    fits = values.dim() == 1 and values.numel() > 0
    require(fits, where, "scores", "shape (L,)", [*values.shape])
    require(bool(values.isfinite().all()), where, "scores", "finite numbers", values.tolist())
    distinct, place, counts = values.unique(return_inverse=True, return_counts=True)  # sorted
    groups = _groups(distinct.tolist(), counts.tolist(), min(k, len(distinct)))
    return normalised([levels[groups[i]] for i in place.tolist()])


def _groups(points: list[float], counts: list[int], k: int) -> list[int]:
    """Return the group of each of these ascending points; ``counts[i]`` scores equal
    ``points[i]``."""
    n = len(points)
    # Fractions, so that equally good cuts compare as equal.
    pairs = zip(map(Fraction, points), counts, strict=True)
    powers = zip(*((Fraction(count), count * p, count * p * p) for p, count in pairs), strict=True)
    sums = [[*accumulate(values, initial=Fraction(0))] for values in powers]

    @cache
    def cost(start: int, end: int) -> Fraction:
        """Return the sum of squares of ``points[start:end]`` around their mean."""
        number, total, squares = (own[end] - own[start] for own in sums)
        return squares - total * total / number

    best = [Fraction(0)] * (n + 1)  # [j]: least cost of the first j points
    cuts: list[list[int]] = []  # [i][j - 1]: start of group i if j is its end
    for before in range(k):  # number of earlier groups, each with a point or more
        found: list[tuple[Fraction, int]] = []
        for j in range(1, n + 1):
            starts = range(before, j) if before else range(1)
            totals = ((best[start] + cost(start, j), start) for start in starts)
            found.append(min(totals, default=(Fraction(0), 0)))
        best = [Fraction(0), *(total for total, _ in found)]
        cuts.append([start for _, start in found])
    groups, stop = [0] * n, n
    for group in reversed(range(k)):
        start = cuts[group][stop - 1]
        groups[start:stop] = [group] * (stop - start)
        stop = start
    return groups
