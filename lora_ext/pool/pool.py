"""AdapterPool: many adapters of one base model in pages, exchanged while the model runs."""

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
    """List of pinned slot ids, -1 for the base model; a context manager that releases them."""

    def __init__(
        self, pool: AdapterPool, slots: Iterable[int] = (), residents: Sequence[Resident] = ()
    ):
        super().__init__(slots)
        self.pool = pool
        self.released = False
        self.residents = residents  # the pinned adapters

    @property
    def invocations(self) -> list[tuple[int, ...]]:
        """Tokens with which each pinned adapter begins; empty for ordinary adapters."""
        return [resident.invocation for resident in self.residents]

    def renew(self) -> None:
        """Pin the same adapters again after the release, for layers that a backward recomputes.

        Raises:
            RuntimeError: If an adapter was unloaded, updated or evicted since.
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
        model: the base model; only a weak reference to it is kept. Its linear and embedding layers
            are found by name.
        max_slots: most adapters on the device at once.
        max_rank: largest rank of any adapter in any module; use a multiple of 8 to save memory.
        pages: most pages of a module, or of each of its experts; default ``max_slots *
            ceil(max_rank / 8)``, so that any ``max_slots`` adapters fit. A page uses no memory
            before it is needed.
        dtype, device: dtype and device of the pages; default is those of each module.
        targets: modules that adapters may target (names, suffixes, or a regex); default all.
        host_cache_bytes: most bytes of evicted adapters that are kept in host memory.
        max_bytes: most bytes that the pool allocates on its devices for pages, tables and replaced
            modules together; above it the least recently used adapters are evicted. Default is no
            limit except ``pages``.

    Every method may be called from any thread. A method that raises does not change the pool. An
    adapter for another base model, by its configuration, is served with a warning.
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
            device = torch.empty(0, device=device).device  # raises for a missing device
        self.max_slots = max_slots
        self.max_rank = max_rank
        self.targets = targets if isinstance(targets, str | None) else tuple(targets)
        self.pages = pages if pages is not None else max_slots * page_count(max_rank)
        self.max_bytes = max_bytes
        self.index = ModelIndex.build(model, self.targets, dtype, device)
        self.base_models = BaseModels(model_name(model))
        self._store = PageStore(self.index, max_slots, max_rank, self.pages, max_bytes)
        self.modules = {name: self._store.modules[name] for name in self.index.modules}
        #: Slabs of the layer of an experts module, by the parameter's name.
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
        """Names of all adapters, on the device or in the host cache."""
        with self._lock:
            return self._residence.names

    def __contains__(self, name: object) -> bool:
        """Return whether the pool has an adapter with this name."""
        with self._lock:
            return name in self._residence

    def load(
        self, name: str, source: Source, strict: bool = True, *, adapter_name: str | None = None
    ) -> tuple[str, ...]:
        """Load an adapter into a free slot; evict the least recently used ones if necessary.

        Args:
            name: a name that the pool does not have.
            source: PEFT's directory; ``(config, state_dict)``; a :class:`LoraAdapter`; or a PEFT
                model, or one with layers of :mod:`lora_ext.nn`, as if it had been saved.
            strict: False skips unused keys and fields.
            adapter_name: the adapter of a model; default is the active one.

        Returns:
            The skipped keys and fields; empty if ``strict``.

        Raises:
            TypeError: If ``strict`` is neither True nor False.
            ValueError: If the name or content is invalid; the message contains file, key, expected
                and found.
            NotImplementedError: If the adapter uses a feature of PEFT that the pool lacks.
            PoolFullError: If all adapters that could be evicted are pinned.
        """
        self._residence.check_new(name)
        packed = self._read("load", source, strict, adapter_name)  # slow, so without the lock
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
        """Replace an adapter's weights: write them to a new slot, then move the name there.

        Leases of the old slot keep it, unchanged, until the last release.

        Args:
            name: name of the adapter in the pool.
            source: see :meth:`load`; or a state dict alone, which keeps the config.
            strict, adapter_name: see :meth:`load`.
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
        """Remove an adapter; its pages are freed at once, or with the release of the last pin."""
        with self._lock:
            self._residence.forget(name)

    def prefetch(
        self,
        sources: Mapping[str, Source] | Iterable[str | os.PathLike[str]],
        strict: bool = True,
    ) -> list[str]:
        """Read adapters into the host cache, so that their first :meth:`acquire` only copies them.

        Args:
            sources: name to source, or directories, each named by its last component.
            strict: see :meth:`load`.

        Returns:
            The names. Either all adapters are added, or none if one fails.
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

        An adapter that was evicted to the host cache is loaded again. Either all adapters are
        pinned or none.

        Raises:
            UnknownAdapterError: If a name is unknown; the message contains close matches.
            PoolFullError: If there is no room for an evicted adapter.
            RuntimeError: If the current stream is capturing a graph.
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
        """Release a lease of :meth:`acquire`, or any slots of leases, one pin per entry."""
        with self._lock:
            leased = isinstance(slots, Lease)
            if leased:
                if slots.released or slots.pool is not self:
                    found = "a released one" if slots.released else "one of another pool"
                    expected = "an unreleased lease of this pool"
                    raise ValueError(f"AdapterPool.release: expected {expected}, found {found}")
                slots.released = True
            unpin = functools.partial(self._residence.unpin, list(slots), checked=leased)
            self._lock.at_end(unpin)

    def invocation(self, name: str) -> tuple[int, ...]:
        """Return the tokens with which an activated adapter begins; empty for other adapters.

        Raises:
            UnknownAdapterError: If the pool has no such adapter.
        """
        with self._lock:
            return self._residence.config_of(name).invocation

    # ---------------------------------------------------------------------------------------------
    # Numbers

    @property
    def reserved_bytes(self) -> int:
        """Bytes allocated on the devices so far: pages, tables, replaced modules."""
        with self._lock:
            return self._store.reserved_bytes

    @property
    def host_cache_bytes(self) -> int:
        """Most bytes of evicted adapters in host memory; a change applies at the next eviction."""
        return self._residence.cache.limit

    @host_cache_bytes.setter
    def host_cache_bytes(self, value: int) -> None:
        _check_host_cache_bytes(value)
        self._residence.cache.limit = value

    @property
    def limit_bytes(self) -> int:
        """Most bytes of pages that the pool may allocate."""
        return self._store.limit_bytes

    def nbytes(self) -> int:
        """Return the bytes allocated for pages so far.

        They grow by at least eight pages of a module.
        """
        with self._lock:
            return self._store.page_bytes

    def stats(self) -> dict[str, Any]:
        """Return the current statistics.

        Returns:
            ``limit_bytes``, ``reserved_bytes`` and ``used_bytes``: the bytes that the pool may
            allocate, has allocated on its devices (``page_bytes + table_bytes + replaced_bytes``),
            and that its adapters use, including pinned adapters that were unloaded.

            ``adapters``: by name, a dict with ``rank`` (the largest of its modules), ``bytes``,
            ``pins`` and ``last_use`` (seconds since 1970, of the load or the last :meth:`acquire`);
            ``slot`` and ``last_use`` are None for an adapter in the host cache.

            All other values are counts: of slots, pins and pages (``pages_total``: the most pages
            of the modules targeted so far), of the host cache, and of events so far.
        """
        with self._lock:
            return self._residence.stats()

    def trim(self) -> int:
        """Free memory of pages that are no longer used.

        A page in use keeps all pages before it. A CUDA device waits for its queued work.

        Returns:
            The number of freed bytes.
        """
        with self._lock:
            return self._store.trim()

    def __repr__(self) -> str:
        """Return the settings and the resulting memory."""
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
