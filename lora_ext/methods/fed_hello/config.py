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

    A client that can train c layers gets c of L layers. g is the weight of each layer: "rgd" and
    "fim" draw layers in proportion to g.

    Attributes:
        pattern: P, a :class:`Pattern` or its name; a pattern favours layers by their position.
        kind: Rule that chooses the layers. "gd": by the pattern, the same in every round; "rgd":
            drawn for each round and client with the pattern's weights; "fim": drawn with weights
            by importance as soon as importance is known, and like "rgd" before that.
        seed: Seed of all draws.
        weights: g of every layer, instead of the pattern's weights. With "gd", the c layers with
            the largest g are then chosen; of layers with equal g, the lower one (our choice).
        prior_rounds: T_prior, first round of "fim" that can use importance.
        every: Interval in rounds: from round ``prior_rounds``, importance is computed in every
            round whose number is a multiple of ``every``.
        hold: Whether the rounds between two computations use the last importance (our choice). If
            False, these rounds use the pattern, as in the authors' code.
        mix: Share of importance in ``g = mix g_FIM + (1 - mix) g_GD``. g_FIM are the weights from
            importance and g_GD those of the pattern, each with sum 1 (our choice).
        k: Number of groups of layers with similar importance, see :func:`cluster_weights`.
        levels: Weight of each group, in ascending order of the groups' importance.
        score, reduce, chunk: As in :func:`fim_scores`.

    Raises:
        ValueError: If a field is out of range.
        TypeError: If a number or bool has the wrong type.

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
        require(holds, where, "levels", f"at least k = {self.k} positive numbers", levels)
        object.__setattr__(self, "levels", tuple(map(float, levels)))
        if self.weights is not None:
            g = checked_weights(where, self.weights)
            object.__setattr__(self, "weights", tuple(g.tolist()))
