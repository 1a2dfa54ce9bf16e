"""Kernels for many LoRA adapters and for probabilistic circuits, as drop-in PyTorch modules."""

from lora_ext import _loader

_C = _loader.load()

from lora_ext import ops  # noqa: E402  the ops exist once the compiled module is in the process

__all__ = ["ops"]
__version__ = "0.1.0"
