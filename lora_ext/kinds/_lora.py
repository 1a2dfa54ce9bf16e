"""LoRA: ``scaling * B A``, on linear layers, embeddings, convolutions and experts.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; rsLoRA: Kalajdzievski
2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ._kind import Config, Factors, Kind, Part, Tensors, register_kind


class Lora(Kind):
    """LoRA. Factors of an embedding are bare parameters in PEFT."""

    name, title = "LORA", "LoRA"
    reads = frozenset({"r", "lora_alpha", "use_rslora", "lora_bias"})
    ignores = frozenset(
        "corda_config eva_config loftq_config lora_dropout lora_ga_config megatron_config "
        "megatron_core qalora_group_size velora_config".split()
    )
    refuses: Mapping[str, str] = {
        "ensure_weight_tying": "it adapts the output head that shares the embedding's weight as "
        "well",
        "layer_replication": "it changes the base model's layers",
        "use_qalora": "QALoRA pools the input before lora_A",
        "use_bdlora": "BD-LoRA stores block-diagonal factors",
        "arrow_config": "Arrow routes between adapters per token",
        "kasa_config": "KaSA truncates the base weight and adds a diagonal between the factors",
        "monteclora_config": "MonteCLoRA samples its factors",
    }
    patterns: Mapping[str, str] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}

    def parts(self, config: Config, spec: Any) -> Mapping[str, Part]:
        """Return A, B, and the bias of B if there is one."""
        rank, ones = config.get("r") * spec.experts, (1,) * len(spec.kernel)
        stems = lora_stems(spec.embedding)
        found = {
            stems["a"]: Part((rank, spec.in_features, *spec.kernel)),
            stems["b"]: Part((spec.out_features, rank // spec.groups, *ones)),
        }
        if config.get("lora_bias"):
            found[stems["bias"]] = Part((spec.out_features,))
        return found

    def factors(self, parts: Tensors, config: Config, spec: Any, weight: Any = None) -> Factors:
        """Return the tensors of the file, and alpha / r or alpha / sqrt(r)."""
        root = math.sqrt if config.get("use_rslora") else float
        scaling = config.get("lora_alpha") / root(config.get("r"))
        found: Any = {name: parts.get(stem) for name, stem in lora_stems(spec.embedding).items()}
        return Factors(**found, scaling=scaling, embedding=spec.embedding)


def lora_stems(embedding: bool) -> dict[str, str]:
    """Return the stem of each tensor of :class:`Factors`."""
    names = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
    return {"a": f"lora_{names[0]}", "b": f"lora_{names[1]}", "bias": "lora_B.bias"}


register_kind(Lora())
