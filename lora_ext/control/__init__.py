"""Constraints on generation that always hold, and guides that look ahead for them."""

from .distil import distil
from .guide import Guide
from .language import Constraint, ConstraintTooLarge, Limits, Matched, vocabulary_of
from .law import Block, Row, advance, apply, draw, likeliest, log_ratios, moved
from .law import decided as decided  # for the package's own rooms
from .law import proposed as proposed
from .messages import MatchedPlan, Plan
from .prior import PriorHead
from .processor import ConstraintProcessor, Constraints, plans_of

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
