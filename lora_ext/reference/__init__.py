"""The formula of every op in plain torch: slow, readable, exact in float64; no kernel in sight."""

from lora_ext.reference.circuit import (
    CircuitSample,
    CircuitScan,
    circuit_argmax,
    circuit_conditional_dist,
    circuit_sample,
    circuit_scan,
    emission_gather,
    spec_verify,
)
from lora_ext.reference.circuit_layers import (
    circuit_layers,
    circuit_layers_walk,
    circuit_table,
)
from lora_ext.reference.circuit_sum import LogMax, log_bmm, log_einsum_exp
from lora_ext.reference.control import (
    control_filter,
    control_live,
    control_messages,
    control_ratio,
)
from lora_ext.reference.depth_mix import depth_mix, depth_mix_routed, depth_norm
from lora_ext.reference.lora import (
    lora_apply,
    lora_apply_,
    lora_apply_siblings_,
    lora_expand_,
    lora_plan,
    lora_segment_ids,
    lora_shrink,
    lora_update,
)
from lora_ext.reference.lora_gram import lora_gram, lora_pair_stats
from lora_ext.reference.lora_train import (
    dropout_keep,
    dropout_keep_of_adapters,
    lora_dropout,
    lora_linear,
    lora_linear_backward,
)
from lora_ext.reference.lora_weights import (
    lora_delta,
    lora_dora_norm,
    lora_merge_,
)
from lora_ext.reference.packed_linear import pack_weight, packed_linear
from lora_ext.reference.vocab import chunked_cross_entropy, chunked_kl, vocab_logits

from .circuit import KINDS as KINDS
from .circuit import left_size as left_size
from .circuit import log_softmax as log_softmax
from .circuit import num_transitions as num_transitions
from .circuit_sum import NORMS as NORMS
from .circuit_sum import log_weights as log_weights
from .lora import accumulator as accumulator

__all__ = [
    "CircuitSample",
    "CircuitScan",
    "LogMax",
    "chunked_cross_entropy",
    "chunked_kl",
    "circuit_argmax",
    "circuit_conditional_dist",
    "circuit_layers",
    "circuit_layers_walk",
    "circuit_sample",
    "circuit_scan",
    "circuit_table",
    "control_filter",
    "control_live",
    "control_messages",
    "control_ratio",
    "depth_mix",
    "depth_mix_routed",
    "depth_norm",
    "dropout_keep",
    "dropout_keep_of_adapters",
    "emission_gather",
    "log_bmm",
    "log_einsum_exp",
    "lora_apply",
    "lora_apply_",
    "lora_apply_siblings_",
    "lora_delta",
    "lora_dora_norm",
    "lora_dropout",
    "lora_expand_",
    "lora_gram",
    "lora_linear",
    "lora_linear_backward",
    "lora_merge_",
    "lora_pair_stats",
    "lora_plan",
    "lora_segment_ids",
    "lora_shrink",
    "lora_update",
    "pack_weight",
    "packed_linear",
    "spec_verify",
    "vocab_logits",
]
