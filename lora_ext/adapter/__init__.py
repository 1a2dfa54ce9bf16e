"""An adapter as a value, PEFT's files, and how many directions an adapter uses."""

from .peft_files import Factors, save_adapter
from .ranks import RankReport, effective_rank, lora_singular_values, rank_report
from .value import LoraAdapter

__all__ = [
    "Factors",
    "LoraAdapter",
    "RankReport",
    "effective_rank",
    "lora_singular_values",
    "rank_report",
    "save_adapter",
]
