"""``AdapterPool``: adapters of one base model, loaded and evicted while the model runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
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
from lora_ext.rows import Entry, _entries

from ._pages import (
    PackedAdapter,
    in_one_mapping,
    in_words,
    page_count,
    read_packed,
    with_float8_pages,
)
from ._residence import Residence
from ._store import PageStore, Resident

Source = AdapterSource | LoraAdapter | nn.Module


class Lease(list[int]):
    """List of pinned slots, with -1 for the base model; a context manager that releases the pins.

    While an adapter is pinned, it is not evicted and its slot does not change.
    """

    def __init__(
        self, pool: AdapterPool, slots: Iterable[int] = (), residents: Sequence[Resident] = ()
    ):
        super().__init__(slots)
        self.pool = pool
        self.released = False
        self.residents = residents  # the pinned adapters

    @property
    def invocations(self) -> list[tuple[int, ...]]:
        """Tokens that activate each pinned adapter (aLoRA).

        The tuple is empty for adapters that apply to all tokens.
        """
        return [resident.invocation for resident in self.residents]

    def renew(self) -> None:
        """Pin the same adapters again after a release, for checkpointing in the backward pass.

        Raises:
            RuntimeError: If one of the adapters was unloaded, updated or evicted in the meantime.
        """
        self.pool.renew(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.released:
            self.pool.release(self)


class AdapterPool:
    """LoRA adapters of one base model, addressed by slot and stored in pages of eight ranks.

    Every adapter on the device has a slot, which is its index in the tables of all modules. Its
    factors are stored in pages, each with eight consecutive ranks of one module.

    Args:
        model: base model, of which the pool keeps only a weak reference. Adapters refer to its
            linear and embedding layers by name.
        max_slots: maximum number of adapters on the device at the same time.
        max_rank: largest rank of any adapter in any module; a multiple of 8 wastes no memory.
        pages: maximum number of pages per module, or per expert of an experts module; default is
            ``max_slots * ceil(max_rank / 8)``, so that any ``max_slots`` adapters fit. Memory is
            allocated when pages are first used.
        dtype, device: dtype and device of the pages; default is the dtype and device of each
            module. ``torch.float8_e4m3fn`` (ordinary adapters up to rank 256) takes half the bytes
            of 16 bits, but rounds each value to 4 significant bits.
        targets: modules that adapters may target (names, suffixes, or a regex); default is all.
        host_cache_bytes: maximum bytes of evicted adapters that are kept in host memory.
        max_bytes: maximum bytes that the pool allocates on its devices for pages, tables and
            replaced modules in total. To stay below it, the pool evicts the least recently used
            adapters. By default, only ``pages`` limits the memory.

    Every method may be called from any thread. A method that raises does not change the pool. If
    the configuration of an adapter names another base model, the adapter is loaded with a warning.
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
            device = torch.empty(0, device=device).device  # raises if the device does not exist
        self.max_slots = max_slots
        self.max_rank = max_rank
        self.targets = targets if isinstance(targets, str | None) else tuple(targets)
        self.pages = pages if pages is not None else max_slots * page_count(max_rank)
        self.max_bytes = max_bytes
        float8 = dtype == torch.float8_e4m3fn
        index = ModelIndex.build(model, self.targets, None if float8 else dtype, device)
        self.index = with_float8_pages(index, max_rank) if float8 else index
        self.base_models = BaseModels(model_name(model))
        self._store = PageStore(self.index, max_slots, max_rank, self.pages, max_bytes)
        self.modules = {name: self._store.modules[name] for name in self.index.modules}
        #: Slabs (pages and tables) of the parameters of experts modules, by parameter name.
        self.experts = {name: self._store.modules[name] for name in self.index.experts}
        self._residence = Residence(self._store, host_cache_bytes)
        self._lock = self._residence.lock

    def __reduce__(self) -> NoReturn:
        """Raise TypeError, because slots and pins belong to one process."""
        raise TypeError(
            "AdapterPool: a pool cannot be copied, pickled or saved with torch.save; save the "
            "model's state_dict, or detach the model first"
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
        """Load an adapter into a free slot; evict the least recently used adapters if necessary.

        Args:
            name: new name, not used by another adapter of the pool.
            source: directory in PEFT's format; pair ``(config, state_dict)``;
                :class:`LoraAdapter`; or a model with adapter layers of PEFT or :mod:`lora_ext.nn`,
                whose adapter is read as PEFT would save it.
            strict: whether unused keys or config fields raise ValueError; if False, skip them.
            adapter_name: name of the adapter to read if ``source`` is a model; default is the
                active adapter.

        Returns:
            The skipped keys and fields; empty if ``strict``.

        Raises:
            TypeError: If ``strict`` is neither True nor False.
            ValueError: If the name or content is invalid. The message contains the file, the key,
                and the expected and found values.
            NotImplementedError: If the adapter uses a feature of PEFT that the pool lacks.
            PoolFullError: If there is no room because other adapters are pinned.
        """
        self._residence.check_new(name)
        packed = self._read("load", source, strict, adapter_name)  # slow, so without the lock
        with self._lock:
            self._residence.check_new(name)
            return self._install(name, packed)

    def update(
        self,
        name: str,
        source: Source | Mapping[str, Tensor],
        strict: bool = True,
        *,
        adapter_name: str | None = None,
    ) -> tuple[str, ...]:
        """Replace an adapter: write the new weights to another slot, then assign the name to it.

        The old slot keeps the old weights until the last existing lease of it is released.

        Args:
            name: name of an adapter in the pool.
            source: see :meth:`load`; or only a state dict, which is read with the current config.
            strict, adapter_name: see :meth:`load`.
        """
        with self._lock:
            config = self._residence.config_of(name)
        if isinstance(source, Mapping):
            source = (config, source)
        packed = self._read("update", source, strict, adapter_name)
        with self._lock:
            self._residence.check_known([name])
            return self._install(name, packed)

    def _install(self, name: str, packed: PackedAdapter) -> tuple[str, ...]:
        self._residence.install(name, packed)
        self._residence.counts["loads"] += 1
        return packed.leftover

    def unload(self, name: str) -> None:
        """Remove an adapter. If it is pinned, its pages are freed when the last pin is released."""
        with self._lock:
            self._residence.forget(name)

    def prefetch(
        self,
        sources: Mapping[str, Source] | Iterable[str | os.PathLike[str]],
        strict: bool = True,
    ) -> list[str]:
        """Read adapters into the host cache, so that their first :meth:`acquire` only copies them.

        If one adapter fails, no adapter is added.

        Args:
            sources: mapping from name to source, or paths of directories, whose last components
                are the names of the adapters.
            strict: see :meth:`load`.

        Returns:
            The names of the adapters.
        """
        named: dict[str, Source]
        if isinstance(sources, Mapping):
            named = {str(name): source for name, source in sources.items()}
        else:
            named = {Path(path).name: path for path in sources}
        packed: dict[str, PackedAdapter] = {}
        for name, source in named.items():
            self._residence.check_new(name)
            packed[name] = in_one_mapping(self._read("prefetch", source, strict))
        size = sum(p.nbytes for p in packed.values())
        with self._lock:
            for name in packed:
                self._residence.check_new(name)
            limit = self.host_cache_bytes
            expected = f"at most host_cache_bytes={limit}"
            found = f"{size} bytes of pages"
            require(size <= limit, "AdapterPool.prefetch", "sources", expected, found)
            for name, adapter in packed.items():
                numbered = replace(adapter, generation=next(self._residence.generations))
                self._residence.cache.put(name, numbered)
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
            expected = f"expected None if source is a {kind}, found {adapter_name!r}"
            raise ValueError(f"AdapterPool.{caller}: adapter_name: {expected}")
        elif isinstance(source, LoraAdapter):
            source = source.config, source.state_dict()
        packed = read_packed(source, self.index, self.max_rank, strict)
        self.base_models.meet(where, packed.config.base_model, stacklevel=3)
        return packed

    # ---------------------------------------------------------------------------------------------
    # Pins

    def acquire(self, names: Sequence[Entry]) -> Lease:
        """Pin one adapter per entry and return the slots, with -1 for None and ``"__base__"``.

        An adapter that was evicted to the host cache is copied back to the device. If the method
        raises, no adapter is pinned.

        An entry may also be ``(name, weight)``, which has the slot of the adapter, or a mixture
        ``{name: weight, ...}``. A mixture of two or more adapters has a slot without pages, which
        all mixtures of the same adapters share. This slot is freed if an adapter of the mixture is
        updated, unloaded or evicted, or if another adapter needs the slot. Adapters of a pinned
        mixture are pinned, too.

        Raises:
            UnknownAdapterError: If a name is unknown; the message contains close matches.
            TypeError, ValueError: If an entry or its weight is invalid; ValueError also if the
                adapters of a mixture together need more than ``ceil(max_rank / 8)`` pages.
            NotImplementedError: If an adapter that rescales or replaces modules is in a mixture or
                has a weight other than 1, or an aLoRA adapter is in a mixture.
            PoolFullError: If the device has no room for an evicted adapter.
            RuntimeError: If the current stream is capturing a graph.
        """
        where = "AdapterPool.acquire: names"
        if isinstance(names, str | Mapping):
            raise TypeError(f"{where}: expected a sequence of names, found {names!r:.200}")
        each: list[Any] = list(names)
        width, weighted, given = 0, set[Any](), list[str]()
        for i, entry in enumerate(each):
            if not _entries.is_plain(entry):
                members = _entries.members_of(entry, where)
                given += _entries.names_in(entry)
                each[i] = name = _entries.name_of(members)
                width = max(width, len(members))
                if len(members) == 1 and members[0][1] != 1:
                    weighted.add(name)
        for transfer in self._store.transfers.values():
            transfer.check_outside_capture()
        with self._lock:
            self._residence.check_known(given, where)  # also names with a weight of 0
            lease = Lease(self, *self._residence.pin(each, weighted))
            self._store.mix(width)
            return lease

    def prepare_mixtures(self, width: int = 2) -> None:
        """Prepare layers and compiled graphs for ``width`` weights per row of a batch.

        Without this call, the first mixture allocates the tables of mixtures. A captured graph
        needs them earlier, so :func:`lora_ext.capturable` calls this method.

        Raises:
            PoolFullError: If ``max_bytes`` leaves no room.
        """
        with self._lock:
            if width > 1:
                self._residence.prepare_mixtures()
            self._store.mix(width)

    def renew(self, lease: Lease) -> None:
        """Pin a released lease again; see :meth:`Lease.renew`."""
        with self._lock:
            if lease.released:
                self._residence.pin_again(lease.residents)
                lease.released = False

    def release(self, slots: Iterable[int]) -> None:
        """Remove one pin per entry of a lease or of any other iterable of pinned slots."""
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
        """Return the tokens that activate an aLoRA adapter, or an empty tuple for other adapters.

        Raises:
            UnknownAdapterError: If the pool has no such adapter.
        """
        with self._lock:
            return self._residence.config_of(name).invocation

    def generation(self, name: str) -> int | None:
        """Return the generation of an adapter, or None if the pool has no such adapter.

        The generation is a number that each load, update or prefetch sets to a larger value than
        all earlier ones in this pool. An eviction to the host cache does not change it.
        """
        with self._lock:
            return self._residence.generation_of(name)

    # ---------------------------------------------------------------------------------------------
    # Numbers

    @property
    def reserved_bytes(self) -> int:
        """Bytes that are allocated on the devices for pages, tables and replaced modules."""
        with self._lock:
            return self._store.reserved_bytes

    @property
    def host_cache_bytes(self) -> int:
        """Maximum bytes of evicted adapters in host memory; can be set.

        A new value takes effect at the next eviction.
        """
        return self._residence.cache.limit

    @host_cache_bytes.setter
    def host_cache_bytes(self, value: int) -> None:
        _check_host_cache_bytes(value)
        self._residence.cache.limit = value

    @property
    def limit_bytes(self) -> int:
        """Maximum bytes that the pool may allocate for pages."""
        return self._store.limit_bytes

    def nbytes(self) -> int:
        """Return the number of bytes that are allocated for pages.

        If there is room, a module's allocation grows in steps of at least eight pages.
        """
        with self._lock:
            return self._store.page_bytes

    def stats(self) -> dict[str, Any]:
        """Return statistics of slots, memory, adapters and past events.

        Returns:
            A dict with these keys:

            ``limit_bytes``: maximum bytes of pages; ``reserved_bytes``: bytes allocated on the
            devices, the sum of ``page_bytes``, ``table_bytes`` and ``replaced_bytes``;
            ``used_bytes``: bytes that adapters use, including pinned adapters that were unloaded.

            ``adapters``: a dict for each name, with ``rank`` (the largest of its modules),
            ``bytes``, ``pins``, ``slot``, and ``last_use``, the time of the load or of the last
            :meth:`acquire` in seconds since 1970. ``slot`` and ``last_use`` are None for an adapter
            in the host cache.

            All other values are numbers of slots, pins and pages (``pages_total`` is the maximum
            number of pages of all modules that were targeted so far), of adapters and bytes in the
            host cache, and of past events.
        """
        with self._lock:
            return self._residence.stats()

    def trim(self) -> int:
        """Free the memory after the last used page of each module.

        On a CUDA device, this method waits for the queued work.

        Returns:
            The number of freed bytes.
        """
        with self._lock:
            return self._store.trim()

    def __repr__(self) -> str:
        """Return a string with the settings, the bytes of pages and the number of adapters."""
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
