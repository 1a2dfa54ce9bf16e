"""OpenAI's API over HTTP, as served by ``lora-ext serve``. Needs the extra ``serve``.

The field ``model`` of a request names an adapter or the base model.
"""

from ._running import Settings, embedding_of, serve
from .app import make_app

__all__ = ["Settings", "embedding_of", "make_app", "serve"]
