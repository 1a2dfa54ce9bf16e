"""Tinker's API over HTTP on one machine, with many tenants on one base model: what
``examples/tinker_server.py`` runs. Needs the extra ``tenants``."""

from .app import make_app
from .running import main

__all__ = ["main", "make_app"]
