"""Adapters as immutable values, functions on them, PEFT's files, and effective ranks.

A module has the factors A ``(r, I)`` and B ``(O, r)``: r rank, I inputs, O outputs. Its update, the
change of the base weight, is ``scaling * B A``.
"""

from typing import TYPE_CHECKING

from lora_ext._on_demand import on_demand
from lora_ext.kinds import Factors

from ._config import AdapterConfig, BaseModels, alpha_of, model_name, patterns
from ._live import live_adapter
from ._low_rank import (
    TooLarge,
    able_to_learn,
    norm_of,
    padded,
    product_norm,
    resized,
    rounded,
    truncated,
)
from ._model_index import LinearSpec, ModelIndex, check_base
from ._peft_files import AdapterSource, open_adapter, read_adapter, save_adapter
from ._peft_tensors import PREFIX, Key, base_name, factor_keys, natural_order, parse_key
from ._replaced import Replaced
from ._value import LoraAdapter
from .model_weights import ModelSource, ModelWeights

if TYPE_CHECKING:
    from ._ranks import (
        KINDS,
        RankReport,
        aligned,
        effective_rank,
        gram_figures,
        lora_singular_values,
        rank_report,
    )
    from .comparing import ModuleDifference, compare_adapters
    from .merging import MergeMode, interpolate_adapters, merge_adapters
    from .reshaping import PruneMode, prune_adapter, resize_adapter

__all__ = [
    "Factors", "LoraAdapter", "ModelWeights", "ModuleDifference", "RankReport", "compare_adapters",
    "effective_rank", "interpolate_adapters", "lora_singular_values", "merge_adapters",
    "prune_adapter", "rank_report", "resize_adapter", "save_adapter",
]  # fmt: skip

__getattr__ = on_demand(
    __name__,
    comparing="ModuleDifference compare_adapters",
    merging="MergeMode interpolate_adapters merge_adapters",
    _ranks="KINDS RankReport aligned effective_rank gram_figures lora_singular_values rank_report",
    reshaping="PruneMode prune_adapter resize_adapter",
)
