"""An adapter as a value, and PEFT's files."""

from .peft_files import Factors, save_adapter
from .value import LoraAdapter

__all__ = ["Factors", "LoraAdapter", "save_adapter"]
