"""An adapter as a value, PEFT's files, and how many directions an adapter uses."""

from .comparing import ModuleDifference, compare_adapters
from .merging import interpolate_adapters, merge_adapters
from .model_weights import ModelWeights
from .peft_files import Factors, save_adapter
from .pruning import prune_adapter
from .ranks import RankReport, effective_rank, lora_singular_values, rank_report
from .resizing import resize_adapter
from .value import LoraAdapter

__all__ = [
    "Factors",
    "LoraAdapter",
    "ModelWeights",
    "ModuleDifference",
    "RankReport",
    "compare_adapters",
    "effective_rank",
    "interpolate_adapters",
    "lora_singular_values",
    "merge_adapters",
    "prune_adapter",
    "rank_report",
    "resize_adapter",
    "save_adapter",
]
