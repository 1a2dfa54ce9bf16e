"""All ``nn.Module`` classes of the package, and the functions that use them, in one namespace.

The definitions are in ``lora_ext.layers``, ``lora_ext.methods``, ``lora_ext.rows`` and
``lora_ext.serving``.
"""

from lora_ext.layers import (
    IGNORE,
    LayerGroups,
    LoraConfig,
    LoraConv,
    LoraEmbedding,
    LoraFactors,
    LoraLinear,
    LoraProbe,
    Swap,
    adapted_layers,
    adapter_factors,
    adapter_parameters,
    adapters_of,
    block_index,
    block_name,
    decoder_layers,
    init_lora_,
    is_active,
    lora_forward,
    lora_update,
    pack_linears,
    packed_bytes,
    packing,
    set_active,
    shift_labels,
    unpack_linears,
    unwrap,
    wrap,
)
from lora_ext.methods.copra import RowwiseError, coalitions
from lora_ext.methods.mod import DepthMixer
from lora_ext.methods.mtpc import CircuitHead, TokenBridge
from lora_ext.methods.vora import UnmergeableRouteError, VoraLinear, modality
from lora_ext.rows import UnknownAdapterError, adapters, layer_names
from lora_ext.serving import MultiLoraEmbedding, MultiLoraExperts, MultiLoraLinear

__all__ = [
    "IGNORE", "CircuitHead", "DepthMixer", "LayerGroups", "LoraConfig", "LoraConv", "LoraEmbedding",
    "LoraFactors", "LoraLinear", "LoraProbe", "MultiLoraEmbedding", "MultiLoraExperts",
    "MultiLoraLinear", "RowwiseError", "Swap", "TokenBridge", "UnknownAdapterError",
    "UnmergeableRouteError", "VoraLinear", "adapted_layers", "adapter_factors",
    "adapter_parameters", "adapters", "adapters_of", "block_index", "block_name", "coalitions",
    "decoder_layers", "init_lora_", "is_active", "layer_names", "lora_forward", "lora_update",
    "modality", "pack_linears", "packed_bytes", "packing", "set_active", "shift_labels",
    "unpack_linears", "unwrap", "wrap",
]  # fmt: skip
