"""Choice of the slot, pages and memory for a new adapter, and of the adapters to evict for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lora_ext.adapter import Replaced
from lora_ext.rows import Name, _entries

from ._pages import VECTORS, PackedAdapter, Slab, TableBlock, in_words
from ._store import NO_SLOT, PageStore, Placement, Resident

_AHEAD = 8  # the memory of a module grows in steps of this many pages, which is 64 ranks


class PoolFullError(RuntimeError):
    """Error for an adapter that does not fit in the pool in addition to the pinned adapters.

    Attributes:
        final: True if the adapter does not fit even if all other adapters are evicted.
    """

    final = False


class _TooLarge(PoolFullError):
    final = True


def find_place(
    store: PageStore, name: Name, packed: PackedAdapter, order: Iterable[Resident]
) -> Placement:
    """Choose the slot and the pages of an adapter, and the victims (the adapters to evict for it).

    Victims are chosen in ``order``; pinned adapters are skipped.

    Raises:
        PoolFullError: If there is no room. The message names the missing slots, pages or bytes, the
            pinned adapters and a remedy.
    """
    need = {module: part.a.shape[0] for module, part in packed.modules.items()}
    for module, count in need.items():
        experts = store.index.specs[module].experts
        if count > store.pages * experts:
            needs = f"{name!r} needs {count // experts} pages of {module}"
            has = f"the pool has pages={store.pages}; create the pool with a larger pages="
            raise _TooLarge(f"AdapterPool: {needs}, but {has}")
    search = _Search(store, need, packed, name)
    what = repr(name) if name else "making room for mixtures"
    victims: list[Resident] = []
    slots = store.free_slots if name else [NO_SLOT]  # name () allocates tables, but no slot
    for resident in order:
        lacking, missing = search.lacking(), search.missing_bytes()
        if slots and not lacking and not missing:
            break
        if resident.pins or (slots and not missing and lacking.isdisjoint(resident.pages)):
            continue  # pinned, or without pages in the modules that lack pages
        victims.append(resident)
        slots = [*slots, resident.slot]
        search.without(resident)
    wanted = [] if slots else [f"one of max_slots={store.max_slots} slots"]
    for module in sorted(search.lacking())[:3]:
        found = len(search.free[module])
        wanted.append(f"{need[module]} pages of {module} ({found} can be freed)")
    if not wanted and search.missing_bytes():
        wanted.append(f"{in_words(search.missing_bytes())} more than max_bytes leaves")
    if wanted:
        for resident in [r for r in store.residents if r is not None and r not in victims]:
            search.without(resident)
        if (missing := search.missing_bytes()) and store.max_bytes is not None:
            raise _TooLarge(
                f"AdapterPool: {what} needs {store.max_bytes + missing} bytes of pages and "
                "tables, even if all other adapters are evicted, found "
                f"max_bytes={store.max_bytes}; create the pool with a larger max_bytes="
            )
        pinned = [r for r in store.residents if r is not None and r.pins]
        names = sorted({r.name for r in pinned if isinstance(r.name, str)})  # not mixtures
        held = in_words(sum(r.nbytes for r in pinned))
        limit = "no max_bytes" if store.max_bytes is None else f"max_bytes={store.max_bytes}"
        count = f"{len(names)} adapter{'s' * (len(names) != 1)}"
        others = f"the rest is pinned, by {count}: {names[:8]}"
        raise PoolFullError(
            f"AdapterPool: {what} needs {' and '.join(wanted)}, but "
            f"{others if names else 'there is no adapter to evict'}. With max_slots="
            f"{store.max_slots}, pages={store.pages} and {limit}, "
            f"{in_words(store.reserved_bytes)} are reserved, {held} of it pinned; release leases "
            "and leave blocks, or create a larger pool"
        )
    return search.placement(slots[-1], victims, packed)


class _Search:
    """Free pages and bytes that a store would have after the eviction of the victims so far."""

    def __init__(self, store: PageStore, need: dict[str, int], packed: PackedAdapter, name: Name):
        self.store, self.need = store, need  # number of needed pages by module
        specs = store.index.specs
        self.new = {
            m: Slab(specs[m], store.pages * specs[m].experts) for m in need.keys() - store.slabs
        }
        self.slabs = store.slabs | self.new
        self.free = {module: list(self.slabs[module].free) for module in need}
        together: dict[tuple[torch.device, int], list[str]] = {}
        for module in self.new:
            together.setdefault((specs[module].device, specs[module].experts), []).append(module)
        blocks = [
            TableBlock(names, store.max_slots, store.max_pages, device, experts)
            for (device, experts), names in together.items()
        ]
        vectors = _new_vectors(store, packed)
        mixed: list[tuple[TableBlock, tuple[Tensor, ...]]] = []
        members: dict[torch.device, Tensor] = {}
        if (isinstance(name, tuple) or store.float8) and not store.members:
            mixed = [(block, block.new_mixed()) for block in store.blocks]
            shape = store.max_slots, _entries.MAX_MEMBERS
            for device in store.transfers:
                members[device] = torch.full(shape, -1, dtype=torch.int32, device=device)
        if store.members or members:
            for block in blocks:
                block.mixed = block.new_mixed()
        self.tables = blocks, vectors, mixed, members
        new = [*blocks, *vectors.values(), *members.values(), *packed.replaced.values()]
        new += [table for _, pair in mixed for table in pair]
        self.others = store.table_bytes + store.replaced_bytes + sum(each.nbytes for each in new)

    def lacking(self) -> set[str]:
        """Return the modules with too few free pages."""
        return {module for module, count in self.need.items() if len(self.free[module]) < count}

    def missing_bytes(self) -> int:
        """Return by how many bytes the new adapter makes the pool exceed ``max_bytes``.

        The memory of every module is assumed to end at its last used page.
        """
        limit = self.store.max_bytes
        if limit is None or self.lacking():
            return 0
        return max(0, sum(self._least(m) for m in self.slabs) + self.others - limit)

    def _least(self, module: str, round_up: int = 1) -> int:
        slab = self.slabs[module]
        free = self.free.get(module, slab.free)
        return slab.bytes_for(free[: len(free) - self.need.get(module, 0)], round_up)

    def without(self, resident: Resident) -> None:
        """Add the pages and bytes of a resident to the free ones."""
        self.others -= self.store.replaced_bytes_of(resident.slot)
        for module, pages in resident.pages.items():
            free = self.free.get(module, self.store.slabs[module].free)
            self.free[module] = sorted([*free, *pages], reverse=True)

    def placement(self, slot: int, victims: list[Resident], packed: PackedAdapter) -> Placement:
        """Return the placement of the new adapter in ``slot``, once the victims are evicted."""
        sizes = self._sizes()
        pages = {m: [self.free[m].pop() for _ in range(count)] for m, count in self.need.items()}
        rooms = {m: _room_for(self.store, m, whole) for m, whole in packed.replaced.items()}
        return Placement(
            slot, pages, {}, [], self.free, victims, self.new, *self.tables, rooms, sizes
        )

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Return the bytes of pages before and after the placement, for modules that change.

        Memory grows in steps of `_AHEAD` pages if this does not exceed ``max_bytes``, and otherwise
        by the pages that are needed. If even these exceed the limit, the memory of every module is
        cut off after its last used page.
        """
        kept = {module: slab.memory.backed for module, slab in self.slabs.items()}
        ahead, exact = (
            kept | {module: max(kept[module], self._least(module, step)) for module in self.need}
            for step in (_AHEAD, 1)
        )
        trimmed = {module: self._least(module) for module in self.slabs}
        limit = self.store.max_bytes
        fits = (
            s for s in (ahead, exact) if limit is None or sum(s.values()) + self.others <= limit
        )
        sizes = next(fits, trimmed)
        return {m: (kept[m], size) for m, size in sizes.items() if size != kept[m]}


