"""Published methods, each a small policy over the layers and the ops."""

from lora_ext.methods import copra, mtpc

__all__ = ["copra", "mtpc"]
