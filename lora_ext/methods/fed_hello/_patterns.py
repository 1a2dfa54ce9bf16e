"""Selection of a client's layers, either fixed by a pattern (GD) or drawn at random (RGD). The
weights of the draw are those of the pattern, or depend on the importance of the layers."""

from __future__ import annotations

import hashlib
import math
import operator
from bisect import bisect_right
from collections.abc import Sequence
from enum import Enum
from fractions import Fraction
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from lora_ext._checks import choice, integer, require

#: Weights of L layers, ``(L,)``, with any sum above 0.
Weights = Tensor | Sequence[float]

_BOTTLENECK = (3, 3, 3, 2, 2, 1, 1, 1, 2, 3, 3, 3)  # the authors' weights for 12 layers


class Pattern(str, Enum):
    """P, position of the layers that most clients train. Layer 0 is at the input of the model."""

    UNIFORM = "uniform"
    TRIANGLE = "triangle"  # near the input
    INVERTED_TRIANGLE = "inverted_triangle"  # near the output
    BOTTLENECK = "bottleneck"  # near both ends

    def __str__(self) -> str:
        return self.value


_LINES = {Pattern.UNIFORM: (1, 0), Pattern.TRIANGLE: (3, -2), Pattern.INVERTED_TRIANGLE: (1, 2)}


def as_pattern(where: str, pattern: Pattern | str) -> Pattern:
    """Return the pattern with this name; if the name is unknown, raise an error that lists all
    names."""
    return Pattern(choice(where, "pattern", pattern, [each.value for each in Pattern]))


def pattern_weights(pattern: Pattern | str, L: int) -> Tensor:
    """Return g, the weight of each of L layers for draws with a pattern.

    For layer l and ``u = l / (L - 1)``, the weight before division by the sum is 1 for "uniform",
    ``3 - 2u`` for "triangle" and ``1 + 2u`` for "inverted_triangle". For "bottleneck", the authors'
    twelve values are interpolated at position ``11 u``.

    Args:
        pattern: A :class:`Pattern` or its name.
        L: Number of layers.

    Returns:
        ``(L,)`` float64 with sum 1.

    Raises:
        ValueError: If the pattern is unknown, or L is below 1.
        TypeError: If L is not an integer.

    Source: arXiv 2506.12213 and its configurations; the interpolation and the slopes of the
    triangles are our choice.
    """
    where = "pattern_weights"
    pattern = as_pattern(where, pattern)
    L = integer(where, "L", L, 1)
    if pattern is Pattern.BOTTLENECK:
        positions = [11 * layer / max(L - 1, 1) for layer in range(L)]  # 11 u, exact for L = 12
        return normalised(np.interp(positions, range(12), _BOTTLENECK).tolist())
    first, rise = _LINES[pattern]
    return normalised([first + rise * (layer / max(L - 1, 1)) for layer in range(L)])


