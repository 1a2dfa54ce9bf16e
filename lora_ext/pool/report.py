"""What a pool says about itself: numbers for a monitor, a line for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .limits import limit_bytes
from .packing import PackedAdapter
from .pages import in_words

if TYPE_CHECKING:
    from .pool import AdapterPool
    from .residence import Residence
    from .store import PageStore, Resident


def stats(pool: AdapterPool, store: PageStore, residence: Residence, loads: int) -> dict[str, Any]:
    """Numbers of this moment.

    Returns:
        ``limit_bytes``, ``reserved_bytes`` and ``used_bytes``: what the pool may take, has taken
        from its devices (``page_bytes + table_bytes + replaced_bytes``), and what its adapters
        fill, those included that are pinned but have lost their name.

        ``adapters``: by name, a dict with ``rank`` (the largest of its modules), ``bytes``,
        ``pins`` and ``last_use`` (seconds since 1970, of the load or the last :meth:`acquire`);
        ``slot`` is None for one in the host cache, which has no ``last_use`` either.

        The rest are counts: of slots, pins and pages (``pages_total``: as many as the modules that
        were touched may have), of the host cache, and of what has happened so far.
    """
    cache = residence.cache
    live = [r for r in store.residents if r is not None]
    return {
        "slots_used": len(live),
        "slots_pinned": sum(r.pins > 0 for r in live),
        "pins": sum(r.pins for r in live),
        "modules_targeted": len(store.slabs),
        "pages_total": sum(slab.pages for slab in store.slabs.values()),
        "pages_free": sum(len(slab.free) for slab in store.slabs.values()),
        "limit_bytes": limit_bytes(pool),
        "reserved_bytes": store.reserved_bytes,
        "used_bytes": sum(r.nbytes for r in live),
        "page_bytes": store.page_bytes,
        "table_bytes": store.table_bytes,
        "replaced_bytes": store.replaced_bytes,
        "cached": len(cache),
        "cache_bytes": cache.nbytes,
        "loads": loads,
        **residence.counts,
        "dropped": cache.dropped,
        "adapters": {name: _on_device(resident) for name, resident in residence.by_name.items()}
        | {name: _on_host(adapter) for name, adapter in cache.items()},
    }


def _on_device(resident: Resident) -> dict[str, Any]:
    return {
        "rank": resident.rank,
        "bytes": resident.nbytes,
        "pins": resident.pins,
        "last_use": resident.last_use,
        "slot": resident.slot,
    }


def _on_host(adapter: PackedAdapter) -> dict[str, Any]:
    return {
        "rank": adapter.rank,
        "bytes": adapter.nbytes,
        "pins": 0,
        "last_use": None,
        "slot": None,
    }


def summary(pool: AdapterPool) -> str:
    """Settings, and the memory that they mean."""
    count = len(pool.names)
    return (
        f"AdapterPool(max_slots={pool.max_slots}, max_rank={pool.max_rank}, "
        f"pages={pool.pages}; {len(pool.modules)} modules: up to "
        f"{in_words(limit_bytes(pool))} of pages, {in_words(pool.nbytes())} so far; "
        f"{count} adapter{'s' * (count != 1)})"
    )
