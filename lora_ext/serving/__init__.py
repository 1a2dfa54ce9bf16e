"""A pool's adapters served by somebody else's model: its layers, ``attach``, ``generate``, streams,
continuous batching, and what a server runs on."""

from .attaching import attach, detach
from .embedding import Embedder, pooling_of
from .engine import Engine, QueueFullError, StoppedError
from .layers.multi_lora import MultiLoraLinear
from .layers.multi_lora_embedding import MultiLoraEmbedding
from .layers.multi_lora_experts import MultiLoraExperts
from .metrics import CONTENT_TYPE, Load, prometheus
from .sampling import Sampling
from .streams import RequestStream, TextStream

__all__ = [
    "CONTENT_TYPE",
    "Embedder",
    "Engine",
    "Load",
    "MultiLoraEmbedding",
    "MultiLoraExperts",
    "MultiLoraLinear",
    "QueueFullError",
    "RequestStream",
    "Sampling",
    "StoppedError",
    "TextStream",
    "attach",
    "detach",
    "pooling_of",
    "prometheus",
]
