"""Where each adapter of a pool is, in a slot or in host memory, and which one makes way."""

from __future__ import annotations

import difflib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import torch

from lora_ext.rows import UnknownAdapterError

from .host_cache import HostCache
from .packing import PackedAdapter
from .plan import Plan, backed_bytes, make_plan, resize, resize_back
from .store import PageStore, Resident

BASE = "__base__"  # PEFT's name for "no adapter"


class Residence:
    """Adapters by name. The pool holds its lock around every method.

    Args:
        store: slots and pages. host_cache_bytes: how much of what is evicted is kept.

    Attributes:
        by_name: what is in a slot, the least recently used first. cache: what is not.
        counts: of evictions and of returns from the cache.
    """

    def __init__(self, store: PageStore, host_cache_bytes: int):
        self.by_name: OrderedDict[str, Resident] = OrderedDict()
        self.cache = HostCache(host_cache_bytes)
        self.counts = Counter(evictions=0, cache_hits=0)
        self._store = store

    @property
    def names(self) -> list[str]:
        """All that are known."""
        return [*self.by_name, *self.cache]

    def __contains__(self, name: object) -> bool:
        return name in self.by_name or name in self.cache

    def check_new(self, name: str) -> None:
        """Refuse what is no name, or one that is known."""
        if not isinstance(name, str) or not name or name == BASE:
            raise ValueError(
                f"AdapterPool: name: expected a non-empty name but {BASE!r}, found {name!r}"
            )
        if name in self:
            raise ValueError(f"AdapterPool: name: {name!r} is loaded already; update() replaces it")

    def check_known(self, names: Iterable[str]) -> None:
        """Refuse names that are not known."""
        for name in names:
            if name in self:
                continue
            known = self.names
            close = difflib.get_close_matches(str(name), known)
            hint = f"; close matches: {close}" if close else f"; {len(known)} are loaded"
            if self.cache.was_dropped(name):
                hint = "; it was evicted, and host_cache_bytes had no room for it: load it again"
            raise UnknownAdapterError(f"AdapterPool: adapter {name!r} is not loaded{hint}")

    def forget(self, name: str) -> None:
        """The name is gone; so are slot and pages, now or with the last pin."""
        self.cache.forget(name)
        if name in self.by_name:
            self._retire(self.by_name.pop(name))

    def bring_back(self, names: Sequence[str | None], absent: list[str]) -> None:
        """Install evicted adapters, none at the cost of another that the caller named."""
        self.check_known(absent)
        held = [self.by_name[n] for n in set(names) if n is not None and n in self.by_name]
        for resident in held:
            resident.pins += 1
        # Out of the cache first: what is evicted for one of them must not push out the next.
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
            for name, adapter in wanted.items():
                self.cache.keep(name, adapter)

    # A pool that is first filled inside inference mode is updated outside of it, too, and its pages
    # are saved for backward.
    @torch.inference_mode(False)
    @torch.no_grad()
    def install(self, name: str, packed: PackedAdapter) -> None:
        """Write an adapter into a free slot, then publish the name, new or moved."""
        old = self.by_name.get(name)
        order = [*([old] if old else []), *(r for r in self.by_name.values() if r is not old)]
        plan = make_plan(self._store, name, packed, order)
        saved = [self._store.download(victim) for victim in plan.victims]
        sizes = backed_bytes(self._store, plan)
        try:
            resize(self._store, plan)
            written = self._store.upload(plan.slot, plan.pages, packed, plan)
        except BaseException:
            self._undo(plan, sizes, saved)
            raise
        # Python assignments only from here on: nothing fails half-way.
        resident = Resident(
            name, plan.slot, packed.config, plan.pages, packed.rank, packed.nbytes, written
        )
        self._store.commit(plan, resident)
        for victim in plan.victims:
            del self.by_name[victim.name]
        if old is not None and old not in plan.victims:
            self._retire(old)
        if name in self.cache:
            self.cache.pop(name)
        self.by_name[name] = resident
        self.by_name.move_to_end(name)
        for victim, adapter in zip(plan.victims, saved, strict=True):
            if victim is not old:
                self.counts["evictions"] += 1
                self.cache.put(victim.name, adapter)

    def _undo(self, plan: Plan, sizes: dict[str, int], saved: list[PackedAdapter]) -> None:
        """After a failed copy: put the victims' bytes back, or keep what the device refuses."""
        try:
            resize_back(self._store, plan, sizes)
        except RuntimeError:
            for victim, adapter in zip(plan.victims, saved, strict=True):
                self._give_up(victim, adapter)
            return
        for victim, adapter in zip(plan.victims, saved, strict=True):
            try:
                victim.written = self._store.upload(victim.slot, victim.pages, adapter)
            except BaseException:
                self._give_up(victim, adapter)

    def _give_up(self, victim: Resident, saved: PackedAdapter) -> None:
        del self.by_name[victim.name]
        self._store.vacate(victim)
        self.cache.keep(victim.name, saved)

    def _retire(self, resident: Resident) -> None:
        resident.retired = True
        if resident.pins == 0:
            self._store.vacate(resident)
