"""Tinker's API over HTTP on one machine, with many tenants on one base model.

``examples/tinker_server.py`` runs it. Needs the extra ``tenants``.
"""

from .app import make_app
from .running import main

__all__ = ["main", "make_app"]
