"""Server of Tinker's API over HTTP on one machine, with many tenants on one base model.

Tinker is an API for training and sampling adapters. ``examples/tinker_server.py`` runs the server.
The extra ``tenants`` must be installed.
"""

from .app import make_app
from .running import main

__all__ = ["main", "make_app"]
