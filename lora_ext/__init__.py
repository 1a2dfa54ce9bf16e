"""Kernels for many LoRA adapters and for probabilistic circuits, as drop-in PyTorch modules."""

from lora_ext import _loader

_C = _loader.load()

# E402: the ops exist once the compiled module is in the process, and all that follows stands on
# them.
from lora_ext import adapter, circuits, federated, methods, nn, ops, pool  # noqa: E402
from lora_ext.interop import from_peft  # noqa: E402
from lora_ext.interop.transformers import attach, detach  # noqa: E402
from lora_ext.nn import LoraConfig, adapters  # noqa: E402
from lora_ext.pool import AdapterPool  # noqa: E402

__all__ = [
    "AdapterPool",
    "LoraConfig",
    "adapter",
    "adapters",
    "attach",
    "circuits",
    "detach",
    "federated",
    "from_peft",
    "methods",
    "nn",
    "ops",
    "pool",
]
__version__ = "0.1.0"
