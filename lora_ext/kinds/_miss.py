"""MiSS (formerly Bone): inputs whose indices are equal modulo r share one column of B.

Source: Kang and Yin 2025, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing
Structure".
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch

from ._kind import Config, Factors, Kind, Part, Tensors, register_kind


class Miss(Kind):
    """MiSS. A sums the inputs with the same index modulo r."""

    name, title = "MISS", "MiSS"
    reads = frozenset({"init_weights", "mini_r"})
    ignores = frozenset({"miss_dropout"})
    refuses: Mapping[str, str] = {
        "init_weights=bat": "its update depends on the base weight; PEFT can merge it"
    }
    counts = ("r",)

    def parts(self, config: Config, spec: Any) -> Mapping[str, Part]:
        """Return the shape of the block: ``(r, O)``; "mini" has fewer columns, to be repeated."""
        mini = config.get("init_weights") == "mini"
        columns = config.get("mini_r") if mini else spec.out_features
        return {"miss_block": Part((config.get("r"), columns))}

    def factors(self, parts: Tensors, config: Config, spec: Any, weight: Any = None) -> Factors:
        """Return A, a matrix of zeros and ones, and B, the transposed block."""
        block, inputs = parts["miss_block"], operator.index(spec.in_features)
        if config.get("init_weights") == "mini":
            block = block.repeat(1, operator.index(spec.out_features) // block.shape[1])
        residues = torch.arange(inputs, device=block.device) % len(block)
        a = residues == torch.arange(len(block), device=block.device)[:, None]
        return Factors(a.to(block.dtype), block.T, 1.0)


register_kind(Miss())
