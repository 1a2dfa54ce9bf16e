"""Adapters of one base model in pages that rows of a batch share."""

from .pages import ModuleSlab, unpack
from .pool import AdapterPool, Lease, UnknownAdapterError
from .store import PoolFullError

__all__ = [
    "AdapterPool",
    "Lease",
    "ModuleSlab",
    "PoolFullError",
    "UnknownAdapterError",
    "unpack",
]
