"""Trainable LoRA adapters for linear layers, convolutions, embeddings and experts.

:mod:`.base` contains the code for base layers, and :mod:`.model` the operations on a whole model.
Names that are not in ``__all__`` are for other subpackages of ``lora_ext``.
"""

from typing import TYPE_CHECKING

from lora_ext._on_demand import on_demand

from ._chunks import recomputed, rows_per_chunk
from ._experts import (
    Routing,
    Slots,
    experts_forward,
    experts_update,
    obstacle_of,
    projections,
    slots_of,
)
from ._init import FREE, init_lora_, known_scheme
from ._lora_forward import LoraFactors, dropout_now, lora_forward, lora_update
from ._lora_layer import LoraLayer, refuse_float8
from ._magnitude import scaled_forward
from .base._dense import DenseParameters, dense_parameters, is_plain, is_quantised, readable_weight
from .base._modules import READS_WEIGHTS, bypassed, head_names, linear_size, linear_sizes
from .base._packed_linear import (
    CHOICE,
    PackedLinear,
    pack_linears,
    packed_bytes,
    packed_layers,
    packing,
    unpack,
    unpack_linears,
)
from .base._packed_only import MAX_CUDA_ROWS, limits_rows
from .base._packing_choice import pack_if_faster
from .base._spacing import base_product, has_other_hooks, space_products, unspace_products
from .labels import IGNORE, shift_labels
from .lora_conv import LoraConv
from .lora_embedding import LoraEmbedding
from .lora_linear import LoraLinear
from .model._adapted import (
    adapted_layers,
    adapter_factors,
    adapter_parameters,
    adapters_of,
    is_adapted,
    kind_of_layer,
)
from .model._attention import requests_apart
from .model._lora_config import LoraConfig, checked_names, matches_suffix
from .model._probe import LoraProbe, recomputing
from .model._swap import Swap, find_module
from .model._switches import (
    LayerGroups,
    Mask,
    forward_of_the_rest,
    is_active,
    set_active,
    switched_off,
)
from .model.blocks import block_index, block_name, decoder_layers
from .model.wrapping import unwrap, wrap

if TYPE_CHECKING:
    from .model._forwards import Forward
    from .model._head import Head, causal_lm, head_width, measured_head, softcap_of
    from .model.chunked_loss import chunked_loss
    from .model.exact import exact

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
        "model._forwards": "Forward",
        "model._head": "Head causal_lm head_width measured_head softcap_of",
    },
)
