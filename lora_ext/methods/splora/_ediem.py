"""DIEM and its empirical form E-DIEM: distances that are comparable between sizes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_ext._checks import require

from .config import SploraConfig

EPS = 1e-12
EPS_PAIRS = 1e-6  # as in the authors' code
_UNIFORM_VARIANCE = 7 / 120  # of the distance of two uniform random vectors in [0, 1]^N


class DegenerateReferenceError(ValueError):
    """Raised if a reference sample has no spread to compare distances with."""


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

    ``(v_max - v_min) / var * (|a - b| - expected)``: 0 on average for random pairs. Its variance
    does not depend on the length from about 7 entries on.

    Args:
        a, b: ``(N,)`` floating, or other shapes of N entries.
        v_min, v_max: range of the entries.
        expected, var: mean and variance of the distance of two random vectors. Default is those of
            entries uniform in the range: ``sqrt(N / 6) (1 - 7 / (40 N))`` times its width, and
            7/120 times its square. Our choice: the paper's ``sqrt(N / 6)`` with its next term.

    Raises:
        ValueError: If shapes differ, there are no entries, a value is NaN or infinite, or a range
            or variance is not above 0.

    Source: "Surpassing Cosine Similarity for Multidimensional Comparisons" (arXiv 2407.08623).
    """
    words = f"as many entries as in a {tuple(a.shape)}, at least 1"
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
    """Return ``(x - c(S)) / (t(S) + eps)`` for ``x`` in float64 of any shape and a sample
    ``S (N,)``."""
    # The median of an even number of values is the mean of the middle two.
    centre = sample.mean() if config.center == "mean" else torch.quantile(sample, 0.5)
    spread = _iqr(sample) if config.stat == "iqr" else sample.std(correction=1)
    if spread.item() < 1e-12 * max(1.0, abs(centre.item())):
        if config.allow_degenerate:
            return torch.zeros_like(x)
        raise DegenerateReferenceError(
            f"{where}: reference={config.reference!r}: expected distances that differ, found "
            f"{len(sample)} with a spread of {spread.item():.3g} about {centre.item():.3g} "
            "(SploraConfig(allow_degenerate=True) makes all scores 0)"
        )
    return (x - centre) / (spread + EPS)


def released_score(
    distance: Tensor, sample: Tensor | None, projected: Tensor, update: Tensor
) -> float:
    """Return the score of the authors' code, which also compares the lower quartiles of the
    entries.

    Args:
        distance: of the layer, float64.
        sample: ``(N,)`` float64, the distances of the caller's pairs. None uses what the authors'
            script passes, 50 copies of the layer itself. ``(d + eps - d) / (0 + eps)`` is then 1;
            the script's float32 result is far from it.
        projected, update: ``P D`` and D, dense.
    """
    score = 1.0
    if sample is not None:
        score = ((distance + EPS_PAIRS - sample.mean()) / (_iqr(sample) + EPS_PAIRS)).item()
    return score - (lower_quartile(projected) - lower_quartile(update)).item()


def lower_quartile(t: Tensor) -> Tensor:
    """Return the lower quartile of all entries, with linear interpolation. ``torch.quantile`` is
    limited to 2^24 entries, and ``kthvalue`` takes minutes if they are in descending order."""
    values = t.flatten().sort().values
    place = (values.numel() - 1) / 4
    below = int(place)
    return values[below].lerp(values[min(below + 1, values.numel() - 1)], place - below)


def _iqr(sample: Tensor) -> Tensor:
    quartiles = torch.quantile(sample, torch.tensor([0.25, 0.75], dtype=sample.dtype))
    return quartiles[1] - quartiles[0]
