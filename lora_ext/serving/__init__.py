"""A pool's adapters served by somebody else's model: its layers, ``attach``, ``generate``, streams,
continuous batching, and what a server runs on."""

from .attaching import attach, detach
from .captured import Capturable, capturable
from .embedding import Embedder as Embedder
from .embedding import pooling_of as pooling_of
from .engine import Engine as Engine
from .engine import QueueFullError as QueueFullError
from .engine import StoppedError as StoppedError
from .formats import Format as Format
from .formats import read_format as read_format
from .formats import refuse_old_names as refuse_old_names
from .layers.multi_lora import MultiLoraLinear
from .layers.multi_lora_embedding import MultiLoraEmbedding
from .layers.multi_lora_experts import MultiLoraExperts
from .metrics import CONTENT_TYPE as CONTENT_TYPE
from .metrics import prometheus as prometheus
from .sampling import Sampling as Sampling
from .streams import RequestStream as RequestStream

__all__ = [
    "Capturable",
    "MultiLoraEmbedding",
    "MultiLoraExperts",
    "MultiLoraLinear",
    "attach",
    "capturable",
    "detach",
]
