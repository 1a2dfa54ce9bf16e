"""Settings of Fed-HeLLo, with the paper's symbols."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lora_ext._checks import check_fields, require, within

from ._patterns import Pattern, as_pattern, checked_weights

Kind = Literal["gd", "rgd", "fim"]
Score = Literal["log_prob", "logit"]
Reduce = Literal["fro", "trace"]


@dataclass(frozen=True)
class FedHelloConfig:
    """Settings of Fed-HeLLo: the choice of each client's layers in each round.

    Attributes:
        pattern: P, a :class:`Pattern` or its name.
        kind: "gd", the same layers in every round; "rgd", drawn for each round and client; "fim",
            drawn by importance once it is known, and by the pattern before that.
        seed: Seed of all draws.
        weights: g of every layer, instead of the pattern's. With "gd" the c layers of largest
            weight are taken, the lower first among equals (our choice).
        prior_rounds: T_prior; with "fim" the rounds before it draw by the pattern.
        every: Importance is computed in the rounds from ``prior_rounds`` on that it divides.
        hold: Whether a round in between keeps the last importance (our choice) or returns to the
            pattern, as in the authors' code.
        mix: ``g = mix g_FIM + (1 - mix) g_GD``, each with sum 1 (our choice).
        k, levels: Number of groups of importance, and their weights from the lowest; see
            :func:`cluster_weights`.
        score, reduce, chunk: As in :func:`fim_scores`.

    Raises:
        ValueError, TypeError: If a field is out of range or of another type.

    Source: arXiv 2506.12213 and its repository, TNI-playground/Fed_HeLLo; docs/fed_hello.md.
    """

    pattern: Pattern | str = Pattern.BOTTLENECK
    kind: Kind = "rgd"
    seed: int = 0
    weights: tuple[float, ...] | None = None
    prior_rounds: int = 50
    every: int = 50
    hold: bool = True
    mix: float = 1.0
    k: int = 3
    levels: tuple[float, ...] = (1, 2, 3)
    score: Score = "log_prob"
    reduce: Reduce = "fro"
    chunk: int = 8

    def __post_init__(self) -> None:
        where = "FedHelloConfig"
        table = {
            **dict.fromkeys(("prior_rounds", "every", "k", "chunk"), within(1)),
            "pattern": lambda where, _, given: as_pattern(where, given),
            "seed": within(0),
            "mix": within(0, 1),
        }
        check_fields(self, table)
        levels = tuple(self.levels)
        positive = all(math.isfinite(level) and level > 0 for level in levels)
        holds = positive and len(levels) >= self.k
        require(holds, where, "levels", f"at least k = {self.k} numbers above 0", levels)
        object.__setattr__(self, "levels", tuple(map(float, levels)))
        if self.weights is not None:
            g = checked_weights(where, self.weights)
            object.__setattr__(self, "weights", tuple(g.tolist()))
