"""Typed Python functions for the compiled ops. Only they call ``torch.ops.lora_ext``.

The message of a ValueError contains the op, the argument, the expected and the found value.
"""

# pyright: reportUnusedImport=false

from lora_ext.reference import pack_codes

from . import _registration
from ._circuit import CircuitScan, circuit_scan, emission_gather
from ._grouped_mm import grouped_mm
from ._registration import routed as routed
from .circuit_decode import (
    CircuitSample,
    circuit_argmax,
    circuit_conditional_dist,
    circuit_sample,
    spec_verify,
)
from .circuit_layers import (
    Program,
    circuit_layers,
    circuit_layers_backward,
    circuit_layers_walk,
    circuit_table,
)
from .circuit_sum import (
    LogMax,
    ScaledWeights,
    log_bmm,
    log_einsum_exp,
    log_einsum_exp_backward,
    log_einsum_weights,
)
from .depth_mix import depth_mix, depth_mix_routed
from .lora import (
    bgmv_,
    lora_apply,
    lora_apply_,
    lora_expand_,
    lora_plan,
    lora_segment_ids,
    lora_shrink,
    sgmv_,
)
from .lora_gram import lora_delta, lora_dora_norm, lora_gram, lora_merge_, lora_pair_stats
from .lora_siblings import MOST_SIBLINGS, lora_apply_siblings_
from .lora_train import lora_dropout, lora_linear, lora_linear_apart
from .packed_linear import (
    is_plain_product,
    pack_weight,
    packed_linear,
    packed_lora_linear,
    same_bits,
    unpack_weight,
)
from .row_attention import pointwise, row_attention
from .vocab import chunked_cross_entropy, chunked_kl

__all__ = [
    "MOST_SIBLINGS", "CircuitSample", "CircuitScan", "LogMax", "Program", "ScaledWeights", "bgmv_",
    "chunked_cross_entropy", "chunked_kl", "circuit_argmax", "circuit_conditional_dist",
    "circuit_layers", "circuit_layers_backward", "circuit_layers_walk", "circuit_sample",
    "circuit_scan", "circuit_table", "depth_mix", "depth_mix_routed", "emission_gather", "log_bmm",
    "log_einsum_exp", "log_einsum_exp_backward", "log_einsum_weights", "lora_apply", "lora_apply_",
    "lora_apply_siblings_", "lora_delta", "lora_dora_norm", "lora_dropout", "lora_expand_",
    "lora_gram", "lora_linear", "lora_linear_apart", "lora_merge_", "lora_pair_stats", "lora_plan",
    "lora_segment_ids", "lora_shrink", "pack_codes", "pack_weight", "packed_linear",
    "packed_lora_linear", "pointwise", "row_attention", "sgmv_", "spec_verify", "unpack_weight",
]  # fmt: skip

_registration.register("lora_ext")
