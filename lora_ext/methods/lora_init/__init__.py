"""LoRA initialisation: schemes, learning rates that depend on the width, and growth exponents.

Sources: "The Impact of Initialization on LoRA Finetuning Dynamics" (Hayou, Ghosh, Yu 2024, arXiv
2406.08447); "LoRA+: Efficient Low Rank Adaptation of Large Models" (the same authors, arXiv
2402.12354).
"""

from lora_ext.layers import LoraProbe, init_lora_

from .rates import gamma_exponents, loraplus_param_groups, suggest_lr

__all__ = ["LoraProbe", "gamma_exponents", "init_lora_", "loraplus_param_groups", "suggest_lr"]
