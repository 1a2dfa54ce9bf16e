"""Progressive random layer dropping for LoRA, and what follows from it: Shapley values of layers,
linear mode connectivity, merging, pruning.

Source: "CopRA: A Progressive LoRA Training Strategy" (arXiv 2410.22911).
"""

from .config import CopraConfig
from .controller import CopraController
from .keep import at_random, by_suffix, every_other, thirds, top_by_shapley
from .schedule import CopraSchedule
from .shapley import Shapley, layer_shapley, shapley_values

__all__ = [
    "CopraConfig",
    "CopraController",
    "CopraSchedule",
    "Shapley",
    "at_random",
    "by_suffix",
    "every_other",
    "layer_shapley",
    "shapley_values",
    "thirds",
    "top_by_shapley",
]
