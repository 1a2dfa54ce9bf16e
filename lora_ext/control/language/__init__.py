"""Constraints as languages: what a text may be, before anything is generated."""

from .automaton import Constraint
from .limits import DEFAULT, ConstraintTooLarge, Limits
from .matched import Matched
from .vocabulary import vocabulary_of

__all__ = ["DEFAULT", "Constraint", "ConstraintTooLarge", "Limits", "Matched", "vocabulary_of"]
