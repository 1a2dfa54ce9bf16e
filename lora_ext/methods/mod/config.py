"""Settings of mixture-of-depths ensembles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lora_ext._checks import check_fields, require, within

Router = Literal["token", "static", "fixed"]
Mix = Literal["logit", "prob"]
Positions = Literal["labels", "all"]
Backend = Literal["auto", "hidden", "chunked"]

_SUM_TOLERANCE = 1e-6


class InexactMixError(ValueError):
    """Raised if mixing hidden states would not equal mixing logits or probabilities."""


@dataclass(frozen=True)
class ModConfig:
    """Settings of the ensemble of the last layers.

    Layers of the ensemble other than the last are called late layers.

    Attributes:
        k: number of layers in the ensemble, including the last.
        router: source of the layers' weights. "token": computed at each position from the last
            layer's normed hidden state; "static": k parameters; "fixed": ``fixed_weights``.
        final_mass: initial weight of the last layer, in (0, 1). Our choice.
        fixed_weights: w, k numbers of at least 0 that sum to 1, required by the router "fixed";
            None for the other routers.
        mix: mixed quantity: "logit" or "prob" (probability).
        distill_weight: lambda, weight of the distillation term of the loss, which is the divergence
            of the late layers from the last layer. Our choice.
        tau: temperature of the distillation.
        distill_on: positions that the distillation includes. "labels": positions with a label that
            is not ignored; "all": positions that the attention mask keeps.
        layer_ce: weight of the mean cross entropy of the late layers.
        share_final_norm: whether the mixture uses the model's own final norm for the last layer; if
            False, the mixture uses a copy of the norm.
        train_final_norm: whether the last layer's norm in the mixture is trained.
        vocab_chunk: number of columns of one layer's logits that are in memory at the same time.
        backend: "hidden" mixes hidden states before the head; "chunked" mixes the logits or
            probabilities themselves, one part of the vocabulary at a time; "auto" uses "hidden" if
            the two compute the same mixture.

    Raises:
        ValueError: If a value is out of range; the message names the field.
        InexactMixError: If "prob" is combined with "hidden".

    Source: arXiv 2410.13077.
    """

    k: int = 3
    router: Router = "token"
    final_mass: float = 0.9
    fixed_weights: tuple[float, ...] | None = None
    mix: Mix = "logit"
    distill_weight: float = 0.1
    tau: float = 1.0
    distill_on: Positions = "labels"
    layer_ce: float = 0.0
    share_final_norm: bool = True
    train_final_norm: bool = False
    vocab_chunk: int = 8192
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        table = {
            "k": within(1),
            "fixed_weights": self._weights,
            "distill_weight": within(0),
            "tau": within(above=0),
            "layer_ce": within(0),
            "vocab_chunk": within(1, (1 << 63) - 1, expected="an int in [1, 2^63)"),
        }
        check_fields(self, table)
        fits = self.k == 1 or 0 < self.final_mass < 1
        require(fits, "ModConfig", "final_mass", "a number in (0, 1)", self.final_mass)
        exact = self.mix != "prob" or self.backend != "hidden" or self.k <= 1
        expected = "'auto' or 'chunked' with mix='prob'"
        found = "'hidden': mixing hidden states does not equal mixing probabilities"
        require(exact, "ModConfig", "backend", expected, found, InexactMixError)

    def _weights(self, where: str, name: str, given: Any) -> tuple[float, ...] | None:
        if self.router != "fixed":
            require(given is None, where, name, "None unless the router is 'fixed'", repr(given))
            return None
        try:
            # Strings and mappings are rejected, even if their elements convert to numbers.
            weights = () if isinstance(given, str | Mapping) else tuple(map(float, given or ()))
        except (TypeError, ValueError, OverflowError):
            weights = ()
        ok = len(weights) == self.k and all(0 <= w < math.inf for w in weights)
        expected = f"k = {self.k} numbers of at least 0 that sum to 1"
        require(ok and abs(sum(weights) - 1) <= _SUM_TOLERANCE, where, name, expected, repr(given))
        return weights  # a copy, since the argument may be a list
