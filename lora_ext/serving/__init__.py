"""Layers and functions that serve the adapters of a pool with any model.

Contains the layers, ``attach``, support for ``generate`` and continuous batching, streams of
tokens, and the engines that servers use.
"""

from typing import TYPE_CHECKING

from lora_ext._on_demand import on_demand

from .attaching import attach, detach
from .layers._multi_lora import MultiLoraLinear
from .layers.multi_lora_embedding import MultiLoraEmbedding
from .layers.multi_lora_experts import MultiLoraExperts

if TYPE_CHECKING:
    from ._constraining import Standing, constrained
    from ._embedding import Embedder, Preparation, pooling_of, preparation_of
    from ._engine import Engine, QueueFullError, StoppedError
    from ._formats import Format, read_format, refuse_old_names
    from ._metrics import CONTENT_TYPE, prometheus
    from ._sampling import Logprobs, Sampling, TokenLogprob
    from ._streams import RequestStream, TextStream
    from .captured import Capturable, capturable

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
    _constraining="Standing constrained",
    _embedding="Embedder Preparation pooling_of preparation_of",
    _engine="Engine QueueFullError StoppedError",
    _formats="Format read_format refuse_old_names",
    _metrics="CONTENT_TYPE prometheus",
    _sampling="Logprobs Sampling TokenLogprob",
    _streams="RequestStream TextStream",
)
