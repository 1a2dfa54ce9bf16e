"""Constraints as formal languages over tokens."""

from ._limits import DEFAULT, ConstraintTooLarge, Limits
from ._vocabulary import vocabulary_of
from .automaton import Constraint
from .matched import Matched

__all__ = ["DEFAULT", "Constraint", "ConstraintTooLarge", "Limits", "Matched", "vocabulary_of"]
