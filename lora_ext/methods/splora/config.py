"""Settings of SPLoRA, named after the specification's symbols."""

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
    """Settings for scoring layers and for selecting those to prune.

    Attributes:
        num: K, number of units to prune. To select layers, give exactly one of num and threshold.
        threshold: units with a score of at least (direction "largest") or at most ("smallest") this
            are pruned.
        direction: end of the scores that is pruned, "smallest" or "largest". There is no default:
            the meaning of an end depends on ``score``, see docs/splora.md.
        granularity: a unit is a "module", or a "block" with the mean score of its modules.
        score: quantity that a layer is scored by. "distance", E-DIEM of ``|P D - D|``, ranks layers
            much like the size of their update. "angle", E-DIEM of ``|c P D - D| / |D|`` with the c
            that makes it smallest, does not depend on sizes. "alignment", ``<D, V> / (|D| |V|)``
            itself: below 0 the update undoes the alignment.
        projection: P, "frobenius" ``V V^T / |V|`` or "orthogonal" ``U_q U_q^T``.
        rank: q, maximum number of directions.
        energy: only as many directions as have this share of the squared singular values. Both cut
            only the orthogonal projection.
        reference: S, sample that a distance is compared with: "population", all scored layers;
            "permutation", rows of B in random order; "pairs", matrices from the caller; "released",
            the layer itself, as in the authors' script; scores are ordered by the shift of the
            lower quartile alone, as the script's in exact arithmetic. All but "population" need
            ``score="distance"``; "alignment" uses no reference.
        stat: t(S), the spread: "iqr", the interquartile range, or "std".
        n_samples: number of permutations per layer.
        seed: of the permutations.
        include_scaling: s, distances are those of ``s B A``; False leaves s out, as both published
            codes do.
        mode: what is left of a pruned module, :func:`lora_ext.adapter.prune_adapter`.
        device: device of the comparison; default is that of the base model's weight.
        center: c(S), "mean" or "median".
        on_zero_alignment: a layer with equal weights in both models raises an error, or with "skip"
            is kept without a score.
        allow_degenerate: all scores are 0 if the reference has no spread, instead of an error.

    Raises:
        ValueError: If a value is out of range, or there is no direction; the message names the
            field.

    Sources: arXiv 2506.18931 and its code; arXiv 2407.08623 for the metric; docs/splora.md.
    """

    num: int | None = None
    threshold: float | None = None
    direction: Direction = None  # pyright: ignore[reportAssignmentType]  # None raises
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
        require(holds, "SploraConfig", "num and threshold", "one of them", found)
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
        expected = f"'population' beside score={self.score!r}"
        require(alone, "SploraConfig", "reference", expected, repr(self.reference))


def _device(where: str, name: str, value: Any) -> Any:
    try:
        known = value is None or bool(torch.device(value))
    except (RuntimeError, TypeError):
        known = False
    require(known, where, name, "None, a torch.device or its name", repr(value))
    return value
