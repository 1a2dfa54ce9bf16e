"""AdapterPool: many adapters of one base model in paged slabs, swapped while the model runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_ext._checks import integer, require, require_flags
from lora_ext.adapter import (
    AdapterSource,
    BaseModels,
    LoraAdapter,
    ModelIndex,
    live_adapter,
    model_name,
)

from ._pages import PackedAdapter, in_words, page_count, read_packed
from ._residence import Residence
from ._store import PageStore, Resident

Source = AdapterSource | LoraAdapter | nn.Module


class Lease(list[int]):
    """Pinned slot ids, -1 for the base model; a context manager that releases them."""

    def __init__(
        self, pool: AdapterPool, slots: Iterable[int] = (), residents: Sequence[Resident] = ()
    ):
        super().__init__(slots)
        self.pool = pool
        self.released = False
        self.residents = residents  # what is pinned

    @property
    def invocations(self) -> list[tuple[int, ...]]:
        """Of each adapter that is pinned, the tokens that it begins with; none for all tokens."""
        return [resident.invocation for resident in self.residents]

    def renew(self) -> None:
        """Pin the same again after the release: a backward may compute layers once more.

        Raises:
            RuntimeError: one of the adapters was unloaded, updated or evicted since.
        """
        self.pool.renew(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.released:
            self.pool.release(self)


class AdapterPool:
    """LoRA adapters of one base model, addressed by slot, stored in pages of eight ranks.

    Args:
        model: its linear and embedding layers are found by name; a weak reference is kept.
        max_slots: adapters that can be on the device at once.
        max_rank: largest rank of any adapter in any module, a multiple of 8 wastes nothing.
        pages: most pages of a module, or of each expert of one; default
            ``max_slots * ceil(max_rank / 8)``, so that any ``max_slots`` adapters fit. No page
            takes memory before it is used.
        dtype, device: of the pages; default is each module's own, on the device where it computes.
        targets: modules that adapters may touch (names, suffixes, or a regex); default all.
        host_cache_bytes: evicted adapters are kept in host memory up to this size.
        max_bytes: most bytes that the pool takes from its devices, pages, tables and replaced
            modules together; beyond it the least recently used adapters make way. Default no limit
            but ``pages``.

    Every method may be called from any thread. A method that raises leaves the pool as it was. An
    adapter whose configuration names another base model is served, and warned of once.
    """

    def __init__(
        self,
        model: nn.Module,
        max_slots: int = 64,
        max_rank: int = 64,
        pages: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        targets: str | Iterable[str] | None = None,
        host_cache_bytes: int = 1 << 30,
        *,
        max_bytes: int | None = None,
    ):
        optional = {"pages": pages, "max_bytes": max_bytes}
        given = {name: value for name, value in optional.items() if value is not None}
        for argument, value in {"max_slots": max_slots, "max_rank": max_rank, **given}.items():
            integer("AdapterPool", argument, value, 1, expected=("an integer", "at least 1"))
        _check_host_cache_bytes(host_cache_bytes)
        if device is not None:
            device = torch.empty(0, device=device).device  # a device that is not there says so now
        self.max_slots = max_slots
        self.max_rank = max_rank
        self.targets = targets if isinstance(targets, str | None) else tuple(targets)
        self.pages = pages if pages is not None else max_slots * page_count(max_rank)
        self.max_bytes = max_bytes
        self.index = ModelIndex.build(model, self.targets, dtype, device)
        self.base_models = BaseModels(model_name(model))
        self._store = PageStore(self.index, max_slots, max_rank, self.pages, max_bytes)
        self.modules = {name: self._store.modules[name] for name in self.index.modules}
        #: What the layer of an experts module reads, by the parameter's name.
        self.experts = {name: self._store.modules[name] for name in self.index.experts}
        self._residence = Residence(self._store, host_cache_bytes)
        self._lock = self._residence.lock

    def __reduce__(self) -> NoReturn:
        """Raise TypeError, because slots and pins belong to one process."""
        raise TypeError(
            "AdapterPool: expected not to be copied or pickled, found copy, pickle or torch.save; "
            "save the model's state_dict, or detach the model first"
        )

    # ---------------------------------------------------------------------------------------------
    # Names

    @property
    def names(self) -> list[str]:
        """Every adapter that :meth:`acquire` knows, on the device or in the host cache."""
        with self._lock:
            return self._residence.names

    def __contains__(self, name: object) -> bool:
        """Return whether :meth:`acquire` knows the name."""
        with self._lock:
            return name in self._residence

    def load(
        self, name: str, source: Source, strict: bool = True, *, adapter_name: str | None = None
    ) -> tuple[str, ...]:
        """Read an adapter and put it into a free slot, evicting the least recently used if need be.

        Args:
            name: new to the pool.
            source: PEFT's directory; ``(config, state_dict)``; a :class:`LoraAdapter`; or a PEFT
                model, or one with layers of :mod:`lora_ext.nn`, as if it had been saved.
            strict: False skips keys and fields that nothing uses.
            adapter_name: which adapter of a model; default is the one that is active.

        Returns:
            What was skipped; empty when strict.

        Raises:
            TypeError: ``strict`` is neither True nor False.
            ValueError: bad name or content, naming file, key, expected and found.
            NotImplementedError: a PEFT feature that the pool cannot apply.
            PoolFullError: every adapter that could make way is pinned.
        """
        self._residence.check_new(name)
        packed = self._read("load", source, strict, adapter_name)  # slow, so not under the lock
        with self._lock:
            self._residence.check_new(name)
            self._residence.install(name, packed)
            self._residence.counts["loads"] += 1
        return packed.leftover

    def update(
        self,
        name: str,
        source: Source | Mapping[str, Tensor],
        strict: bool = True,
        *,
        adapter_name: str | None = None,
    ) -> tuple[str, ...]:
        """Replace an adapter's weights: built in a new slot, then the name is moved there.

        Whoever has the old slot pinned keeps it, unchanged, until the last release.

        Args:
            name: in the pool.
            source: as for :meth:`load`, or a state dict alone, which keeps the config.
            strict, adapter_name: as for :meth:`load`.
        """
        with self._lock:
            config = self._residence.config_of(name)
        if isinstance(source, Mapping):
            source = (config, source)
        packed = self._read("update", source, strict, adapter_name)
        with self._lock:
            self._residence.check_known([name])
            self._residence.install(name, packed)
            self._residence.counts["loads"] += 1
        return packed.leftover

    def unload(self, name: str) -> None:
        """Forget a name. Its pages are free at once, or when the last pin is released."""
        with self._lock:
            self._residence.forget(name)

    def prefetch(
        self,
        sources: Mapping[str, Source] | Iterable[str | os.PathLike[str]],
        strict: bool = True,
    ) -> list[str]:
        """Read adapters into the host cache: their first :meth:`acquire` then copies, no more.

        Args:
            sources: name to source, or directories, each named by its last component.
            strict: as for :meth:`load`.

        Returns:
            The names. All of them are known afterwards, or none if one fails.
        """
        named: dict[str, Source]
        if isinstance(sources, Mapping):
            named = {str(name): source for name, source in sources.items()}
        else:
            named = {Path(path).name: path for path in sources}
        packed: dict[str, PackedAdapter] = {}
        for name, source in named.items():
            self._residence.check_new(name)
            packed[name] = self._read("prefetch", source, strict)
        size = sum(p.nbytes for p in packed.values())
        with self._lock:
            for name in packed:
                self._residence.check_new(name)
            limit = self.host_cache_bytes
            expected = f"at most host_cache_bytes={limit}"
            found = f"{size} bytes of pages"
            require(size <= limit, "AdapterPool.prefetch", "sources", expected, found)
            for name, adapter in packed.items():
                self._residence.cache.put(name, adapter)
        return list(packed)

    def _read(
        self, caller: str, source: Source, strict: bool, adapter_name: str | None = None
    ) -> PackedAdapter:
        require_flags(f"AdapterPool.{caller}", strict=strict)
        where = f"AdapterPool.{caller}: source"
        if isinstance(source, nn.Module):
            source = live_adapter(source, adapter_name, where)
        elif adapter_name is not None:
            kind = "LoraAdapter" if isinstance(source, LoraAdapter) else "directory or state dict"
            expected = f"expected None beside a {kind}, found {adapter_name!r}"
            raise ValueError(f"AdapterPool.{caller}: adapter_name: {expected}")
        elif isinstance(source, LoraAdapter):
            source = source.config, source.state_dict()
        packed = read_packed(source, self.index, self.max_rank, strict)
        self.base_models.meet(where, packed.config.base_model, stacklevel=3)
        return packed

    # ---------------------------------------------------------------------------------------------
    # Pins

    def acquire(self, names: Sequence[str | None]) -> Lease:
        """Pin one adapter per entry and return the slots; None and ``"__base__"`` give -1.

        An adapter that was evicted to the host cache is brought back. All or none are pinned.

        Raises:
            UnknownAdapterError: naming the name and its close matches.
            PoolFullError: an evicted adapter finds no room.
            RuntimeError: the current stream is capturing a graph.
        """
        if isinstance(names, str):
            raise TypeError(
                f"AdapterPool.acquire: names: expected a sequence of names, found {names!r}"
            )
        for transfer in self._store.transfers.values():
            transfer.check_outside_capture()
        with self._lock:
            return Lease(self, *self._residence.pin(names))

    def renew(self, lease: Lease) -> None:
        """Pin a released lease again; see :meth:`Lease.renew`."""
        with self._lock:
            if lease.released:
                self._residence.pin_again(lease.residents)
                lease.released = False

    def release(self, slots: Iterable[int]) -> None:
        """Undo one :meth:`acquire`: its lease, or any slots out of leases, one pin per entry."""
        with self._lock:
            leased = isinstance(slots, Lease)
            if leased:
                if slots.released or slots.pool is not self:
                    raise ValueError(
                        "AdapterPool.release: expected an unreleased lease of this pool"
                    )
                slots.released = True
            unpin = functools.partial(self._residence.unpin, list(slots), checked=leased)
            self._lock.at_end(unpin)

    def invocation(self, name: str) -> tuple[int, ...]:
        """Return the tokens with which an activated adapter begins; empty for other adapters.

        Raises:
            UnknownAdapterError: no adapter of that name.
        """
        with self._lock:
            return self._residence.config_of(name).invocation

    # ---------------------------------------------------------------------------------------------
    # Numbers

    @property
    def reserved_bytes(self) -> int:
        """Bytes taken from the devices so far: pages, tables, replaced modules."""
        with self._lock:
            return self._store.reserved_bytes

    @property
    def host_cache_bytes(self) -> int:
        """How much of what is evicted is kept in host memory; a change counts from the next
        eviction on."""
        return self._residence.cache.limit

    @host_cache_bytes.setter
    def host_cache_bytes(self, value: int) -> None:
        _check_host_cache_bytes(value)
        self._residence.cache.limit = value

    @property
    def limit_bytes(self) -> int:
        """Bytes of pages that the pool may come to: what to leave free for it."""
        return self._store.limit_bytes

    def nbytes(self) -> int:
        """Return the bytes taken for pages so far.

        They grow by at least eight pages of a module.
        """
        with self._lock:
            return self._store.page_bytes

    def stats(self) -> dict[str, Any]:
        """Return numbers of this moment.

        Returns:
            ``limit_bytes``, ``reserved_bytes`` and ``used_bytes``: what the pool may take, has
            taken from its devices (``page_bytes + table_bytes + replaced_bytes``), and what its
            adapters fill, those included that are pinned but have lost their name.

            ``adapters``: by name, a dict with ``rank`` (the largest of its modules), ``bytes``,
            ``pins`` and ``last_use`` (seconds since 1970, of the load or the last
            :meth:`acquire`); ``slot`` is None for one in the host cache, which has no ``last_use``
            either.

            The rest are counts: of slots, pins and pages (``pages_total``: as many as the modules
            that were touched may have), of the host cache, and of what has happened so far.
        """
        with self._lock:
            return self._residence.stats()

    def trim(self) -> int:
        """Give memory back to the devices, where adapters have left it.

        A page in use keeps all pages below it. A CUDA device waits for its queued work.

        Returns:
            how many bytes.
        """
        with self._lock:
            return self._store.trim()

    def __repr__(self) -> str:
        """Return the settings, and the memory that they mean."""
        count = len(self.names)
        return (
            f"AdapterPool(max_slots={self.max_slots}, max_rank={self.max_rank}, "
            f"pages={self.pages}; {len(self.modules)} modules: up to "
            f"{in_words(self.limit_bytes)} of pages, {in_words(self.nbytes())} so far; "
            f"{count} adapter{'s' * (count != 1)})"
        )


def _check_host_cache_bytes(value: int) -> None:
    expected = "a number of bytes, 0 or more"
    integer("AdapterPool", "host_cache_bytes", value, 0, expected=expected)
