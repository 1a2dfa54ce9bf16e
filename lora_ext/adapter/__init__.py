"""An adapter as a value, PEFT's files, and how many directions an adapter uses."""

from .comparing import ModuleDifference, compare_adapters
from .config import AdapterConfig as AdapterConfig
from .config import BaseModels as BaseModels
from .config import alpha_of as alpha_of
from .config import model_name as model_name
from .config import patterns as patterns
from .live import live_adapter as live_adapter
from .low_rank import able_to_learn as able_to_learn
from .low_rank import norm_of as norm_of
from .low_rank import padded as padded
from .low_rank import product_norm as product_norm
from .low_rank import resized as resized
from .low_rank import truncated as truncated
from .matrices import factor_keys as factor_keys
from .merging import MergeMode as MergeMode
from .merging import interpolate_adapters, merge_adapters
from .model_index import LinearSpec as LinearSpec
from .model_index import ModelIndex as ModelIndex
from .model_weights import ModelSource as ModelSource
from .model_weights import ModelWeights
from .peft_files import AdapterSource as AdapterSource
from .peft_files import Factors, save_adapter
from .peft_files import open_adapter as open_adapter
from .peft_files import read_adapter as read_adapter
from .peft_tensors import PREFIX as PREFIX
from .peft_tensors import Key as Key
from .peft_tensors import base_name as base_name
from .peft_tensors import natural_order as natural_order
from .peft_tensors import parse_key as parse_key
from .ranks import KINDS as KINDS
from .ranks import RankReport, effective_rank, lora_singular_values, rank_report
from .ranks import gram_figures as gram_figures
from .replaced import Replaced as Replaced
from .reshaping import PruneMode as PruneMode
from .reshaping import prune_adapter, resize_adapter
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
