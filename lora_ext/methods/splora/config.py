"""Settings of SPLoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_ext._checks import check_fields, require, within
from lora_ext.adapter import PruneMode

Direction = Literal["smallest", "largest"]
Granularity = Literal["module", "block"]
Projection = Literal["frobenius", "orthogonal"]
Score = Literal["distance", "angle", "alignment"]
Reference = Literal["population", "permutation", "pairs", "released"]
Stat = Literal["iqr", "std"]
Center = Literal["mean", "median"]
OnZeroAlignment = Literal["raise", "skip"]


@dataclass(frozen=True)
class SploraConfig:
    """Settings for scoring layers and for selecting the layers to prune.

    A layer has factors A and B, scaling s and the update ``D = s B A``. V is the change of its
    weight by the alignment, aligned minus base, and P maps onto the directions of V. Norms are
    Frobenius norms.

    Attributes:
        num: K, number of units (modules or blocks) to prune. To select layers, give exactly one of
            num and threshold.
        threshold: limit of the score; units with a score of at least (direction "largest") or at
            most (direction "smallest") this value are pruned.
        direction: whether the "smallest" or "largest" scores are pruned. No default, since the
            meaning of a small score depends on ``score``, see docs/splora.md.
        granularity: unit of pruning, a "module" or a "block" with the mean score of its modules.
        score: quantity that a layer is scored by. "distance", E-DIEM of ``|P D - D|``, ranks layers
            mainly by the size of their updates. "angle", E-DIEM of ``|c P D - D| / |D|`` with the c
            that minimizes this value, does not depend on the size. "alignment" is the cosine ``<D,
            V> / (|D| |V|)``, without a reference; below 0, the update undoes the alignment.
        projection: P, "frobenius" ``V V^T / |V|`` or "orthogonal" ``U_q U_q^T``, where ``U_q`` are
            the first q left singular vectors of V.
        rank: upper bound of q, for "orthogonal" only.
        energy: share of the squared singular values, for "orthogonal" only; q is at most the
            smallest number of directions that reach this share.
        reference: S, sample of distances that a layer's distance is compared with: "population",
            the distances of all scored layers; "permutation", the layer's distances with the rows
            of B in random order; "pairs", the distances of pairs of matrices from the caller;
            "released", copies of the layer's distance, as in the authors' script. With "released",
            the order of the scores depends only on the shift of the lower quartile, as for the
            script in exact arithmetic. Values other than "population" require ``score="distance"``.
        stat: t(S), the spread of the reference: "iqr", the interquartile range, or "std".
        n_samples: number of permutations per layer.
        seed: seed of the permutations.
        include_scaling: whether D includes the factor s. Both published implementations omit s
            (False).
        mode: what remains of a pruned module, see :func:`lora_ext.adapter.prune_adapter`.
        device: device of the comparison; default is that of the base model's weight.
        center: c(S), the centre of the reference: "mean" or "median".
        on_zero_alignment: treatment of a layer with equal weights in the base and the aligned
            model. "raise" raises an error; "skip" keeps the layer without a score.
        allow_degenerate: whether to set all scores to 0 if the reference has no spread; if False,
            an error is raised.

    Raises:
        ValueError: If a value is out of range, or no direction is given; the message names the
            field.

    Sources: arXiv 2506.18931 and its code; arXiv 2407.08623 for the metric; docs/splora.md.
    """

    num: int | None = None
    threshold: float | None = None
    direction: Direction = None  # pyright: ignore[reportAssignmentType]  # None raises ValueError
    granularity: Granularity = "module"
    score: Score = "distance"
    projection: Projection = "frobenius"
    rank: int | None = None
    energy: float | None = None
    reference: Reference = "population"
    stat: Stat = "iqr"
    n_samples: int = 50
    seed: int = 0
    include_scaling: bool = True
    mode: PruneMode = "remove"
    device: torch.device | str | None = None
    center: Center = "mean"
    on_zero_alignment: OnZeroAlignment = "raise"
    allow_degenerate: bool = False

    def __post_init__(self) -> None:
        holds = self.num is None or self.threshold is None
        found = f"both, {self.num!r} and {self.threshold!r}"
        require(holds, "SploraConfig", "num and threshold", "at most one", found)
        table = {
            "num": within(0),
            "threshold": {"maximum": math.inf, "expected": "a number"},
            "rank": within(1),
            "energy": within(above=0, maximum=1),
            "n_samples": within(2),
            "seed": within(0),
            "device": _device,
        }
        check_fields(self, table)
        alone = self.reference == "population" or self.score == "distance"
        expected = f"'population' with score={self.score!r}"
        require(alone, "SploraConfig", "reference", expected, repr(self.reference))


def _device(where: str, name: str, value: Any) -> Any:
    try:
        known = value is None or bool(torch.device(value))
    except (RuntimeError, TypeError):
        known = False
    require(known, where, name, "None, a torch.device or its name", repr(value))
    return value
