"""Published methods, each a small policy built on the layers and the ops."""

from . import copra, fed_hello, legend, lora_init, mod, mtpc, reasoning, splora, vora

__all__ = [
    "copra", "fed_hello", "legend", "lora_init", "mod", "mtpc", "reasoning", "splora", "vora",
]  # fmt: skip
