"""Settings of SPLoRA, under the specification's symbols."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from lora_ext._checks import require
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
        for name, options in (
            ("direction", Direction),
            ("granularity", Granularity),
            ("score", Score),
            ("projection", Projection),
            ("reference", Reference),
            ("stat", Stat),
            ("mode", PruneMode),
            ("center", Center),
            ("on_zero_alignment", OnZeroAlignment),
        ):
            self._check(
                name, getattr(self, name) in get_args(options), f"one of {get_args(options)}"
            )
        for name, least in (("num", 0), ("rank", 1), ("n_samples", 2), ("seed", 0)):
            value = getattr(self, name)
            absent = value is None and name in ("num", "rank")
            fits = type(value) is int and value >= least
            self._check(name, absent or fits, f"an integer of at least {least}")
        alone = self.reference == "population" or self.score == "distance"
        self._check("reference", alone, f"'population' beside score={self.score!r}")
        threshold, energy = self.threshold, self.energy
        self._check("threshold", threshold is None or _is_number(threshold), "a number")
        in_range = energy is None or (_is_number(energy) and 0 < energy <= 1)
        self._check("energy", in_range, "a share in (0, 1]")
        self._check("device", _is_device(self.device), "None, a torch.device or its name")
        for name in ("include_scaling", "allow_degenerate"):
            self._check(name, isinstance(getattr(self, name), bool), "True or False")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        require(holds, "SploraConfig", name, expected, repr(getattr(self, name)))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


def _is_device(value: Any) -> bool:
    try:
        return value is None or bool(torch.device(value))
    except (RuntimeError, TypeError):
        return False
