"""Progressive random layer dropping for LoRA, and what follows from it: Shapley values of layers,
linear mode connectivity, merging, pruning.

Source: "CopRA: A Progressive LoRA Training Strategy" (arXiv 2410.22911).
"""

from lora_ext.adapter import interpolate_adapters, merge_adapters, prune_adapter

from .config import CopraConfig
from .connectivity import Barrier, lmc_barrier
from .controller import CopraController
from .keep import at_random, by_suffix, every_other, thirds, top_by_shapley
from .schedule import CopraSchedule
from .shapley import Shapley, layer_shapley, shapley_values

__all__ = [
    "Barrier",
    "CopraConfig",
    "CopraController",
    "CopraSchedule",
    "Shapley",
    "at_random",
    "by_suffix",
    "every_other",
    "interpolate_adapters",
    "layer_shapley",
    "lmc_barrier",
    "merge_adapters",
    "prune_adapter",
    "shapley_values",
    "thirds",
    "top_by_shapley",
]
