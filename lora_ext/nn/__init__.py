"""Modules over the ops."""

from .adapted import adapted_layers, adapter_factors, adapter_parameters, adapters_of
from .attachment import UnknownAdapterError
from .blocks import block_index, block_name, decoder_layers
from .circuit_head import CircuitHead
from .coalitions import RowwiseError, coalitions
from .context import adapters
from .depth_mixer import DepthMixer
from .init import init_lora_
from .labels import IGNORE, shift_labels
from .layer_names import layer_names
from .lora_config import LoraConfig
from .lora_conv import LoraConv
from .lora_embedding import LoraEmbedding
from .lora_forward import LoraFactors, lora_forward, lora_update
from .lora_linear import LoraLinear
from .modalities import modality
from .multi_lora import MultiLoraLinear
from .multi_lora_embedding import MultiLoraEmbedding
from .multi_lora_experts import MultiLoraExperts
from .packed_linear import pack_linears, packed_bytes, unpack_linears
from .probe import LoraProbe
from .swap import Swap
from .switches import LayerGroups, is_active, set_active
from .token_bridge import TokenBridge
from .vora_linear import UnmergeableRouteError, VoraLinear
from .wrapping import unwrap, wrap

__all__ = [
    "IGNORE",
    "CircuitHead",
    "DepthMixer",
    "LayerGroups",
    "LoraConfig",
    "LoraConv",
    "LoraEmbedding",
    "LoraFactors",
    "LoraLinear",
    "LoraProbe",
    "MultiLoraEmbedding",
    "MultiLoraExperts",
    "MultiLoraLinear",
    "RowwiseError",
    "Swap",
    "TokenBridge",
    "UnknownAdapterError",
    "UnmergeableRouteError",
    "VoraLinear",
    "adapted_layers",
    "adapter_factors",
    "adapter_parameters",
    "adapters",
    "adapters_of",
    "block_index",
    "block_name",
    "coalitions",
    "decoder_layers",
    "init_lora_",
    "is_active",
    "layer_names",
    "lora_forward",
    "lora_update",
    "modality",
    "pack_linears",
    "packed_bytes",
    "set_active",
    "shift_labels",
    "unpack_linears",
    "unwrap",
    "wrap",
]
