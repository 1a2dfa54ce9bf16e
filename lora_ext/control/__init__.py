"""Constraints that every generated text satisfies, and guides that look ahead to the text's end.

A guide is a small hidden Markov model of a language model's texts. The guide estimates the
probability that a text can still satisfy its constraint, so that constrained texts stay likely.
"""

from ._guide import Guide
from ._law import Block, Row, advance, apply, log_ratios, moved
from ._messages import MatchedPlan, Plan
from ._rejection import draw, likeliest
from ._rejection import draw_from as draw_from  # for other subpackages
from ._rejection import proposal_scores as proposal_scores
from .distil import distil
from .language import Constraint, ConstraintTooLarge, Limits, Matched, vocabulary_of
from .prior import PriorHead
from .processor import ConstraintProcessor, Constraints, plans_of

__all__ = [
    "Block", "Constraint", "ConstraintProcessor", "ConstraintTooLarge", "Constraints", "Guide",
    "Limits", "Matched", "MatchedPlan", "Plan", "PriorHead", "Row", "advance", "apply",
    "distil", "draw", "likeliest", "log_ratios", "moved", "plans_of", "vocabulary_of",
]  # fmt: skip
