"""Adapter types of PEFT (kinds), one file each.

A kind reads the tensors of an adapter's file as factors A ``(r, I)`` and B ``(O, r)`` of each
module, and as scales of the outputs or inputs, if it has any. It uses neither modules nor files.
"""

import importlib
import pkgutil

from ._kind import After, Factors, Kind, Part, kind_of, refusal, register_kind, variants
from ._magnitude import normed

# Every other file of this folder registers its kinds when it is imported.
for _each in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_each.name}")

__all__ = ["After", "Factors", "Kind", "Part", "kind_of", "register_kind"]
