"""Adapter types of PEFT (kinds), one file each.

A kind converts the tensors of an adapter's file to factors A ``(r, I)`` and B ``(O, r)`` of each
module, and to scales of the module's outputs or inputs. It accesses neither modules nor files.
"""

import importlib
import pkgutil

from ._kind import After, Factors, Kind, Part, kind_of, refusal, register_kind, variants
from ._magnitude import normed

# Importing any other file of this folder registers the kinds that the file defines.
for _each in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_each.name}")

__all__ = ["After", "Factors", "Kind", "Part", "kind_of", "register_kind"]
