"""Federated fine-tuning on Flower, under the name it had: :mod:`lora_ext.federated.flower`."""

from lora_ext.federated.flower import (
    LocalGrid,
    LoraStrategy,
    from_arrays,
    make_client_app,
    make_server_app,
    to_arrays,
)

__all__ = [
    "LocalGrid",
    "LoraStrategy",
    "from_arrays",
    "make_client_app",
    "make_server_app",
    "to_arrays",
]
