"""Kernels for many LoRA adapters and for probabilistic circuits, as drop-in PyTorch modules."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from lora_ext import _loader

_C = _loader.load()

# E402: the ops exist once the compiled module is in the process, and all that follows stands on
# them.
from lora_ext import adapter, ops, pool  # noqa: E402
from lora_ext.interop import from_peft  # noqa: E402
from lora_ext.layers import LoraConfig, chunked_loss, exact  # noqa: E402
from lora_ext.pool import AdapterPool  # noqa: E402
from lora_ext.rows import adapters  # noqa: E402
from lora_ext.serving import attach, capturable, detach  # noqa: E402

if TYPE_CHECKING:
    from lora_ext import circuits, control, federated, methods, nn, tenants

__all__ = [
    "AdapterPool",
    "LoraConfig",
    "adapter",
    "adapters",
    "attach",
    "capturable",
    "chunked_loss",
    "circuits",
    "control",
    "detach",
    "exact",
    "federated",
    "from_peft",
    "methods",
    "nn",
    "ops",
    "pool",
    "tenants",
]
__version__ = "0.2.0"

# A server needs none of these, and they were half of the time that an import takes.
_ON_DEMAND = frozenset({"circuits", "control", "federated", "methods", "nn", "tenants"})


def __getattr__(name: str) -> ModuleType:
    """Import a package when it is first asked for."""
    if name in _ON_DEMAND:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
