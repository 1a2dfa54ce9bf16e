"""Settings of SPLoRA, under the specification's symbols."""

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
    """How layers are scored, and which are pruned.

    Attributes:
        num: K, so many units are pruned. Where layers are selected, exactly one of num and
            threshold is given.
        threshold: all units with a score of at least (direction "largest") or at most ("smallest")
            this are pruned.
        direction: which end of the scores is pruned, "smallest" or "largest". There is no default:
            what an end means depends on ``score``, and docs/splora.md says it.
        granularity: a unit is a "module", or a "block" with the mean score of its modules.
        score: what a layer is judged by. "distance", E-DIEM of ``|P D - D|``, which ranks layers
            much like the size of their update. "angle", E-DIEM of the same with the map normalised,
            which no size moves: ``|c P D - D| / |D|``, c the scale at which the image is nearest.
            "alignment", ``<D, V> / (|D| |V|)`` itself: below 0 the update undoes the alignment.
        projection: P, "frobenius" ``V V^T / |V|`` or "orthogonal" ``U_q U_q^T``.
        rank: q, at most so many directions. energy: only as many as have this share of the squared
            singular values. Both cut the orthogonal projection alone.
        reference: S, what a distance is compared with: "population", the other layers;
            "permutation", rows of B in random order; "pairs", matrices that the caller gives;
            "released", the layer itself, as in the authors' script: the order that its scores have
            in exact arithmetic, by the shift of the lower quartile alone. All but "population" are
            for ``score="distance"``, and "alignment" is compared with nothing.
        stat: t(S), the spread: "iqr", between the quartiles, or "std".
        n_samples: permutations of a layer. seed: of them.
        include_scaling: s, distances are those of ``s B A``; False leaves s out, as both published
            codes do.
        mode: what is left of a pruned module, :func:`lora_ext.adapter.prune_adapter`.
        device: where layers are compared; default is where the base model's weight lies.
        center: c(S), "mean" or "median".
        on_zero_alignment: a layer in which base and aligned model are equal is an error, or
            ("skip") is left unscored and kept.
        allow_degenerate: all scores are 0 where the reference has no spread, instead of an error.

    Raises:
        ValueError: a value out of range, naming the field; no direction.

    Sources: arXiv 2506.18931 and its code; arXiv 2407.08623 for the metric; docs/splora.md.
    """

    num: int | None = None
    threshold: float | None = None
    direction: Direction = None  # pyright: ignore[reportAssignmentType]  # is refused
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
