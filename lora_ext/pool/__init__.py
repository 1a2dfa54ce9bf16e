"""Pool of adapters for one base model. The rows of a batch may use different adapters."""

from lora_ext.rows import UnknownAdapterError

from ._folder import AdapterFolder as AdapterFolder
from ._pages import ModuleSlab, unpack
from ._placement import PoolFullError
from ._store import serials as serials
from .pool import AdapterPool, Lease

__all__ = [
    "AdapterPool",
    "Lease",
    "ModuleSlab",
    "PoolFullError",
    "UnknownAdapterError",
    "unpack",
]
