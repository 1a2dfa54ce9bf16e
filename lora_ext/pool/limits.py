"""How much a pool may take: what its arguments may be, and what they come to in bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .pages import page_bytes

if TYPE_CHECKING:
    from .pool import AdapterPool


def check_limits(
    max_slots: int, max_rank: int, pages: int | None, max_bytes: int | None, host_cache_bytes: int
) -> None:
    """Refuse what is no number of slots, ranks, pages or bytes, as :class:`AdapterPool` says."""
    given = {"max_slots": max_slots, "max_rank": max_rank, "pages": pages, "max_bytes": max_bytes}
    for argument, value in given.items():
        if argument in ("pages", "max_bytes") and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"AdapterPool: {argument}: expected an integer, found {value!r}")
        if value < 1:
            raise ValueError(f"AdapterPool: {argument}: expected at least 1, found {value}")
    check_host_cache_bytes(host_cache_bytes)


def check_host_cache_bytes(host_cache_bytes: int) -> None:
    """Refuse what is no number of bytes."""
    counted = isinstance(host_cache_bytes, int) and not isinstance(host_cache_bytes, bool)
    if not counted or host_cache_bytes < 0:
        raise ValueError(
            "AdapterPool: host_cache_bytes: expected a number of bytes, 0 or more, "
            f"found {host_cache_bytes!r}"
        )


def limit_bytes(pool: AdapterPool) -> int:
    """All ``pages`` of every module, or ``max_bytes`` where that is less."""
    specs = pool.index.specs.values()
    pages = sum(pool.pages * spec.experts * page_bytes(spec) for spec in specs)
    return pages if pool.max_bytes is None else min(pages, pool.max_bytes)
