"""Published methods, each a small policy over the layers and the ops."""

from lora_ext.methods import lora_init, mtpc, splora

__all__ = ["lora_init", "mtpc", "splora"]
