"""Adapters of one base model in pages that rows of a batch share."""

from lora_ext.rows import UnknownAdapterError

from .folder import AdapterFolder as AdapterFolder
from .pages import ModuleSlab, unpack
from .placement import PoolFullError
from .pool import AdapterPool, Lease

__all__ = [
    "AdapterPool",
    "Lease",
    "ModuleSlab",
    "PoolFullError",
    "UnknownAdapterError",
    "unpack",
]
