"""X-LoRA, whose layers mix several adapters per token with weights from a classifier."""

from __future__ import annotations

from typing import Any

from peft.tuners.xlora.layer import XLoraLayer
from torch import nn


def router_of(layer: nn.Module) -> Any:
    """Return the object of X-LoRA that replaces the forward of ``layer``, or None."""
    owner = getattr(layer.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, XLoraLayer) else None
