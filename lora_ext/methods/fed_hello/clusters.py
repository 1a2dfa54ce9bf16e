"""Groups of layers with similar importance, by exact k-means in one dimension."""

from __future__ import annotations

import math
from bisect import bisect_right
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
    """Return g, the weight of each layer, which depends on the group of its score.

    The sorted scores are cut into k groups such that the sum of squared deviations from the group
    means is minimal, by dynamic programming. Equal scores are in the same group. Of two equally
    good cuts, the earlier one is used. With fewer than k distinct scores, each distinct score is a
    group, and the first levels are used; if all scores are equal, all weights are equal.

    Args:
        scores: Importance of each of L layers, ``(L,)``, finite.
        k: Number of groups.
        levels: Weight of each group before normalisation, in ascending order of the scores.

    Returns:
        ``(L,)`` float64 with sum 1.

    Raises:
        ValueError: If k is below 1, there are fewer than k levels, a level is not finite and above
            0, or the scores have another shape or are not finite.
        TypeError: If k is not an integer.

    Source: arXiv 2506.12213, FIM-HLA: three groups, with weights 1, 2 and 3. The groups of the
    authors' code have no order; in the paper, the weights increase with the score.
    """
    where = "cluster_weights"
    k = integer(where, "k", k, 1)
    require(len(levels) >= k, where, "levels", f"at least k = {k} levels", list(levels))
    positive = all(math.isfinite(level) and level > 0 for level in levels)
    require(positive, where, "levels", "finite numbers above 0", list(levels))
    values = torch.as_tensor(scores, dtype=torch.float64).detach().cpu()
    fits = values.dim() == 1 and values.numel() > 0
    require(fits, where, "scores", "shape (L,)", [*values.shape])
    require(bool(values.isfinite().all()), where, "scores", "finite numbers", values.tolist())
    distinct, place, counts = values.unique(return_inverse=True, return_counts=True)  # ascending
    groups = _groups(distinct.tolist(), counts.tolist(), min(k, len(distinct)))
    return normalised([levels[groups[i]] for i in place.tolist()])


def _groups(points: list[float], counts: list[int], k: int) -> list[int]:
    """Return the group of each of the ascending, distinct ``points``, where ``counts[i]`` scores
    are equal to ``points[i]``."""
    # Computed in exact fractions, so that rounding does not decide between equally good cuts.
    pairs = zip(map(Fraction, points), counts, strict=True)
    powers = zip(*((Fraction(count), count * p, count * p * p) for p, count in pairs), strict=True)
    sums = [[*accumulate(values, initial=Fraction(0))] for values in powers]

    @cache
    def cost(start: int, end: int) -> Fraction:
        """Return the sum of squares of ``points[start:end]`` around their mean."""
        number, total, squares = (own[end] - own[start] for own in sums)
        return squares - total * total / number

    @cache
    def best(end: int, groups: int) -> tuple[Fraction, tuple[int, ...]]:
        """Return the least cost of ``points[:end]`` in this many groups, and where they start."""
        if groups == 1:
            return cost(0, end), (0,)
        starts = range(groups - 1, end)
        costs = ((best(start, groups - 1)[0] + cost(start, end), start) for start in starts)
        least, last = min(costs)
        return least, (*best(last, groups - 1)[1], last)

    starts = best(len(points), k)[1]
    return [bisect_right(starts, i) - 1 for i in range(len(points))]
