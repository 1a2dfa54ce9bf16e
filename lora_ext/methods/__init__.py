"""Published methods, each a small policy over the layers and the ops."""

from lora_ext.methods import copra, legend, lora_init, mod, mtpc, reasoning, splora, vora

__all__ = ["copra", "legend", "lora_init", "mod", "mtpc", "reasoning", "splora", "vora"]
