"""Evicted adapters in host memory, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from .packing import PackedAdapter

_REMEMBERED = 1024  # names of adapters that were let go, for errors


class HostCache(Mapping[str, PackedAdapter]):
    """Adapters by name, the least recently used first.

    Args:
        limit: bytes of pages above which :meth:`put` lets adapters go.

    Attributes:
        nbytes: of all that is here. dropped: how many were let go so far.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = self.dropped = 0
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()
        self._let_go: OrderedDict[str, None] = OrderedDict()

    def __getitem__(self, name: str) -> PackedAdapter:
        return self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def put(self, name: str, adapter: PackedAdapter) -> None:
        """Keep an adapter; let the least recently used go until all fits, itself at last."""
        self.keep(name, adapter)
        while self.nbytes > self.limit:
            gone = next(iter(self._adapters))
            self.pop(gone)
            self.dropped += 1
            self._let_go[gone] = None
            while len(self._let_go) > _REMEMBERED:
                self._let_go.popitem(last=False)

    def keep(self, name: str, adapter: PackedAdapter) -> None:
        """Keep an adapter, even above the limit: after a failure nothing is lost."""
        self._adapters[name] = adapter
        self.nbytes += adapter.nbytes

    def pop(self, name: str) -> PackedAdapter:
        """Take an adapter out."""
        adapter = self._adapters.pop(name)
        self.nbytes -= adapter.nbytes
        return adapter

    def forget(self, name: str) -> None:
        """Take an adapter out, if it is here, and no longer tell that one of that name was let
        go."""
        self._let_go.pop(name, None)
        if name in self:
            self.pop(name)

    def was_dropped(self, name: str) -> bool:
        """Whether the limit had no room for an adapter of that name, not long ago."""
        return name in self._let_go