def gd_layers(pattern: Pattern | str, L: int, c: int) -> tuple[int, ...]:
    """Return S, the layers that a pattern gives to a client that can train c of L layers.

    =================== ==================================================================
    uniform             ``floor(i L / c)``, i from 0 to c - 1
    triangle            ``0 .. c - 1``
    inverted_triangle   ``L - c .. L - 1``
    bottleneck          from both ends: 0, L - 1, 1, L - 2, ...
    =================== ==================================================================

    Except for "uniform", the sets are nested: a client with a larger c trains all layers of a
    client with a smaller c.

    Args:
        pattern: A :class:`Pattern` or its name.
        L: Number of layers.
        c: Number of layers to train, from 0 to L.

    Returns:
        Indices of the layers in ascending order.

    Raises:
        ValueError: If the pattern is unknown, L is below 1, or c is outside ``[0, L]``.
        TypeError: If L or c is not an integer.

    Source: arXiv 2506.12213; "uniform" equals the lists in the authors' configurations.
    """
    where = "gd_layers"
    pattern = as_pattern(where, pattern)
    L = integer(where, "L", L, 1)
    c = integer(where, "c", c, 0, L)
    if pattern is Pattern.UNIFORM:
        return tuple(i * L // c for i in range(c))
    if pattern is Pattern.TRIANGLE:
        return tuple(range(c))
    if pattern is Pattern.INVERTED_TRIANGLE:
        return tuple(range(L - c, L))
    lower = (c + 1) // 2
    return (*range(lower), *range(L - (c - lower), L))


def rgd_layers(
    weights: Weights, c: int, *, seed: int, round: int, client: int | str
) -> tuple[int, ...]:
    """Draw S, c distinct layers, one after another; each remaining layer has a probability
    proportional to its weight.

    S contains the c layers l with the largest ``log g_l - log(-log U_l)``, which is equivalent to
    this draw (Gumbel top-k). The numbers U_l in (0, 1) are hashes of seed, round, client and layer.
    The layers of a client therefore depend neither on the other clients of the round nor on the
    version of a library.

    Args:
        weights: g, ``(L,)``, with any sum above 0. A layer with weight 0 is never drawn.
        c: Number of layers to draw, at least 0.
        seed, round, client: Key of the draw: equal keys give equal layers.

    Returns:
        Indices of the layers in ascending order.

    Raises:
        ValueError: If weights are negative, not finite, or of the wrong shape; or if c is negative
            or larger than the number of positive weights.
        TypeError: If c is not an integer.

    Source: arXiv 2506.12213, RGD-HLA.
    """
    where = "rgd_layers"
    g = checked_weights(where, weights).tolist()
    c = integer(where, "c", c, 0, len(g))
    likely = [layer for layer, weight in enumerate(g) if weight > 0]
    require(len(likely) >= c, where, "weights", f"at least {c} weights above 0", len(likely))

    def key(layer: int) -> float:
        return math.log(g[layer]) - math.log(-math.log(_uniform(seed, round, client, layer)))

    return tuple(sorted(sorted(likely, key=key, reverse=True)[:c]))


def checked_weights(where: str, weights: Weights, L: int | None = None) -> Tensor:
    """Return weights as float64 ``(L,)``; raise ValueError unless all weights are finite and at
    least 0, with a sum above 0."""
    g = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
    fits = g.dim() == 1 and (g.numel() == L if L is not None else g.numel() > 0)
    require(fits, where, "weights", f"shape ({'L' if L is None else L},)", list(g.shape))
    fine = bool((g.isfinite() & (g >= 0)).all()) and float(g.sum()) > 0
    require(fine, where, "weights", "finite numbers >= 0, at least one > 0", g.tolist())
    return g


def normalised(weights: Weights) -> Tensor:
    """Return weights ``(L,)`` divided by their sum, in float64."""
    g = torch.as_tensor(weights, dtype=torch.float64)
    return g / g.sum()


def _uniform(seed: int, round: int, client: int | str, layer: int) -> float:
    """Return a number in (0, 1) that is a hash of the arguments."""
    named = repr(client) if isinstance(client, str) else operator.index(client)
    text = f"{operator.index(seed)}:{operator.index(round)}:{named}:{layer}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # 52 bits plus a half are exact in a float. The result U is never 0 or 1, for which
    # log(-log U) is not finite.
    return ((int.from_bytes(digest, "little") >> 12) + 0.5) * 2.0**-52


def cluster_weights(
    scores: Tensor | Sequence[float], k: int = 3, levels: Sequence[float] = (1, 2, 3)
) -> Tensor:
    """Compute g, the weight of each layer, from k groups of layers with similar scores.

    Dynamic programming cuts the sorted scores into k groups such that the sum of squared deviations
    from the group means is minimal. Equal scores are in the same group. Of two equally good cuts,
    the one at the lower score is used. With fewer than k distinct scores, each distinct score is a
    group, and the first levels are used. If all scores are equal, all weights are equal.

    Args:
        scores: Importance of each of L layers, ``(L,)``, finite.
        k: Number of groups.
        levels: Weight of each group before normalisation, in ascending order of the scores.

    Returns:
        ``(L,)`` float64 with sum 1.

    Raises:
        ValueError: If k is below 1, there are fewer than k levels, a level is not finite and above
            0, or the scores have the wrong shape or are not finite.
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
    """Return the group of each of the ascending, distinct ``points``; ``counts[i]`` scores are
    equal to ``points[i]``."""
    # Fractions are exact, so that rounding does not decide between equally good cuts.
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
        """Return the least cost of ``points[:end]`` in ``groups`` groups, and the group starts."""
        if groups == 1:
            return cost(0, end), (0,)
        starts = range(groups - 1, end)
        costs = ((best(start, groups - 1)[0] + cost(start, end), start) for start in starts)
        least, last = min(costs)
        return least, (*best(last, groups - 1)[1], last)

    starts = best(len(points), k)[1]
    return [bisect_right(starts, i) - 1 for i in range(len(points))]
