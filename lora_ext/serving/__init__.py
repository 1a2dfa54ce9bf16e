"""A pool's adapters served by somebody else's model: its layers, ``attach``, ``generate``, streams,
continuous batching, and what a server runs on."""

from typing import TYPE_CHECKING

from lora_ext._on_demand import on_demand

from .attaching import attach, detach
from .layers.multi_lora import MultiLoraLinear
from .layers.multi_lora_embedding import MultiLoraEmbedding
from .layers.multi_lora_experts import MultiLoraExperts

if TYPE_CHECKING:
    from .captured import Capturable, capturable
    from .constraining import Standing, constrained
    from .embedding import Embedder, Preparation, pooling_of, preparation_of
    from .engine import Engine, QueueFullError, StoppedError
    from .formats import Format, read_format, refuse_old_names
    from .metrics import CONTENT_TYPE, prometheus
    from .sampling import Sampling
    from .streams import RequestStream

__all__ = [
    "Capturable",
    "MultiLoraEmbedding",
    "MultiLoraExperts",
    "MultiLoraLinear",
    "attach",
    "capturable",
    "detach",
]

__getattr__ = on_demand(
    __name__,
    captured="Capturable capturable",
    constraining="Standing constrained",
    embedding="Embedder Preparation pooling_of preparation_of",
    engine="Engine QueueFullError StoppedError",
    formats="Format read_format refuse_old_names",
    metrics="CONTENT_TYPE prometheus",
    sampling="Sampling",
    streams="RequestStream",
)
