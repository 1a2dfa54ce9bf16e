"""Adapters of a pool by name: their slots or copies in host memory, pins and evictions."""

from __future__ import annotations

import difflib
import threading
import time
from collections import Counter, OrderedDict, UserDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from lora_ext._checks import require
from lora_ext.adapter import AdapterConfig
from lora_ext.rows import UnknownAdapterError

from ._pages import PackedAdapter
from ._placement import find_place, resize, set_sizes
from ._store import PageStore, Placement, Resident

BASE = "__base__"  # PEFT's name for "no adapter"
NO_SLOT = -1
_REMEMBERED = 1024  # stored names of dropped adapters, for errors


class PoolLock:
    """Reentrant lock that can run jobs when its thread releases it.

    Python may collect garbage anywhere: a generator that was dropped inside a block may release its
    adapters in the middle of a load by the same thread, which a reentrant lock does not prevent.
    Releases are therefore delayed until the thread leaves the lock, see :meth:`at_end`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._jobs: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        try:
            while self._depth == 1 and self._jobs:
                self._jobs.popleft()()
        finally:
            self._depth -= 1
            self._lock.release()

    def at_end(self, job: Callable[[], None]) -> None:
        """Run a job, and raise its errors, when the thread that holds the lock releases it."""
        self._jobs.append(job)


class HostCache(UserDict[str, PackedAdapter]):
    """Adapters in host memory by name, the least recently used first.

    :meth:`put` drops adapters above ``limit`` bytes.
    """

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit
        self.nbytes = 0  # size of all adapters
        self.dropped = 0  # number of dropped adapters so far
        self.let_go: OrderedDict[str, None] = OrderedDict()  # names dropped last

    def __setitem__(self, name: str, adapter: PackedAdapter) -> None:
        super().__setitem__(name, adapter)
        self.nbytes += adapter.nbytes

    def __delitem__(self, name: str) -> None:
        self.nbytes -= self[name].nbytes
        super().__delitem__(name)

    def put(self, name: str, adapter: PackedAdapter) -> None:
        """Add an adapter; drop the least recently used until the rest fits, this one last."""
        self[name] = adapter
        while self.nbytes > self.limit:
            gone = next(iter(self))
            del self[gone]
            self.dropped += 1
            self.let_go[gone] = None
            while len(self.let_go) > _REMEMBERED:
                self.let_go.popitem(last=False)

    def forget(self, name: str) -> None:
        """Remove an adapter, and its name from the dropped ones."""
        self.let_go.pop(name, None)
        self.pop(name, None)


class Residence:
    """Adapters of a pool by name. The pool holds the lock around every method."""

    def __init__(self, store: PageStore, host_cache_bytes: int):
        self.lock = PoolLock()
        #: Adapters in slots, the least recently used first.
        self.by_name: OrderedDict[str, Resident] = OrderedDict()
        self.cache = HostCache(host_cache_bytes)  # all other adapters
        self.counts = Counter(loads=0, evictions=0, cache_hits=0)
        self._store = store

    @property
    def names(self) -> list[str]:
        """Names of all adapters."""
        return [*self.by_name, *self.cache]

    def __contains__(self, name: object) -> bool:
        return name in self.by_name or name in self.cache

    def check_new(self, name: str) -> None:
        """Raise ValueError for an invalid or a known name."""
        fits = isinstance(name, str) and name not in ("", BASE)
        require(fits, "AdapterPool", "name", f"a non-empty name but {BASE!r}", repr(name))
        if name in self:
            raise ValueError(f"AdapterPool: name: {name!r} is loaded already; update() replaces it")

    def check_known(self, names: Iterable[str]) -> None:
        """Raise UnknownAdapterError for unknown names."""
        for name in names:
            if name in self:
                continue
            known = self.names
            close = difflib.get_close_matches(str(name), known)
            hint = f"; close matches: {close}" if close else f"; {len(known)} are loaded"
            if name in self.cache.let_go:
                hint = "; it was evicted, and host_cache_bytes had no room for it: load it again"
            raise UnknownAdapterError(f"AdapterPool: adapter {name!r} is not loaded{hint}")

    def config_of(self, name: str) -> AdapterConfig:
        """Return the configuration of an adapter; raise UnknownAdapterError for other names."""
        self.check_known([name])
        return (self.by_name.get(name) or self.cache[name]).config

    def forget(self, name: str) -> None:
        """Remove a name; its slot and pages are freed at once, or with the last pin."""
        self.check_known([name])
        self.cache.forget(name)
        if name in self.by_name:
            self._retire(self.by_name.pop(name))

    def bring_back(self, names: Sequence[str | None], absent: list[str]) -> None:
        """Install evicted adapters without evicting others of ``names``."""
        self.check_known(absent)
        held = [self.by_name[n] for n in set(names) if n is not None and n in self.by_name]
        for resident in held:
            resident.pins += 1
        # First take them out of the cache: an adapter evicted for one must not drop another.
        wanted = {name: self.cache.pop(name) for name in dict.fromkeys(absent)}
        try:
            for name in list(wanted):
                self.install(name, wanted[name])
                del wanted[name]
                self.counts["cache_hits"] += 1
                held.append(self.by_name[name])
                held[-1].pins += 1
        finally:
            for resident in held:
                resident.pins -= 1
            for name, adapter in wanted.items():  # even above the limit, so that none is lost
                self.cache[name] = adapter

    # Pages must not be inference tensors, since they are also updated outside of inference mode and
    # saved for backward.
    @torch.inference_mode(False)
    @torch.no_grad()
    def install(self, name: str, packed: PackedAdapter) -> None:
        """Write an adapter into a free slot, then publish the new or changed name."""
        old = self.by_name.get(name)
        order = [*([old] if old else []), *(r for r in self.by_name.values() if r is not old)]
        place = find_place(self._store, name, packed, order)
        saved = [self._store.download(victim) for victim in place.victims]
        try:
            resize(self._store, place)
            written = self._store.upload(packed, place)
        except BaseException:
            self._undo(place, saved)
            raise
        # Only Python assignments follow, so the change is not interrupted by an error.
        config, pages = packed.config, place.pages
        resident = Resident(
            name, place.slot, config, pages, packed.rank, packed.nbytes, config.invocation, written
        )
        self._store.commit(place, resident)
        for victim in place.victims:
            del self.by_name[victim.name]
        if old is not None and old not in place.victims:
            self._retire(old)
        self.cache.pop(name, None)
        self.by_name[name] = resident
        self.by_name.move_to_end(name)
        for victim, adapter in zip(place.victims, saved, strict=True):
            if victim is not old:
                self.counts["evictions"] += 1
                self.cache.put(victim.name, adapter)

    def _undo(self, place: Placement, saved: list[PackedAdapter]) -> None:
        """Restore the victims after a failed copy; cache those that the device has no room for."""
        backed = True
        try:
            set_sizes(self._store, place, {m: before for m, (before, _) in place.sizes.items()})
        except RuntimeError:
            backed = False
        for victim, adapter in zip(place.victims, saved, strict=True):
            if not (backed and self._put_back(victim, adapter)):
                del self.by_name[victim.name]
                self._store.vacate(victim)
                self.cache[victim.name] = adapter

    def _put_back(self, victim: Resident, adapter: PackedAdapter) -> bool:
        """Write a victim's pages again; return whether that succeeded."""
        try:
            there = Placement(victim.slot, victim.pages)
            victim.written = self._store.upload(adapter, there)
        except BaseException:
            return False
        return True

    def _retire(self, resident: Resident) -> None:
        resident.retired = True
        if resident.pins == 0:
            self._store.vacate(resident)

    # ---------------------------------------------------------------------------------------------
    # Pins

    def pin(self, names: Sequence[str | None]) -> tuple[list[int], list[Resident]]:
        """Pin one adapter per entry, all or none.

        Returns the slots, -1 for the base model, and the residents of the other slots.
        """
        now, slots, pinned = time.time(), [], []
        absent = [n for n in names if n is not None and n != BASE and n not in self.by_name]
        if absent:
            self.bring_back(names, absent)
        for name in names:
            if name is None or name == BASE:
                slots.append(NO_SLOT)
                continue
            resident = self.by_name[name]
            if resident.written:  # make the current stream wait for queued copies
                if all([transfer.before_reading(each) for transfer, each in resident.written]):
                    resident.written = []
            resident.pins += 1
            resident.last_use = now
            self.by_name.move_to_end(name)
            slots.append(resident.slot)
            pinned.append(resident)
        return slots, pinned

    def pin_again(self, residents: Sequence[Resident]) -> None:
        """Pin residents again; raise RuntimeError if one of them is no longer in its slot."""
        for resident in residents:
            if self._store.residents[resident.slot] is not resident:
                raise RuntimeError(
                    f"AdapterPool: adapter {resident.name!r} was unloaded, updated or evicted "
                    "after the forward that backward recomputes; leave its block after backward"
                )
        for resident in residents:
            resident.pins += 1

    def unpin(self, slots: Sequence[int], checked: bool) -> None:
        """Remove one pin per entry; unless ``checked``, raise ValueError if there are too few."""
        residents = self._store.residents
        for slot in () if checked else {*slots} - {NO_SLOT}:
            resident = residents[slot] if 0 <= slot < len(residents) else None
            pins, asked = resident.pins if resident else 0, slots.count(slot)
            require(asked <= pins, "AdapterPool.release", f"slot {slot}", f"{asked} pins", pins)
        for transfer in self._store.transfers.values():  # queued steps may read the freed pages
            transfer.mark_use()
        for slot in slots:
            if slot == NO_SLOT:
                continue
            resident = residents[slot]
            assert resident is not None  # it was pinned
            resident.pins -= 1
            if resident.retired and resident.pins == 0:
                self._store.vacate(resident)

    # ---------------------------------------------------------------------------------------------
    # Numbers

    def stats(self) -> dict[str, Any]:
        """Return :meth:`AdapterPool.stats`."""
        cache, store = self.cache, self._store
        live = [r for r in store.residents if r is not None]
        absent = {"pins": 0, "last_use": None, "slot": None}
        on_device = {
            name: {k: getattr(resident, k) for k in ("rank", "pins", "last_use", "slot")}
            | {"bytes": resident.nbytes}
            for name, resident in self.by_name.items()
        }
        on_host = {
            name: {"rank": adapter.rank, "bytes": adapter.nbytes, **absent}
            for name, adapter in cache.items()
        }
        return {
            "slots_used": len(live),
            "slots_pinned": sum(r.pins > 0 for r in live),
            "pins": sum(r.pins for r in live),
            "modules_targeted": len(store.slabs),
            "pages_total": sum(slab.pages for slab in store.slabs.values()),
            "pages_free": sum(len(slab.free) for slab in store.slabs.values()),
            "limit_bytes": store.limit_bytes,
            "reserved_bytes": store.reserved_bytes,
            "used_bytes": sum(r.nbytes for r in live),
            "page_bytes": store.page_bytes,
            "table_bytes": store.table_bytes,
            "replaced_bytes": store.replaced_bytes,
            "cached": len(cache),
            "cache_bytes": cache.nbytes,
            **self.counts,
            "dropped": cache.dropped,
            "adapters": on_device | on_host,
        }
