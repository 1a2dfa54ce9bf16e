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
    """LoRA. In PEFT the factors of an embedding are parameters, not modules with a weight."""

    name, title = "LORA", "LoRA"
    reads = frozenset({"r", "lora_alpha", "use_rslora", "lora_bias"})
    ignores = frozenset(
        "corda_config eva_config init_lora_weights loftq_config lora_dropout lora_ext_init "
        "lora_ga_config megatron_config megatron_core qalora_group_size velora_config".split()
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
        """Return the shapes of A, of B, and of the bias of B if there is one."""
        rank, ones = config.get("r") * spec.experts, (1,) * len(spec.kernel)
        stems = self.stems(spec.embedding)
        found = {
            stems["a"]: Part((rank, spec.in_features, *spec.kernel)),
            stems["b"]: Part((spec.out_features, rank // spec.groups, *ones)),
        }
        if config.get("lora_bias"):
            found[stems["bias"]] = Part((spec.out_features,))
        return found

    def stems(self, embedding: bool) -> dict[str, str]:
        """Return the stems of A, B and the bias."""
        names = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
        return {"a": f"lora_{names[0]}", "b": f"lora_{names[1]}", "bias": "lora_B.bias"}

    def factors(self, parts: Tensors, config: Config, spec: Any, weight: Any = None) -> Factors:
        """Return A, B and the bias as stored; the scaling is alpha / r, or alpha / sqrt(r)."""
        root = math.sqrt if config.get("use_rslora") else float
        scaling = config.get("lora_alpha") / root(config.get("r"))
        a, b, bias = Lora.stems(self, spec.embedding).values()
        embedding = spec.embedding
        return Factors(parts[a], parts[b], scaling, parts.get(bias), embedding=embedding)


register_kind(Lora())
