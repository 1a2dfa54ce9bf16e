"""Fused versions of PEFT's layer classes for quantised base layers.

A module that defines such a class of PEFT can be imported only if the quantiser is installed, so a
fused class is created when a model first needs it. The quantised base layer computes its output and
the gradient of its input. lora_ext adds the update in one op.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

from ._layers import Fused

_MODULES = "peft.tuners.lora."
_CLASSES = {  # class of PEFT by the name of the fused class
    "FusedLinear8bitLt": "bnb.Linear8bitLt",
    "FusedLinear4bit": "bnb.Linear4bit",
    "FusedTorchaoLinear": "torchao.TorchaoLoraLinear",
    "FusedGPTQLinear": "gptq.GPTQLoraLinear",
    "FusedAwqLinear": "awq.AwqLoraLinear",
    "FusedHqqLinear": "hqq.HqqLoraLinear",
    "FusedEetqLinear": "eetq.EetqLoraLinear",
    "FusedAqlmLinear": "aqlm.AqlmLoraLinear",
}
COVERED = f"{_MODULES}layer.Linear, layer.ParamWrapper and {', '.join(_CLASSES.values())}"


def full_name(kind: type) -> str:
    """Return the name of a class with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def fused_class(kind: type) -> type:
    """Return the fused version of a class of PEFT, or ``kind`` if it has no fused version."""
    for name, of_peft in _CLASSES.items():
        if full_name(kind) == _MODULES + of_peft:
            return _made(name)
    return kind


@functools.cache
def _made(name: str) -> type:
    module, _, of_peft = _CLASSES[name].rpartition(".")
    peft_class = getattr(importlib.import_module(_MODULES + module), of_peft)
    doc = f"PEFT's ``{of_peft}`` with the updates and their gradients fused."
    names = "kwargs" in inspect.signature(peft_class.forward).parameters
    body = {"of_peft": peft_class, "__module__": __name__, "__qualname__": name, "__doc__": doc}
    body["peft_takes_names"] = names
    # The name is PEFT's, because ``repr`` and model cards print it.
    return type(of_peft, (Fused, peft_class), body)


def __getattr__(name: str) -> Any:
    """Return a fused class by its name. Pickle finds the classes with this function."""
    if name in _CLASSES:
        return _made(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
