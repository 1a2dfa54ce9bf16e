"""Adapters of a pool by name: slots on the device, copies in host memory, pins and evictions."""

from __future__ import annotations

import difflib
import itertools
import threading
import time
from collections import Counter, OrderedDict, UserDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from lora_ext._checks import require
from lora_ext.adapter import AdapterConfig
from lora_ext.rows import BASE, Name, UnknownAdapterError

from ._mixtures import check_weighted, joined_rows
from ._pages import PackedAdapter, TableRow, in_one_mapping
from ._placement import find_place, resize, set_sizes
from ._store import NO_SLOT, PageStore, Placement, Resident

_REMEMBERED = 1024  # maximum number of names of dropped adapters that are kept for messages


class PoolLock:
    """Reentrant lock that can run jobs when the thread that holds it releases it.

    Python may collect garbage at any point. If it collects a generator that is suspended inside an
    ``adapters`` block, the end of the block releases adapters, possibly in the middle of a load in
    the same thread. A reentrant lock does not prevent this. :meth:`at_end` therefore delays the
    release of the adapters until the thread releases the lock.
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
        """Run a job when the current thread, which holds the lock, releases it.

        Errors of the job are raised at that point.
        """
        self._jobs.append(job)


class HostCache(UserDict[str, PackedAdapter]):
    """Adapters in host memory by name, the least recently used first.

    If the adapters need more than ``limit`` bytes, :meth:`put` drops the first ones.
    """

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit
        self.nbytes = 0  # size of all adapters
        self.dropped = 0  # number of adapters dropped so far
        # Names of dropped adapters, the latest last.
        self.let_go: OrderedDict[str, None] = OrderedDict()

    def __setitem__(self, name: str, adapter: PackedAdapter) -> None:
        super().__setitem__(name, adapter)
        self.nbytes += adapter.nbytes

    def __delitem__(self, name: str) -> None:
        self.nbytes -= self[name].nbytes
        super().__delitem__(name)

    def put(self, name: str, adapter: PackedAdapter) -> None:
        """Add an adapter; drop the least recently used ones until the others fit.

        The new adapter itself is dropped only if it alone exceeds the limit.
        """
        self[name] = adapter
        while self.nbytes > self.limit:
            gone = next(iter(self))
            del self[gone]
            self.dropped += 1
            self.let_go[gone] = None
            while len(self.let_go) > _REMEMBERED:
                self.let_go.popitem(last=False)

    def forget(self, name: str) -> None:
        """Remove an adapter, and remove its name from the names of dropped adapters."""
        self.let_go.pop(name, None)
        self.pop(name, None)


class Residence:
    """Adapters of a pool by name. Callers hold ``lock`` during every method."""

    def __init__(self, store: PageStore, host_cache_bytes: int):
        self.lock = PoolLock()
        #: Adapters on the device and mixtures of them, the least recently used first.
        self.by_name: OrderedDict[Name, Resident] = OrderedDict()
        self.cache = HostCache(host_cache_bytes)  # adapters that are not on the device
        self.counts = Counter(loads=0, evictions=0, cache_hits=0)
        self.generations = itertools.count(1)  # yields the number of the next load
        self._store = store

    @property
    def names(self) -> list[str]:
        """Names of all adapters."""
        return [*(name for name in self.by_name if isinstance(name, str)), *self.cache]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self.by_name or name in self.cache)

    def check_new(self, name: str) -> None:
        """Raise ValueError if a name is invalid or already used."""
        fits = isinstance(name, str) and name not in ("", BASE)
        require(fits, "AdapterPool", "name", f"a non-empty str except {BASE!r}", repr(name))
        if name in self:
            raise ValueError(f"AdapterPool: name: {name!r} is loaded already; update() replaces it")

    def check_known(self, names: Iterable[str], where: str = "AdapterPool") -> None:
        """Raise UnknownAdapterError for the first name that the pool does not have."""
        for name in names:
            if name in self:
                continue
            known = self.names
            close = difflib.get_close_matches(str(name), known)
            hint = f"; close matches: {close}" if close else f"; {len(known)} are loaded"
            if name in self.cache.let_go:
                hint = "; it was evicted, and host_cache_bytes had no room for it: load it again"
            raise UnknownAdapterError(f"{where}: adapter {name!r} is not loaded{hint}")

    def config_of(self, name: str) -> AdapterConfig:
        """Return the configuration of an adapter; raise UnknownAdapterError for unknown names."""
        self.check_known([name])
        return (self.by_name.get(name) or self.cache[name]).config

    def generation_of(self, name: str) -> int | None:
        """Return the generation of an adapter; None for unknown names."""
        found = self.by_name.get(name) or self.cache.get(name)
        return None if found is None else found.generation

    def forget(self, name: str) -> None:
        """Remove an adapter. If it is pinned, its slot is freed when the last pin is removed."""
        self.check_known([name])
        self.cache.forget(name)
        if name in self.by_name:
            resident = self.by_name.pop(name)
            self._retire(resident)
            self._retire_mixtures([resident])

    def bring_back(self, names: Iterable[Name | None]) -> None:
        """Copy adapters back to the device, and give slots to mixtures that have none.

        No adapter or mixture in ``names`` is evicted for another one.
        """
        wanted_names = dict.fromkeys(n for n in names if n is not None and n != BASE)
        mixtures = [name for name in wanted_names if isinstance(name, tuple)]
        singles = [n for n in wanted_names if isinstance(n, str)] + [n for m in mixtures for n in m]
        absent = [name for name in singles if name not in self.by_name]
        self.check_known(absent, "AdapterPool: names")
        held = [self.by_name[n] for n in {*singles, *mixtures} if n in self.by_name]
        for resident in held:
            resident.pins += 1
        # Remove all absent adapters from the cache first. Otherwise the cache could drop one of
        # them to make room for an adapter that is evicted from the device.
        wanted = {name: self.cache.pop(name) for name in dict.fromkeys(absent)}
        try:
            for name in list(wanted):
                self.install(name, wanted[name])
                del wanted[name]
                self.counts["cache_hits"] += 1
                held.append(self.by_name[name])
                held[-1].pins += 1
            for names in [each for each in mixtures if each not in self.by_name]:
                members = [self.by_name[name] for name in names]
                self.install(names, PackedAdapter(members[0].config, {}), members)
                held.append(self.by_name[names])
                held[-1].pins += 1
        finally:
            for resident in held:
                resident.pins -= 1
            for name, adapter in wanted.items():  # without put(), which might drop some adapters
                self.cache[name] = adapter

    # Pages must not be inference tensors: they are saved for backward, and later loads outside of
    # inference mode update them.
    @torch.inference_mode(False)
    @torch.no_grad()
    def install(self, name: Name, packed: PackedAdapter, members: Sequence[Resident] = ()) -> None:
        """Write an adapter to a free slot, then assign its name to the slot.

        If the name is in use, its previous slot is freed as soon as that slot is not pinned. For a
        mixture, ``members`` are its adapters and ``packed`` has no modules.
        """
        old = self.by_name.get(name)
        order = [*([old] if old else []), *(r for r in self.by_name.values() if r is not old)]
        place = find_place(self._store, name, packed, order)
        saved = [
            None if victim.members else in_one_mapping(self._store.download(victim))
            for victim in place.victims
        ]
        if isinstance(name, tuple):
            place.of_members = [member.slot for member in members]
            place.rows = joined_rows(self._store, members)
        for module, part in packed.modules.items():
            n = len(part.a) // self._store.index.specs[module].experts
            pages = place.pages[module]
            scales = [*part.scales] or [part.scale] * n
            place.rows[module] = TableRow(pages, part.rank, scales, [0] * n, part.scale)
        try:
            resize(self._store, place)
            written = self._store.upload(packed, place)
        except BaseException:
            self._undo(place, saved)
            raise
        # Only Python assignments follow, so no error can leave the pool half changed.
        config, pages = packed.config, place.pages
        rank = max((row.rank for row in place.rows.values()), default=0)
        resident = Resident(name, place.slot, config, pages, rank, packed.nbytes, place.rows)
        resident.written, resident.members = written, tuple(members)
        parts = packed.modules.items()
        resident.scaled = {m: part.of_bias for m, part in parts if part.after is not None}
        resident.befores = frozenset(m for m, part in parts if part.before is not None)
        if isinstance(name, str):
            self.cache.pop(name, None)
            resident.invocation = config.invocation
            resident.generation = packed.generation or next(self.generations)
        self._store.commit(place, resident)
        for victim in place.victims:
            del self.by_name[victim.name]
        if old is not None and old not in place.victims:
            self._retire(old)
        self._retire_mixtures(place.victims if old is None else [*place.victims, old])
        self.by_name[name] = resident
        self.by_name.move_to_end(name)
        for victim, adapter in zip(place.victims, saved, strict=True):
            if victim is not old and adapter is not None:
                self.counts["evictions"] += 1
                self.cache.put(str(victim.name), adapter)

    def _undo(self, place: Placement, saved: list[PackedAdapter | None]) -> None:
        """Restore the victims on the device after a failed copy.

        A victim that cannot be restored is moved to the host cache.
        """
        backed = True
        try:
            set_sizes(self._store, place, {m: before for m, (before, _) in place.sizes.items()})
        except RuntimeError:
            backed = False
        for victim, adapter in zip(place.victims, saved, strict=True):
            if adapter is None or not (backed and self._put_back(victim, adapter)):
                self.by_name.pop(victim.name, None)  # a mixture may be retired already
                if not victim.retired:
                    self._store.vacate(victim)
                self._retire_mixtures([victim])
                if adapter is not None:
                    self.cache[str(victim.name)] = adapter

    def _put_back(self, victim: Resident, adapter: PackedAdapter) -> bool:
        """Write a victim to its pages and slot again; return whether this succeeded."""
        try:
            there = Placement(victim.slot, victim.pages, victim.rows)
            victim.written = self._store.upload(adapter, there)
        except BaseException:
            return False
        return True

    def prepare_mixtures(self) -> None:
        """Allocate the tables that mixtures need, unless they exist already."""
        if not self._store.members:
            self.install((), PackedAdapter(AdapterConfig(), {}))
            del self.by_name[()]  # () is not a mixture and has no slot

    def _retire(self, resident: Resident) -> None:
        resident.retired = True
        if resident.pins == 0:
            self._store.vacate(resident)

    def _retire_mixtures(self, gone: Iterable[Resident]) -> None:
        """Remove the mixtures that contain an adapter in ``gone``."""
        serials = {resident.serial for resident in gone}
        for mixture in list(self.by_name.values()):
            if any(member.serial in serials for member in mixture.members):
                self._retire(self.by_name.pop(mixture.name))

    # ---------------------------------------------------------------------------------------------
    # Pins

    def pin(
        self, names: Sequence[Name | None], weighted: Iterable[str] = ()
    ) -> tuple[list[int], list[Resident]]:
        """Pin one adapter or mixture per entry; if an error is raised, pin nothing.

        Args:
            names: names of adapters and of mixtures, None or :data:`BASE` for the base model.
            weighted: the names that have a weight other than 1.

        Returns:
            The slot of each entry, -1 for the base model, and the residents of all other entries.
        """
        now, slots, pinned = time.time(), [], []
        if any(n is not None and n != BASE and n not in self.by_name for n in names):
            self.bring_back(names)
        for name in weighted:
            check_weighted(self._store, self.by_name[name])
        for name in names:
            if name is None or name == BASE:
                slots.append(NO_SLOT)
                continue
            resident = self.by_name[name]
            # Move a mixture before its adapters to the end, so that it is evicted before them.
            for each in (resident, *resident.members):
                if each.written:
                    if all([transfer.before_reading(job) for transfer, job in each.written]):
                        each.written = []
                each.pins += 1
                each.last_use = now
                self.by_name.move_to_end(each.name)
            slots.append(resident.slot)
            pinned.append(resident)
        return slots, pinned

    def pin_again(self, residents: Sequence[Resident]) -> None:
        """Pin residents again; raise RuntimeError if a slot no longer contains its resident."""
        for resident in residents:
            if self._store.residents[resident.slot] is not resident:
                raise RuntimeError(
                    f"AdapterPool: adapter {resident.name!r} was unloaded, updated or evicted "
                    "after the forward that backward recomputes; leave its block after backward"
                )
        for resident in residents:
            for each in (resident, *resident.members):
                each.pins += 1

    def unpin(self, slots: Sequence[int], checked: bool) -> None:
        """Remove one pin per entry of ``slots`` except -1.

        Unless ``checked``, raise ValueError if a slot has fewer pins than entries.
        """
        residents = self._store.residents
        for slot in () if checked else {*slots} - {NO_SLOT}:
            resident = residents[slot] if 0 <= slot < len(residents) else None
            pins, asked = resident.pins if resident else 0, slots.count(slot)
            require(asked <= pins, "AdapterPool.release", f"slot {slot}", f"{asked} pins", pins)
        # Queued steps may still read the pages. Later copies to these pages must wait for them.
        for transfer in self._store.transfers.values():
            transfer.mark_use()
        for slot in slots:
            if slot == NO_SLOT:
                continue
            resident = residents[slot]
            assert resident is not None  # a pinned slot has a resident
            for each in (resident, *resident.members):
                each.pins -= 1
                if each.retired and each.pins == 0:
                    self._store.vacate(each)

    # ---------------------------------------------------------------------------------------------
    # Numbers

    def stats(self) -> dict[str, Any]:
        """Return the statistics of :meth:`AdapterPool.stats`."""
        cache, store = self.cache, self._store
        live = [r for r in store.residents if r is not None]
        absent = {"pins": 0, "last_use": None, "slot": None}
        on_device = {
            name: {k: getattr(resident, k) for k in ("rank", "pins", "last_use", "slot")}
            | {"bytes": resident.nbytes}
            for name, resident in self.by_name.items()
            if isinstance(name, str)
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
