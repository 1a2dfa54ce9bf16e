"""Published methods, each a small policy over the layers and the ops."""

from lora_ext.methods import mtpc, reasoning

__all__ = ["mtpc", "reasoning"]
