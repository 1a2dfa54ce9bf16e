"""OpenAI's API over HTTP, where ``model`` names an adapter or the base: what ``lora-ext serve``
runs. Needs the extra ``serve``."""

from .app import make_app
from .running import Settings, embedding_of, serve

__all__ = ["Settings", "embedding_of", "make_app", "serve"]
