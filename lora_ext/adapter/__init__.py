"""One adapter as a value, and PEFT's files."""

from .peft_files import save_adapter

__all__ = ["save_adapter"]
