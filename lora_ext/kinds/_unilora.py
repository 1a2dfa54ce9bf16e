"""Uni-LoRA: the values of all factors are read from one vector, at fixed indices, and scaled.

Source: Li et al. 2025, "Uni-LoRA: One Vector is All You Need".
"""

from __future__ import annotations

from typing import Any

import torch

from ._kind import Config, Factors, Kind, Part, Tensors, register_kind


class Unilora(Kind):
    """Uni-LoRA, read from a file that contains the indices."""

    name, title = "UNILORA", "Uni-LoRA"
    shared = ("unilora_theta_d",)
    saves = ("save_indices",)
    ignores = Kind.ignores | {"proj_seed", "unilora_dropout", "init_theta_d_bound"}
    counts = ("r", "theta_d_length")

    def parts(self, config: Config, spec: Any) -> dict[str, Part]:
        """Return the shapes of the indices and scales for A and B, and of the shared vector."""
        r, found = config.get("r"), {"unilora_theta_d": Part((config.get("theta_d_length"),))}
        for side, shape in (("A", (r, spec.in_features)), ("B", (spec.out_features, r))):
            found[f"unilora_indices_{side}"] = Part(shape, torch.int64)
            found[f"unilora_scales_{side}"] = Part(shape)
        return found

    def factors(self, parts: Tensors, config: Config, spec: Any, weight: Any = None) -> Factors:
        """Gather the values of A and B from the vector, and return the scaled factors."""
        vector = parts["unilora_theta_d"]
        a, b = (
            vector[parts[f"unilora_indices_{side}"].long()] * parts[f"unilora_scales_{side}"]
            for side in "AB"
        )
        return Factors(a, b, 1.0)


register_kind(Unilora())
