"""Server of OpenAI's API over HTTP, which ``lora-ext serve`` runs.

The field ``model`` of a request is the name of an adapter or of the base model. The extra ``serve``
must be installed.
"""

from ._running import Settings, embedding_of, serve
from .app import make_app

__all__ = ["Settings", "embedding_of", "make_app", "serve"]
