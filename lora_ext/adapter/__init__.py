"""An adapter as a value, and PEFT's files."""

from .merging import interpolate_adapters, merge_adapters
from .peft_files import Factors, save_adapter
from .pruning import prune_adapter
from .resizing import resize_adapter
from .value import LoraAdapter

__all__ = [
    "Factors",
    "LoraAdapter",
    "interpolate_adapters",
    "merge_adapters",
    "prune_adapter",
    "resize_adapter",
    "save_adapter",
]
