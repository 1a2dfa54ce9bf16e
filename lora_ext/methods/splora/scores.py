"""Distance of each layer's update from the directions of the alignment, and scores that make such
distances comparable between layers of different sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext import ops
from lora_ext._checks import require
from lora_ext.adapter import ModelSource

from ._projection import check_finite, check_floating, check_shapes
from ._weights import Progress, Source, project_layers, read_adapter
from .config import SploraConfig

_EPS = 1e-12
_EPS_PAIRS = 1e-6  # as in the authors' code
_UNIFORM_VARIANCE = 7 / 120  # variance of the distance of two uniform random vectors in [0, 1]^N

#: Pairs of dense matrices X and Y of equal shape, whose distances ``|X - Y|`` form a reference.
Pairs = Sequence[tuple[Tensor, Tensor]]


class DegenerateReferenceError(ValueError):
    """Raised if all distances of a reference sample are equal, so that their spread is 0."""


class LayerStats(NamedTuple):
    """Measurements of one layer with the update ``D = scaling * B A (m, n)``, and its score.

    P is the projection (:attr:`SploraConfig.projection`) of ``V = aligned - base``, the difference
    of the layer's weights; norms are Frobenius norms.
    """

    name: str
    n_entries: int  # m n
    dist: float  # |P D - D|
    norm: float  # |D|
    norm_proj: float  # |P D|
    cos: float  # cosine of P D and D; 0 if one of them is 0
    score: float  # used for selection, see SploraConfig.score
    alignment: float = math.nan  # <D, V> / (|D| |V|); if below 0, D undoes the alignment


def pair_stats(a: Tensor, b: Tensor, projected_b: Tensor, scaling: float = 1.0) -> Tensor:
    """Return ``(|D|^2, |PD|^2, <PD, D>, |PD - D|^2)`` of one layer, ``D = scaling * b @ a``.

    P is the projection of the layer. This function checks the values and calls
    :func:`lora_ext.ops.lora_pair_stats`, which accepts many layers.

    Args:
        a: factor A, ``(r, n)`` floating.
        b: factor B, ``(m, r)``.
        projected_b: ``P b``, ``(m, r)``.
        scaling: s, scale of the adapter.

    Returns:
        ``(4,)`` float64.

    Raises:
        ValueError: If the shapes do not match, r is 0, or a value is NaN or infinite.
        TypeError: If a tensor is not floating.
    """
    where = "pair_stats"
    named = {"a": a, "b": b, "projected_b": projected_b}
    check_floating(where, **named)
    sizes = (b.shape[0], a.shape[1]) if a.dim() == b.dim() == 2 else ()
    check_shapes(where, b.shape, sizes, sizes, a.shape)
    expected = f"the shape of b {tuple(b.shape)}"
    require(projected_b.shape == b.shape, where, "projected_b", expected, tuple(projected_b.shape))
    check_finite(where, **named)
    return ops.lora_pair_stats(a, b, projected_b, scaling)


@torch.no_grad()
def ediem_scores(
    adapter: Source,
    base: ModelSource,
    aligned: ModelSource,
    config: SploraConfig | None = None,
    *,
    pairs: Pairs | None = None,
    progress: Progress = iter,
) -> list[LayerStats]:
    """Return measurements of each adapted layer: its score, and the distance of its update from the
    projection of this update.

    Only the two weights of one layer are in memory at a time. Layers of the adapter and of the two
    models are matched by name, and returned in the natural order of the names.

    Args:
        adapter: a :class:`lora_ext.adapter.LoraAdapter`, an adapter folder of PEFT, a pair
            ``(config, state dict)``, or only a state dict, for which the scaling is 1.
        base: W0, the model before alignment: a folder of safetensors, a mapping from names to
            tensors, or a model; see :class:`lora_ext.adapter.model_weights.ModelWeights`.
        aligned: Wa, the model on which the adapter was trained, in one of the forms of ``base``.
        config: settings of the score; default is ``SploraConfig(direction="smallest")``. The
            direction is not used.
        pairs: matrices of the reference, for ``reference="pairs"`` only.
        progress: function that wraps the iterable of layers, for example ``tqdm.tqdm``.

    Returns:
        Measurements of each scored layer, with its score.

    Raises:
        ValueError: If shapes do not match (the message names the layer and both shapes); if a
            tensor contains NaN or infinity (the message names the tensor); or if there are fewer
            than 4 layers for ``reference="population"``.
        ZeroAlignmentError: If a layer has equal weights in ``base`` and ``aligned``, unless such
            layers are skipped.
        DegenerateReferenceError: If the reference has no spread, unless this is allowed.
        KeyError: If a model lacks a layer, or the adapter has only one factor of a module.
        TypeError: If weights are quantised.
        NotImplementedError: If the adapter scales outputs, or adapts embeddings or convolutions.

    Sources: arXiv 2506.18931, arXiv 2407.08623; docs/splora.md has the formulas.
    """
    config = SploraConfig(direction="smallest") if config is None else config
    where = "ediem_scores"
    samples = _pair_distances(where, pairs, config)
    value = read_adapter(f"{where}: adapter", adapter)
    layers, projected = project_layers(where, value, base, aligned, config, progress)
    scalings = [f.factors.scaling if config.include_scaling else 1.0 for f in layers]
    device = projected[0].columns.device if projected else torch.device("cpu")
    a, b = ([getattr(layer.factors, k).to(device) for layer in layers] for k in "ab")
    columns = [one.columns.to(device) for one in projected]
    # Values below 0 are rounding errors, even in <P D, D>, since P is positive semi-definite.
    stats = ops.lora_pair_stats(a, b, columns, scalings).cpu().clamp(min=0)  # (L, 4)
    distances = stats[:, 3].sqrt()
    sizes = torch.tensor([b_l.shape[0] * a_l.shape[1] for a_l, b_l in zip(a, b, strict=True)])
    norms, images = stats[:, 0].sqrt(), stats[:, 1].sqrt()
    parts = zip(a, projected, scalings, strict=True)
    inner = [s * (one.along.to(device) * a_l.double().T).sum().item() for a_l, one, s in parts]
    along = (torch.tensor(inner, dtype=torch.float64) / norms).clamp(-1, 1)  # <D, V> / (|D| |V|)
    alignments = torch.where(norms > 0, along, 0).tolist()
    if config.score == "alignment":
        scores = alignments
    elif config.reference == "population":
        expected = "at least 4 layers to compare with one another"
        found = f"{len(layers)}; 'permutation' scores a layer by itself"
        require(len(layers) >= 4, where, "reference='population'", expected, found)
        x = distances / sizes.double().sqrt()
        if config.score == "angle":
            x = _angles(a, b, columns, scalings, stats)
        scores = _standardised(where, x, x, config).tolist()
    else:
        scores = []
        for layer, d, a_l, b_l, p_l, s_l in zip(
            layers, distances, a, b, columns, scalings, strict=True
        ):
            a_l, b_l = a_l.double(), b_l.double()
            if config.reference == "permutation":
                sample = _permuted(a_l, b_l, p_l, s_l, config)
                one = _standardised(f"{where}: {layer.name}", d, sample, config).item()
            else:
                one = _released_score(d, samples, s_l * p_l @ a_l, s_l * b_l @ a_l)
            scores.append(one)
    cosines = torch.where(norms * images > 0, stats[:, 2] / (norms * images), 0)
    figures = (sizes, distances, norms, images, cosines)
    names, columns = (layer.name for layer in layers), (t.tolist() for t in figures)
    return [LayerStats(*row) for row in zip(names, *columns, scores, alignments, strict=True)]


def size_correlation(stats: Sequence[LayerStats]) -> float:
    """Return Spearman's rank correlation between the scores and the sizes ``|D| / sqrt(m n)``.

    If the correlation is near 1 or -1, the scores rank layers mainly by the size of their updates,
    and depend little on the alignment.

    Args:
        stats: measurements of the layers, from :func:`ediem_scores`.

    Returns:
        number from -1 to 1, or NaN if all scores or all sizes are equal.
    """
    scores = [layer.score for layer in stats]
    sizes = [layer.norm / math.sqrt(layer.n_entries) for layer in stats]
    score, size = (ranks - ranks.mean() for ranks in (_ranks(scores), _ranks(sizes)))
    product = (score.norm() * size.norm()).item()
    return (score @ size).item() / product if product > 0 else math.nan


def _ranks(values: Sequence[float]) -> Tensor:
    """Return the rank of each value in ascending order; equal values get their mean rank."""
    _, inverse, counts = torch.tensor(values, dtype=torch.float64).unique(
        return_inverse=True, return_counts=True
    )
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def _angles(
    a: list[Tensor], b: list[Tensor], columns: list[Tensor], scalings: list[float], stats: Tensor
) -> Tensor:
    """Return the least ``|c P D - D| / |D|`` over all c, or 0 if D = 0.

    This number is the sine of the angle between ``P D`` and D.

    The difference is formed before its norm is taken, since the formula by the cosine would cancel
    for small angles.
    """
    norms, images, inner = stats[:, 0], stats[:, 1], stats[:, 2]
    c = torch.where(images > 0, inner / images, 0).to(columns[0].device)
    scaled = [c_l * p for c_l, p in zip(c, columns, strict=True)]
    rest = ops.lora_pair_stats(a, b, scaled, scalings).cpu()[:, 3].clamp(min=0)
    return torch.where(norms > 0, rest / norms, 0).sqrt()


def _permuted(
    a: Tensor, b: Tensor, projected: Tensor, scaling: float, config: SploraConfig
) -> Tensor:
    """Return ``|(P B - B[pi]) A| s`` for random permutations pi of the rows, ``(n_samples,)``.

    Every layer uses a new generator, so that its score does not depend on other layers.
    """
    generator = torch.Generator().manual_seed(config.seed)
    orders = (torch.randperm(len(b), generator=generator) for _ in range(config.n_samples))
    moved = (b[order.to(b.device)] for order in orders)
    found = [ops.lora_pair_stats(a, rows, projected, scaling)[3] for rows in moved]
    return torch.stack(found).cpu().clamp(min=0).sqrt()


def _pair_distances(where: str, pairs: Pairs | None, config: SploraConfig) -> Tensor | None:
    """Return ``|X - Y|`` of each pair, ``(N,)`` float64, or None unless ``config.reference`` is
    ``"pairs"``."""
    if config.reference != "pairs":
        if pairs is not None:
            expected = f"None with reference={config.reference!r}"
            raise ValueError(f"{where}: pairs: expected {expected}, found {len(pairs)} pairs")
        return None
    if not pairs:
        expected = "pairs of matrices with reference='pairs'"
        raise ValueError(f"{where}: pairs: expected {expected}, found {pairs!r}")
    distances = []
    for i, (x, y) in enumerate(pairs):
        name = f"pairs[{i}]"
        for t in (x, y):
            check_floating(where, **{name: t})
            check_finite(where, **{name: t})
        found = f"{tuple(x.shape)} and {tuple(y.shape)}"
        require(x.shape == y.shape, where, name, "matrices of equal shape", found)
        distances.append(torch.linalg.vector_norm(x.double() - y.double()).cpu())
    return torch.stack(distances)


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


def _standardised(where: str, x: Tensor, sample: Tensor, config: SploraConfig) -> Tensor:
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
            f"{len(sample)} distances of spread {spread.item():.3g} around {centre.item():.3g}; "
            "SploraConfig(allow_degenerate=True) sets all scores to 0"
        )
    return (x - centre) / (spread + _EPS)


def _released_score(
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
        score = ((distance + _EPS_PAIRS - sample.mean()) / (_iqr(sample) + _EPS_PAIRS)).item()
    return score - (_lower_quartile(projected) - _lower_quartile(update)).item()


def _lower_quartile(t: Tensor) -> Tensor:
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
