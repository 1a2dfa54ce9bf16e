"""Constraints as languages: what a text may be, before anything is generated."""

from ._limits import DEFAULT, ConstraintTooLarge, Limits
from ._vocabulary import vocabulary_of
from .automaton import Constraint
from .matched import Matched

__all__ = ["DEFAULT", "Constraint", "ConstraintTooLarge", "Limits", "Matched", "vocabulary_of"]
