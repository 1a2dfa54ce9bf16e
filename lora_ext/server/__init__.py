"""OpenAI's API over HTTP, where ``model`` names an adapter or the base: what ``lora-ext serve``
runs. Needs the extra ``serve``."""

from ._running import Settings, embedding_of, serve
from .app import make_app

__all__ = ["Settings", "embedding_of", "make_app", "serve"]
