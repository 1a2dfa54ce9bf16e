"""How much a pool may take: what its arguments may be, and what they come to in bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_ext._checks import integer

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
        integer("AdapterPool", argument, value, 1, expected=("an integer", "at least 1"))
    check_host_cache_bytes(host_cache_bytes)


def check_host_cache_bytes(host_cache_bytes: int) -> None:
    """Refuse what is no number of bytes."""
    expected = "a number of bytes, 0 or more"
    integer("AdapterPool", "host_cache_bytes", host_cache_bytes, 0, expected=expected)


def limit_bytes(pool: AdapterPool) -> int:
    """All ``pages`` of every module, or ``max_bytes`` where that is less."""
    specs = pool.index.specs.values()
    pages = sum(pool.pages * spec.experts * page_bytes(spec) for spec in specs)
    return pages if pool.max_bytes is None else min(pages, pool.max_bytes)
