"""The formula of every op in plain torch: slow, readable, exact in float64; no kernel in sight."""

from lora_ext.reference.lora import (
    lora_apply,
    lora_apply_,
    lora_delta,
    lora_expand_,
    lora_plan,
    lora_segment_ids,
    lora_shrink,
)

__all__ = [
    "lora_apply",
    "lora_apply_",
    "lora_delta",
    "lora_expand_",
    "lora_plan",
    "lora_segment_ids",
    "lora_shrink",
]
