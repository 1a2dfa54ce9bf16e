"""DIEM and its empirical form E-DIEM: distances that are comparable between vectors of different
lengths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_ext._checks import require

from .config import SploraConfig

EPS = 1e-12
EPS_PAIRS = 1e-6  # as in the authors' code
_UNIFORM_VARIANCE = 7 / 120  # variance of the distance of uniform random vectors in [0, 1]^N


class DegenerateReferenceError(ValueError):
    """Raised if all distances of a reference sample are equal, so that their spread is 0."""


@torch.no_grad()
def diem(
    a: Tensor,
    b: Tensor,
    *,
    v_min: float,
    v_max: float,
    expected: float | None = None,
    var: float | None = None,
) -> float:
    """Return the Dimension Insensitive Euclidean Metric of two vectors.

    The metric is ``(v_max - v_min) / var * (|a - b| - expected)``, which is 0 on average for random
    pairs. With about 7 or more entries, its variance does not depend on the length.

    Args:
        a, b: vectors ``(N,)`` floating, or tensors of another shape with N entries.
        v_min, v_max: range of the entries.
        expected, var: mean and variance of the distance of two random vectors. The default is for
            entries that are uniform in the range of width ``w = v_max - v_min``:
            ``w sqrt(N / 6) (1 - 7 / (40 N))`` and ``7 / 120 w^2``. Our choice: the paper's mean
            ``w sqrt(N / 6)``, with the next term of its expansion.

    Raises:
        ValueError: If the shapes differ, there are no entries, a value is NaN or infinite, or the
            width or the variance is not above 0.

    Source: "Surpassing Cosine Similarity for Multidimensional Comparisons" (arXiv 2407.08623).
    """
    words = f"the shape of a, {tuple(a.shape)}, with at least 1 entry"
    require(a.shape == b.shape and a.numel() != 0, "diem", "b", words, tuple(b.shape))
    for name, t in (("a", a), ("b", b)):
        require(bool(torch.isfinite(t).all()), "diem", name, "finite values", "NaN or infinity")
    width, n = v_max - v_min, a.numel()
    require(0 < width < math.inf, "diem", "v_max", f"a number above v_min={v_min}", v_max)
    if expected is None:
        expected = width * math.sqrt(n / 6) * (1 - 7 / (40 * n))
    if var is None:
        var = width**2 * _UNIFORM_VARIANCE
    require(0 < var < math.inf, "diem", "var", "a number above 0", var)
    distance = torch.linalg.vector_norm(a.double() - b.double()).item()
    return width / var * (distance - expected)


def standardised(where: str, x: Tensor, sample: Tensor, config: SploraConfig) -> Tensor:
    """Return ``(x - c(S)) / (t(S) + eps)`` for distances ``x`` in float64 of any shape and a sample
    S ``(N,)``; c is ``config.center`` and t is ``config.stat``."""
    # `Tensor.median` would return the lower one of two middle values, not their mean.
    centre = sample.mean() if config.center == "mean" else torch.quantile(sample, 0.5)
    spread = _iqr(sample) if config.stat == "iqr" else sample.std(correction=1)
    if spread.item() < 1e-12 * max(1.0, abs(centre.item())):
        if config.allow_degenerate:
            return torch.zeros_like(x)
        raise DegenerateReferenceError(
            f"{where}: reference={config.reference!r}: expected distances that differ, found "
            f"{len(sample)} with a spread of {spread.item():.3g} around {centre.item():.3g}; "
            "SploraConfig(allow_degenerate=True) sets all scores to 0"
        )
    return (x - centre) / (spread + EPS)


def released_score(
    distance: Tensor, sample: Tensor | None, projected: Tensor, update: Tensor
) -> float:
    """Return the score of the authors' code, which also compares the lower quartiles of the entries
    of ``P D`` and D.

    Args:
        distance: distance of the layer, float64.
        sample: ``(N,)`` float64, distances of the caller's pairs. None stands for the sample of the
            authors' script, 50 copies of the layer's distance d. The first term is then
            ``(d + eps - d) / (0 + eps)``, which is exactly 1; the script's float32 result differs
            much from 1.
        projected: ``P D``, dense.
        update: D, dense.
    """
    score = 1.0
    if sample is not None:
        score = ((distance + EPS_PAIRS - sample.mean()) / (_iqr(sample) + EPS_PAIRS)).item()
    return score - (lower_quartile(projected) - lower_quartile(update)).item()


def lower_quartile(t: Tensor) -> Tensor:
    """Return the lower quartile of all entries, with linear interpolation.

    The entries are sorted, since ``torch.quantile`` accepts at most 2^24 entries, and ``kthvalue``
    takes minutes if they are in descending order.
    """
    values = t.flatten().sort().values
    place = (values.numel() - 1) / 4
    below = int(place)
    return values[below].lerp(values[min(below + 1, values.numel() - 1)], place - below)


def _iqr(sample: Tensor) -> Tensor:
    quartiles = torch.quantile(sample, torch.tensor([0.25, 0.75], dtype=sample.dtype))
    return quartiles[1] - quartiles[0]
