"""Layers that train: LoRA over linear layers, convolutions, embeddings and experts, and how they
come into a model. Their base layers lie in :mod:`.base`, what is done to a whole model in
:mod:`.model`. What is not in ``__all__`` is for other rooms."""

from typing import TYPE_CHECKING

from lora_ext._on_demand import on_demand

from .base.dense import DenseParameters, dense_parameters, is_plain, readable_weight
from .base.modules import READS_WEIGHTS, bypassed, head_names, linear_size
from .base.packed_linear import (
    PackedLinear,
    pack_linears,
    packed_bytes,
    packed_layers,
    packing,
    unpack,
    unpack_linears,
)
from .base.spacing import has_other_hooks, space_products, unspace_products
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
from .lora_forward import (
    LoraFactors,
    dropout_now,
    lora_forward,
    lora_update,
)
from .lora_layer import LoraLayer
from .lora_linear import LoraLinear
from .model.adapted import (
    adapted_layers,
    adapter_factors,
    adapter_parameters,
    adapters_of,
    is_adapted,
)
from .model.attention import requests_apart
from .model.blocks import block_index, block_name, decoder_layers
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

if TYPE_CHECKING:
    from .model.chunked_loss import chunked_loss
    from .model.exact import exact
    from .model.forwards import Forward
    from .model.head import Head, causal_lm, head_width, measured_head, softcap_of

__all__ = [
    "IGNORE", "LayerGroups", "LoraConfig", "LoraConv", "LoraEmbedding", "LoraFactors", "LoraLayer",
    "LoraLinear", "LoraProbe", "Mask", "PackedLinear", "Swap", "adapted_layers", "adapter_factors",
    "adapter_parameters", "adapters_of", "block_index", "block_name", "chunked_loss",
    "decoder_layers", "exact", "init_lora_", "is_active", "lora_forward", "lora_update",
    "pack_linears", "packed_bytes", "packing", "set_active", "shift_labels", "unpack_linears",
    "unwrap", "wrap",
]  # fmt: skip

__getattr__ = on_demand(
    __name__,
    **{
        "model.chunked_loss": "chunked_loss",
        "model.exact": "exact",
        "model.forwards": "Forward",
        "model.head": "Head causal_lm head_width measured_head softcap_of",
    },
)
