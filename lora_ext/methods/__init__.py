"""Implementations of published methods, built on the layers and the ops of this package."""

from . import copra, fed_hello, legend, lora_init, mod, mtpc, reasoning, splora, vora

__all__ = [
    "copra", "fed_hello", "legend", "lora_init", "mod", "mtpc", "reasoning", "splora", "vora",
]  # fmt: skip
