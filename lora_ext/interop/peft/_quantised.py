"""Fused versions of PEFT's layer classes for quantised base layers.

A module that defines such a class of PEFT can be imported only if the quantiser is installed, so a
fused class is created when a model first needs it. The quantised base layer computes its output and
the gradient of its input. lora_ext adds the update in one op.
"""

from __future__ import annotations

from ._kinds import fused_class
from ._layers import Fused

_MODULES = "peft.tuners.lora."
_CLASSES = (
    "bnb.Linear8bitLt", "bnb.Linear4bit", "torchao.TorchaoLoraLinear", "gptq.GPTQLoraLinear",
    "awq.AwqLoraLinear", "hqq.HqqLoraLinear", "eetq.EetqLoraLinear", "aqlm.AqlmLoraLinear",
)  # fmt: skip
COVERED = f"{_MODULES}layer.Linear, layer.ParamWrapper and {', '.join(_CLASSES)}"


def full_name(kind: type) -> str:
    """Return the name of a class with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def fused_version(kind: type) -> type:
    """Return the fused version of a class of PEFT, or ``kind`` if it has no fused version."""
    covered = full_name(kind).removeprefix(_MODULES) in _CLASSES
    return fused_class(Fused, kind) if covered else kind
