"""GraLoRA: the weight is split into k x k blocks with one pair of factors of rank r / k each.

Source: Jung et al. 2025, "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient
Fine-Tuning".
"""

from __future__ import annotations

from typing import Any

import torch

from ._kind import Config, Factors, Kind, Part, Tensors, register_kind


class Gralora(Kind):
    """GraLoRA with k x k blocks, and optionally LoRA of rank hybrid_r in addition."""

    name, title = "GRALORA", "GraLoRA"
    ignores = Kind.ignores | {"gralora_dropout"}
    counts, numbers = ("r", "gralora_k"), ("alpha", "hybrid_r")

    def parts(self, config: Config, spec: Any) -> dict[str, Part]:
        """Return the shapes of the blocks' factors, and of the additional LoRA's factors if any."""
        r, k, more = config.get("r"), config.get("gralora_k"), config.get("hybrid_r")
        found = {
            "gralora_A": Part((k, spec.in_features // k, r)),
            "gralora_B": Part((k, r, spec.out_features // k)),
        }
        if more:
            found["gralora_A_general.weight"] = Part((more, spec.in_features))
            found["gralora_B_general.weight"] = Part((spec.out_features, more))
        return found

    def factors(self, parts: Tensors, config: Config, spec: Any, weight: Any = None) -> Factors:
        """Return the factors, whose ranks are ordered by (i, j, s).

        ``s < r / k`` is the rank inside the block in row j and column i.
        """
        a, b = parts["gralora_A"], parts["gralora_B"]  # (k, I / k, r), (k, r, O / k)
        k, _, r = a.shape
        one = torch.eye(k, dtype=a.dtype, device=a.device)
        of_a = torch.einsum("cir,cd->crdi", a, one).reshape(k * r, -1)
        blocks = b.view(k, k, r // k, -1)  # (row, column, s, O / k)
        of_b = torch.einsum("jiso,jd->joids", blocks, one).reshape(-1, k * r)
        if config.get("hybrid_r"):
            of_a = torch.cat([of_a, parts["gralora_A_general.weight"]])
            of_b = torch.cat([of_b, parts["gralora_B_general.weight"]], 1)
        return Factors(of_a, of_b, config.get("alpha") / (config.get("r") + config.get("hybrid_r")))


register_kind(Gralora())
