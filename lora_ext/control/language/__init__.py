"""Constraints as languages: what a text may be, before anything is generated."""

from .automaton import Constraint
from .limits import DEFAULT, ConstraintTooLarge, Limits

__all__ = ["DEFAULT", "Constraint", "ConstraintTooLarge", "Limits"]
