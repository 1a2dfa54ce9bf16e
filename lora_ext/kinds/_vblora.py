"""VB-LoRA: factors composed of vectors from one bank that all modules share.

Source: Li et al. 2024, "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._kind import Config, Factors, Kind, Part, Tensors, register_kind


class Vblora(Kind):
    """VB-LoRA. A file has the logits of all vectors, or the top-k weights and their indices."""

    name, title = "VBLORA", "VB-LoRA"
    shared = ("vblora_vector_bank",)
    reads = frozenset({"save_only_topk_weights"})
    ignores = Kind.ignores | {"vblora_dropout", "init_logits_std", "init_vector_bank_bound"}
    counts = ("r", "topk", "num_vectors", "vector_length")

    def parts(self, config: Config, spec: Any) -> dict[str, Part]:
        """Return the shapes of the logits, or weights and indices, for A and B, and of the bank."""
        r, k, n, length = (config.get(name) for name in self.counts)
        found = {"vblora_vector_bank": Part((n, length))}
        for side, shape in (
            ("A", (r, spec.in_features // length)),
            ("B", (spec.out_features // length, r)),
        ):
            stem = f"vblora_logits_{side}"
            if config.get("save_only_topk_weights"):
                found[f"{stem}_topk_indices"] = Part((*shape, k), torch.int64)
                found[f"{stem}_topk_weights"] = Part((*shape, k - 1))
            else:
                found[stem] = Part((*shape, n))
        return found

    def factors(self, parts: Tensors, config: Config, spec: Any, weight: Any = None) -> Factors:
        """Return A and B, each concatenated from weighted sums of ``topk`` vectors."""
        a, b = (_mixed(parts, f"vblora_logits_{side}", config.get("topk")) for side in "AB")
        return Factors(a.flatten(1), b.transpose(1, 2).flatten(0, 1), 1.0)


def _mixed(parts: Tensors, stem: str, k: int) -> Tensor:
    if stem in parts:
        logits, index = parts[stem].topk(k, -1)
        weights = logits.softmax(-1)
    else:
        index, first = parts[f"{stem}_topk_indices"].long(), parts[f"{stem}_topk_weights"]
        weights = torch.cat([first, 1 - first.sum(-1, keepdim=True)], -1)
    return (weights[..., None] * parts["vblora_vector_bank"][index]).sum(-2)


register_kind(Vblora())
