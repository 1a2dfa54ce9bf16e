"""VeRA and PVeRA: random projections that all modules share, with trained scales per module.

Source: Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation"; PVeRA: PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from ._kind import Config, Factors, Kind, Part, Tensors, register_kind


class Vera(Kind):
    """VeRA, read from a file that contains the projections."""

    name, title = "VERA", "VeRA"
    shared = ("vera_A", "vera_B")
    saves = ("save_projection",)
    ignores = Kind.ignores | {"projection_prng_key", "vera_dropout", "d_initial"}
    counts = ("r",)
    draws = 1  # number of values of lambda_d, and of rows of A, for each rank

    def parts(self, config: Config, spec: Any) -> Mapping[str, Part]:
        """Return the shapes of the module's scales, and of the two shared projections."""
        r, stem = config.get("r"), self.name.lower()
        return {
            f"{stem}_lambda_d": Part((self.draws * r,)),
            f"{stem}_lambda_b": Part((spec.out_features,)),
            f"{stem}_A": Part((self.draws * r, None)),
            f"{stem}_B": Part((None, r)),
        }

    def factors(self, parts: Tensors, config: Config, spec: Any, weight: Any = None) -> Factors:
        """Return the projections, cut to the module's size, with scaled rows."""
        r, stem = config.get("r"), self.name.lower()
        d, b, first, last = (parts[f"{stem}_{each}"] for each in ("lambda_d", "lambda_b", "A", "B"))
        a = d[:r, None] * first[:r, : spec.in_features]
        return Factors(a, b[:, None] * last[: spec.out_features], 1.0)

    def update(self, x: Tensor, parts: Tensors, config: Config) -> Tensor:
        """Return the update for ``x``; activations are scaled instead of the projections.

        The backward pass then computes no gradients of the projections.
        """
        r, stem = config.get("r"), self.name.lower()
        d, b, first, last = (parts[f"{stem}_{each}"] for each in ("lambda_d", "lambda_b", "A", "B"))
        inner = d[:r] * linear(x, first[:r, : x.shape[-1]])  # (..., r)
        return b * linear(inner, last[: len(b)])


class Pvera(Vera):
    """VeRA with activations that are sampled in training. Only their mean is computed here."""

    name, title = "PVERA", "PVeRA"
    shared = ("pvera_A", "pvera_B")
    ignores = Vera.ignores | {"pvera_dropout", "generator_seed"}
    refuses: Mapping[str, str] = {"sample_at_inference": "it samples in every forward"}
    draws = 2


register_kind(Vera())
register_kind(Pvera())
