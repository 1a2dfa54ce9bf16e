"""Kernels for many LoRA adapters and for probabilistic circuits, as drop-in PyTorch modules."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_ext import _loader
from lora_ext._on_demand import on_demand

_C = _loader.load()

# E402: the imports below need the ops, which exist once the compiled module is loaded.
from lora_ext import adapter, ops, pool  # noqa: E402
from lora_ext.interop import from_peft  # noqa: E402
from lora_ext.layers import LoraConfig  # noqa: E402
from lora_ext.pool import AdapterPool  # noqa: E402
from lora_ext.rows import adapters  # noqa: E402
from lora_ext.serving import attach, detach  # noqa: E402

if TYPE_CHECKING:
    from lora_ext import circuits, control, federated, methods, nn, tenants
    from lora_ext.layers import chunked_loss, exact
    from lora_ext.serving import capturable

__all__ = [
    "AdapterPool", "LoraConfig", "adapter", "adapters", "attach", "capturable", "chunked_loss",
    "circuits", "control", "detach", "exact", "federated", "from_peft", "methods", "nn", "ops",
    "pool", "tenants",
]  # fmt: skip
__version__ = "0.2.0"

# These packages are imported on first use, since a server does not need them and importing them
# would double the import time.
_PACKAGES = frozenset({"circuits", "control", "federated", "methods", "nn", "tenants"})
_function = on_demand(__name__, layers="chunked_loss exact", serving="capturable")


def __getattr__(name: str) -> Any:
    """Import a subpackage, or the module that defines a function, when it is first used."""
    return import_module(f"{__name__}.{name}") if name in _PACKAGES else _function(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
