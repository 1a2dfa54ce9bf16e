"""A pool's adapters served by somebody else's model: its layers, ``attach``, ``generate``, streams
and continuous batching."""

from .attaching import attach, detach
from .engine import QueueFullError as QueueFullError
from .layers.multi_lora import MultiLoraLinear
from .layers.multi_lora_embedding import MultiLoraEmbedding
from .layers.multi_lora_experts import MultiLoraExperts
from .sampling import Sampling as Sampling

__all__ = [
    "MultiLoraEmbedding",
    "MultiLoraExperts",
    "MultiLoraLinear",
    "attach",
    "detach",
]
