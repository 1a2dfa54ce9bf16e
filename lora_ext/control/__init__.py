"""Constraints on generation that always hold, and guides that look ahead for them."""

from lora_ext.control.automaton import Constraint
from lora_ext.control.distil import distil
from lora_ext.control.guide import Guide
from lora_ext.control.limits import ConstraintTooLarge, Limits
from lora_ext.control.processor import ConstraintProcessor

__all__ = [
    "Constraint",
    "ConstraintProcessor",
    "ConstraintTooLarge",
    "Guide",
    "Limits",
    "distil",
]
