"""Reference implementations of all ops in plain torch: slow but readable, and without kernels.

A function has the name of its op. If its docstring contains only the formula, :mod:`lora_ext.ops`
documents the arguments, shapes, results and sources. Wrong arguments raise errors of torch. Tests
treat the float64 results of these functions as exact.
"""

# pyright: reportUnusedImport=false

from ._circuit import (
    KINDS,
    CircuitSample,
    CircuitScan,
    circuit_argmax,
    circuit_conditional_dist,
    circuit_sample,
    circuit_scan,
    emission_gather,
    left_size,
    log_softmax,
    num_transitions,
    spec_verify,
)
from ._circuit_sum import NORMS, LogMax, log_bmm, log_einsum_exp, log_weights
from ._lora import (
    accumulator,
    lora_apply,
    lora_apply_,
    lora_apply_siblings_,
    lora_expand_,
    lora_mixture,
    lora_plan,
    lora_segment_ids,
    lora_shrink,
    lora_update,
)
from .circuit_layers import circuit_layers, circuit_layers_walk, circuit_table
from .control import control_filter, control_live, control_messages, control_ratio
from .depth_mix import depth_mix, depth_mix_routed, depth_norm
from .lora_gram import lora_delta, lora_dora_norm, lora_gram, lora_merge_, lora_pair_stats
from .lora_train import (
    dropout_keep,
    dropout_keep_of_adapters,
    lora_dropout,
    lora_linear,
    lora_linear_backward,
)
from .packed_linear import pack_codes, pack_weight, packed_linear, quantise, unpack_weight
from .pointwise import pointwise
from .row_attention import row_attention, seen_keys
from .vocab import chunked_cross_entropy, chunked_kl, vocab_logits

__all__ = [
    "CircuitSample", "CircuitScan", "LogMax", "chunked_cross_entropy", "chunked_kl",
    "circuit_argmax", "circuit_conditional_dist", "circuit_layers", "circuit_layers_walk",
    "circuit_sample", "circuit_scan", "circuit_table", "control_filter", "control_live",
    "control_messages", "control_ratio", "depth_mix", "depth_mix_routed", "depth_norm",
    "dropout_keep", "dropout_keep_of_adapters", "emission_gather", "log_bmm",
    "log_einsum_exp", "lora_apply", "lora_apply_", "lora_apply_siblings_", "lora_delta",
    "lora_dora_norm", "lora_dropout", "lora_expand_", "lora_gram", "lora_linear",
    "lora_linear_backward", "lora_merge_", "lora_mixture", "lora_pair_stats", "lora_plan",
    "lora_segment_ids", "lora_shrink", "lora_update", "pack_codes", "pack_weight", "packed_linear",
    "pointwise", "quantise", "row_attention", "seen_keys", "spec_verify", "unpack_weight",
    "vocab_logits",
]  # fmt: skip
