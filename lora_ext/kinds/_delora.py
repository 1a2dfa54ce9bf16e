"""DeLoRA: rank-1 terms of equal norm, scaled by a trained strength and the weight's column norms.

Source: Bini et al. 2025, "Decoupling Angles and Strength in Low-rank Adaptation".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._kind import Config, Factors, Kind, Part, Tensors, register_kind


class Delora(Kind):
    """DeLoRA. The adapter's file contains the column norms of the base weight."""

    name, title = "DELORA", "DeLoRA"
    ignores = Kind.ignores | {"delora_lambda", "module_dropout", "lambda_pattern"}
    patterns: Mapping[str, str] = {"rank_pattern": "r"}
    counts = ("r",)

    def parts(self, config: Config, spec: Any) -> Mapping[str, Part]:
        """Return the shapes of A, B, the strength and the column norms of the base weight."""
        r, inputs = config.get("r"), spec.in_features
        a, b = Part((r, inputs)), Part((spec.out_features, r))
        found = {"delora_A": a, "delora_B": b, "delora_lambda": Part((1,))}
        return found | {"delora_w_norm": Part((inputs,))}

    def factors(self, parts: Tensors, config: Config, spec: Any, weight: Any = None) -> Factors:
        """Return B, and A with scaled rows and columns.

        Rows of A are scaled so that each rank of ``B A`` has the norm strength / r. Then columns
        are multiplied by the column norms of the base weight.
        """
        a, b, strength, norms = (parts[f"delora_{e}"] for e in ("A", "B", "lambda", "w_norm"))
        size = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
        return Factors((strength / len(a) / size)[:, None] * a * norms, b, 1.0)


register_kind(Delora())
