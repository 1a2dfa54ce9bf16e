"""Federated fine-tuning on Flower: a strategy, its apps, and a grid that runs in one process.

Importing this module disables Flower's telemetry, unless the environment variable
``FLWR_TELEMETRY_ENABLED`` is set. flwr reads the variable when it is first imported, so import this
module before flwr, or set the variable.
"""

from __future__ import annotations

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

try:
    import flwr.serverapp
except ImportError as error:
    raise ImportError(
        f"lora_ext.federated.flower: expected flwr 1.42 or newer, found none ({error}): "
        "run `pip install --no-build-isolation '.[fed]'` in a checkout of lora_ext"
    ) from error

from ._client import make_client_app
from ._records import from_arrays, to_arrays
from .grid import LocalGrid
from .server import make_server_app
from .strategy import LoraStrategy

__all__ = [
    "LocalGrid", "LoraStrategy", "from_arrays", "make_client_app", "make_server_app", "to_arrays",
]  # fmt: skip
