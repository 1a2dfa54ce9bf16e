"""Constraints on generation that always hold, and guides that look ahead for them."""

from lora_ext.control.distil import distil
from lora_ext.control.guide import Guide
from lora_ext.control.language import Constraint, ConstraintTooLarge, Limits, Matched, vocabulary_of
from lora_ext.control.law import Block, Row, advance, apply, draw, likeliest, log_ratios, moved
from lora_ext.control.law import decided as decided  # for the package's own rooms
from lora_ext.control.law import proposed as proposed
from lora_ext.control.messages import MatchedPlan, Plan
from lora_ext.control.prior import PriorHead
from lora_ext.control.processor import ConstraintProcessor, Constraints, plans_of

__all__ = [
    "Block",
    "Constraint",
    "ConstraintProcessor",
    "ConstraintTooLarge",
    "Constraints",
    "Guide",
    "Limits",
    "Matched",
    "MatchedPlan",
    "Plan",
    "PriorHead",
    "Row",
    "advance",
    "apply",
    "distil",
    "draw",
    "likeliest",
    "log_ratios",
    "moved",
    "plans_of",
    "vocabulary_of",
]
