"""Layers that train: LoRA over linear layers, convolutions, embeddings and experts, and how they
come into a model. Their base layers lie in :mod:`.base`, what is done to a whole model in
:mod:`.model`."""

from .base.dense import dense_parameters, is_plain, readable_weight
from .base.modules import READS_WEIGHTS, bypassed, head_names, linear_size
from .base.packed_linear import (
    PackedLinear,
    pack_linears,
    packed_bytes,
    packed_layers,
    unpack,
    unpack_linears,
)
from .chunks import recomputed, rows_per_chunk
from .dora import dora_forward
from .experts import (
    Routing,
    Slots,
    experts_forward,
    experts_update,
    obstacle_of,
    projections,
    slots_of,
)
from .init import FREE, init_lora_, known_scheme
from .labels import IGNORE, shift_labels
from .lora_conv import LoraConv
from .lora_embedding import LoraEmbedding
from .lora_forward import LoraFactors, autocast_dtype, lora_forward, lora_update
from .lora_layer import LoraLayer
from .lora_linear import LoraLinear
from .model.adapted import (
    adapted_layers,
    adapter_factors,
    adapter_parameters,
    adapters_of,
    is_adapted,
)
from .model.blocks import block_index, block_name, decoder_layers
from .model.exact import exact
from .model.lora_config import LoraConfig, checked_names, matches_suffix
from .model.probe import LoraProbe, recomputing
from .model.swap import Swap, find_module
from .model.switches import (
    LayerGroups,
    Mask,
    forward_of_the_rest,
    is_active,
    set_active,
    switched_off,
)
from .model.wrapping import unwrap, wrap

__all__ = [
    "FREE",
    "IGNORE",
    "READS_WEIGHTS",
    "LayerGroups",
    "LoraConfig",
    "LoraConv",
    "LoraEmbedding",
    "LoraFactors",
    "LoraLayer",
    "LoraLinear",
    "LoraProbe",
    "Mask",
    "PackedLinear",
    "Routing",
    "Slots",
    "Swap",
    "adapted_layers",
    "adapter_factors",
    "adapter_parameters",
    "adapters_of",
    "autocast_dtype",
    "block_index",
    "block_name",
    "bypassed",
    "checked_names",
    "decoder_layers",
    "dense_parameters",
    "dora_forward",
    "exact",
    "experts_forward",
    "experts_update",
    "find_module",
    "forward_of_the_rest",
    "head_names",
    "init_lora_",
    "is_active",
    "is_adapted",
    "is_plain",
    "known_scheme",
    "linear_size",
    "lora_forward",
    "lora_update",
    "matches_suffix",
    "obstacle_of",
    "pack_linears",
    "packed_bytes",
    "packed_layers",
    "projections",
    "readable_weight",
    "recomputed",
    "recomputing",
    "rows_per_chunk",
    "set_active",
    "shift_labels",
    "slots_of",
    "switched_off",
    "unpack",
    "unpack_linears",
    "unwrap",
    "wrap",
]
