"""Settings of a mixture of depths, under the paper's symbols."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Router = Literal["token", "static", "fixed"]
Mix = Literal["logit", "prob"]
Positions = Literal["labels", "all"]
Backend = Literal["auto", "hidden", "chunked"]

ROUTERS: tuple[Router, ...] = ("token", "static", "fixed")
MIXES: tuple[Mix, ...] = ("logit", "prob")
POSITIONS: tuple[Positions, ...] = ("labels", "all")
BACKENDS: tuple[Backend, ...] = ("auto", "hidden", "chunked")

_SUM_TOLERANCE = 1e-6


class InexactMixError(ValueError):
    """A mix of hidden states was asked for where it is not the mix of logits or probabilities."""


@dataclass(frozen=True)
class ModConfig:
    """How the last layers' predictions become one.

    Attributes:
        k: layers in the ensemble, the last one among them.
        router: what their weights follow from. "token": the last layer's normed hidden state, at
            each position; "static": k parameters; "fixed": given numbers.
        final_mass: weight of the last layer at the start, in (0, 1). Our choice.
        fixed_weights: w, k numbers that sum to 1, of the router "fixed".
        mix: what is mixed, "logit" or "prob".
        distill_weight: lambda, of the divergence of the late layers from the last. Our choice.
        tau: temperature of that divergence.
        distill_on: positions that it is taken at: "labels", those whose next token counts; "all",
            those of the attention mask.
        layer_ce: weight of the late layers' own cross entropy, their mean.
        share_final_norm: the last layer's norm in the mixture is the model's own; otherwise a copy.
        train_final_norm: whether the last layer's norm in the mixture is trained.
        vocab_chunk: columns of logits of one layer that are in memory at a time.
        backend: "hidden" mixes before the head, "chunked" the logits themselves, a part of the
            vocabulary at a time; "auto" is "hidden" where the two are the same.

    Raises:
        ValueError: a value out of range, naming the field. InexactMixError: "prob" with "hidden".

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
        for ok, name, expected in (
            (_is_int(self.k) and self.k >= 1, "k", "an int, at least 1"),
            (self.router in ROUTERS, "router", f"one of {ROUTERS}"),
            (self.mix in MIXES, "mix", f"one of {MIXES}"),
            (self.distill_on in POSITIONS, "distill_on", f"one of {POSITIONS}"),
            (self.backend in BACKENDS, "backend", f"one of {BACKENDS}"),
            (_is_number(self.final_mass), "final_mass", "a number"),
            (_is_number(self.distill_weight), "distill_weight", "a number"),
            (_is_number(self.tau), "tau", "a number"),
            (_is_number(self.layer_ce), "layer_ce", "a number"),
        ):
            self._check(ok, name, expected)
        chunk = self.vocab_chunk
        for ok, name, expected in (
            (self.k == 1 or 0 < self.final_mass < 1, "final_mass", "a number in (0, 1)"),
            (self.distill_weight >= 0, "distill_weight", "at least 0"),
            (self.tau > 0, "tau", "a number above 0"),
            (self.layer_ce >= 0, "layer_ce", "at least 0"),
            (_is_int(chunk) and 1 <= chunk < 1 << 63, "vocab_chunk", "an int in [1, 2^63)"),
            (isinstance(self.share_final_norm, bool), "share_final_norm", "a bool"),
            (isinstance(self.train_final_norm, bool), "train_final_norm", "a bool"),
        ):
            self._check(ok, name, expected)
        self._check_weights()
        if self.mix == "prob" and self.backend == "hidden" and self.k > 1:
            raise InexactMixError(
                "ModConfig: backend: expected 'auto' or 'chunked' with mix='prob', found 'hidden': "
                "a mix of hidden states is no mix of probabilities"
            )

    def _check_weights(self) -> None:
        given = self.fixed_weights
        if self.router != "fixed":
            expected = "None unless the router is 'fixed'"
            self._check(given is None, "fixed_weights", expected)
            return
        expected = f"k = {self.k} numbers of at least 0 that sum to 1"
        try:
            # Neither of the two below is a row of numbers, though their elements may pass for it.
            if given is None or isinstance(given, str | Mapping):
                given = ()
            weights = tuple(float(w) for w in given)
        except (TypeError, ValueError, OverflowError):
            weights = ()
        ok = len(weights) == self.k and all(0 <= w < math.inf for w in weights)
        self._check(ok and abs(sum(weights) - 1) <= _SUM_TOLERANCE, "fixed_weights", expected)
        object.__setattr__(self, "fixed_weights", weights)  # a list may be given, and is kept apart

    def _check(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            found = getattr(self, name)
            raise ValueError(f"ModConfig: {name}: expected {expected}, found {found!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that is no float
        return False
