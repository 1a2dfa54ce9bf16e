"""Modules over the ops."""

from .context import adapters
from .multi_lora import MultiLoraLinear

__all__ = ["MultiLoraLinear", "adapters"]
