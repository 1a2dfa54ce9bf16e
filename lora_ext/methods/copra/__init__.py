"""CopRA: progressive random layer dropping for LoRA, with Shapley values of layers, linear mode
connectivity, merging and pruning.

Source: "CopRA: A Progressive LoRA Training Strategy" (arXiv 2410.22911).
"""

from typing import TYPE_CHECKING

from lora_ext._on_demand import on_demand
from lora_ext.adapter import interpolate_adapters, merge_adapters, prune_adapter

from .coalitions import RowwiseError, coalitions
from .config import CopraConfig
from .connectivity import Barrier, lmc_barrier
from .controller import CopraController
from .keep import at_random, by_suffix, every_other, thirds, top_by_shapley
from .schedule import CopraSchedule
from .shapley import Shapley, layer_shapley, shapley_values

if TYPE_CHECKING:
    from .callback import CopraCallback

__all__ = [
    "Barrier", "CopraCallback", "CopraConfig", "CopraController", "CopraSchedule", "RowwiseError",
    "Shapley", "at_random", "by_suffix", "coalitions", "every_other", "interpolate_adapters",
    "layer_shapley", "lmc_barrier", "merge_adapters", "prune_adapter", "shapley_values", "thirds",
    "top_by_shapley",
]  # fmt: skip

__getattr__ = on_demand(__name__, callback="CopraCallback")  # requires transformers