def _room_for(store: PageStore, module: str, whole: Replaced) -> Replaced:
    device = store.index.modules[module].device
    try:
        return whole.each(lambda t: torch.empty_like(t, device=device))
    except RuntimeError as error:  # includes torch.OutOfMemoryError
        raise MemoryError(
            f"AdapterPool: expected {in_words(whole.nbytes)} of memory for an adapter that "
            f"replaces module {module}, found less ({error}); unload other adapters"
        ) from error


def _new_vectors(store: PageStore, packed: PackedAdapter) -> dict[tuple[str, str], Tensor]:
    """Return new tables by module and field, for an adapter's vectors without a table so far."""
    found = {}
    for module, part in packed.modules.items():
        device = store.index.specs[module].device
        for name in VECTORS:
            own, before = getattr(part, name), name == "before"  # with a row for the base model
            if own is not None and getattr(store.modules[module], name) is None:
                shape = store.max_slots + before, len(own)
                table = torch.full(shape, int(before), dtype=own.dtype, device=device)
                found[module, name] = table
    return found


def resize(store: PageStore, place: Placement) -> None:
    """Resize the memory of pages for a placement. Only the victims lose pages.

    Raises:
        MemoryError: If a device has no room. Call :func:`set_sizes` to undo the changes.
    """
    try:
        set_sizes(store, place, {module: after for module, (_, after) in place.sizes.items()})
    except RuntimeError as error:
        more = in_words(sum(after - before for before, after in place.sizes.values()))
        raise MemoryError(
            f"AdapterPool: expected room for {more} of pages in addition to the "
            f"{in_words(store.reserved_bytes)} that are reserved, found less ({error}); unload "
            "adapters, or pass max_bytes= to evict adapters above this limit"
        ) from error


def set_sizes(store: PageStore, place: Placement, sizes: dict[str, int]) -> None:
    """Set the allocated bytes of each module's pages. Earlier sizes undo a call of :func:`resize`.

    Raises:
        RuntimeError: If a device has no room.
    """
    slabs = store.slabs | place.slabs
    # Shrink modules first, so that others can grow into the freed memory.
    for module, size in sorted(sizes.items(), key=lambda s: s[1] - slabs[s[0]].memory.backed):
        slabs[module].memory.resize(size)
