"""Adapters of one base model: the paged pool, and PEFT's files."""

from .pages import ModuleSlab, unpack
from .peft_files import save_adapter
from .pool import AdapterPool, Lease, UnknownAdapterError
from .store import PoolFullError

__all__ = [
    "AdapterPool",
    "Lease",
    "ModuleSlab",
    "PoolFullError",
    "UnknownAdapterError",
    "save_adapter",
    "unpack",
]
