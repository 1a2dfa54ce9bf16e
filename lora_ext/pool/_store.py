"""Slots, pages and tables of a pool on the device. ``_residence.py`` manages adapters by name.

A new adapter is written to pages and a slot that no forward uses. Afterwards the pool publishes the
adapter: it assigns the name to the slot. The pool holds its lock during every method of this file.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_ext.adapter import AdapterConfig, ModelIndex, Replaced
from lora_ext.rows import Name

from ._memory import give_back
from ._pages import (
    VECTORS,
    ModuleSlab,
    PackedAdapter,
    PackedModule,
    Scaled,
    Slab,
    TableBlock,
    TableRow,
    page_bytes,
    page_count,
)
from ._transfer import StreamTransfer, Transfer, to_host

Written = list[tuple[Transfer, Any]]  # copies that may still be queued


NO_SLOT = -1
serials = itertools.count(1)  # numbers of versions of adapters, and of their weights in requests


@dataclass
class Resident:
    """Adapter in a slot, or a mixture of the adapters ``members``, which have other slots.

    After publication, only ``written``, ``last_use``, ``pins`` and ``retired`` change.
    """

    name: Name
    slot: int
    config: AdapterConfig
    pages: dict[str, list[int]]  # by module
    rank: int  # largest rank in any module
    nbytes: int
    rows: dict[str, TableRow]
    invocation: tuple[int, ...] = ()  # tokens that activate an aLoRA adapter
    written: Written = field(default_factory=list)  # emptied when all copies are done
    last_use: float = field(default_factory=time.time)  # time of the load or the last acquire
    pins: int = 0
    retired: bool = False  # no name refers to this slot any more; removing the last pin frees it
    #: Modules whose outputs the adapter scales, and whether it scales the bias, too.
    scaled: dict[str, bool] = field(default_factory=dict)
    befores: frozenset[str] = frozenset()  # modules whose inputs the adapter scales
    generation: int = 0  # number of the load; a return from host memory does not change it
    members: tuple[Resident, ...] = ()
    #: Number of this version of the adapter, unique in the process.
    serial: int = field(default_factory=serials.__next__)


@dataclass
class Placement:
    """Slot, pages and memory of a new adapter, chosen before the store is changed."""

    slot: int  # NO_SLOT if only tables are allocated
    pages: dict[str, list[int]]
    rows: dict[str, TableRow] = field(default_factory=dict)
    of_members: list[int] = field(default_factory=list)  # slots of the adapters of a mixture
    free: dict[str, list[int]] = field(default_factory=dict)  # free pages after `commit`
    victims: list[Resident] = field(default_factory=list)
    # The next six fields contain new memory, which `commit` adds to the store.
    slabs: dict[str, Slab] = field(default_factory=dict)
    blocks: list[TableBlock] = field(default_factory=list)
    #: Tables of vectors by module and field of :class:`ModuleSlab`.
    vectors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    mixed: list[tuple[TableBlock, tuple[Tensor, ...]]] = field(default_factory=list)
    members: dict[torch.device, Tensor] = field(default_factory=dict)
    replaced: dict[str, Replaced] = field(default_factory=dict)
    #: Bytes of pages before and after the placement, for the modules in which they change.
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


class PageStore:
    """Memory for up to ``max_slots`` adapters, with ``pages`` pages per module.

    The addresses of a module's pages are reserved when the first adapter targets the module. Memory
    for the pages is allocated when they are used, at most ``max_bytes`` in total.
    """

    def __init__(
        self, index: ModelIndex, max_slots: int, max_rank: int, pages: int, max_bytes: int | None
    ):
        self.max_bytes = max_bytes
        self.index = index
        self.max_slots = max_slots
        self.pages = pages
        self.modules = {
            name: ModuleSlab(
                spec.in_features, spec.out_features, spec.dtype, spec.float8, experts=spec.experts
            )
            for name, spec in index.specs.items()
        }
        #: Whether pages have scales, so that the tables of mixtures are needed from the start.
        self.float8 = any(spec.float8 for spec in index.specs.values())
        self.residents: list[Resident | None] = [None] * max_slots
        self.slabs: dict[str, Slab] = {}
        self.blocks: list[TableBlock] = []
        self._replacing: set[str] = set()  # modules that any adapter has replaced so far
        self.max_rank, self.max_pages = max_rank, page_count(max_rank)
        self.free_slots = list(range(max_slots - 1, -1, -1))  # the last one is used next
        devices = {spec.device for spec in index.specs.values()}
        #: :attr:`ModuleSlab.members` by device; empty before the first mixture.
        self.members: dict[torch.device, Tensor] = {}
        self.mixed = 0  # see ModuleSlab
        self.transfers = {
            device: StreamTransfer(device) if device.type == "cuda" else Transfer()
            for device in devices
        }

    # ---------------------------------------------------------------------------------------------
    # Numbers

    @property
    def page_bytes(self) -> int:
        """Bytes allocated on the devices for pages."""
        return sum(slab.memory.backed for slab in self.slabs.values())

    @property
    def table_bytes(self) -> int:
        """Bytes allocated on the devices for tables and vectors."""
        vectors = [getattr(view, name) for view in self.modules.values() for name in VECTORS]
        vector_bytes = sum(v.nbytes for v in vectors if v is not None)
        vector_bytes += sum(table.nbytes for table in self.members.values())
        return vector_bytes + sum(block.nbytes for block in self.blocks)

    @property
    def replaced_bytes(self) -> int:
        """Bytes of the weights and biases that adapters use in place of the base model's."""
        return sum(self.replaced_bytes_of(slot) for slot in range(self.max_slots))

    def replaced_bytes_of(self, slot: int) -> int:
        """Return the bytes of the weights and biases that one slot uses in place of the base's."""
        wholes = [self.modules[name].replaced.get(slot) for name in self._replacing]
        return sum(whole.nbytes for whole in wholes if whole)

    @property
    def reserved_bytes(self) -> int:
        """Bytes allocated on the devices in total."""
        return self.page_bytes + self.table_bytes + self.replaced_bytes

    @property
    def limit_bytes(self) -> int:
        """Bytes of ``pages`` pages in every module, or ``max_bytes`` if this is smaller."""
        specs = self.index.specs.values()
        pages = sum(self.pages * spec.experts * page_bytes(spec) for spec in specs)
        return pages if self.max_bytes is None else min(pages, self.max_bytes)

    def trim(self) -> int:
        """Free the memory after the last used page of each module; return the freed bytes."""
        give_back()
        before = self.page_bytes
        for slab in self.slabs.values():
            slab.memory.resize(slab.bytes_for(slab.free))
        return before - self.page_bytes

    # ---------------------------------------------------------------------------------------------
    # Copies

    def upload(self, packed: PackedAdapter, place: Placement) -> Written:
        """Write an adapter's pages, and the rows of its slot in every table.

        The weights of replaced modules are written only if the placement contains memory for them.

        Returns:
            The copies, which may still be queued, for :attr:`Resident.written`. If the placement
            contains new tables or pages, this method waits until the copies are done, because
            forwards with other slots read these tensors, too.
        """
        slot, slabs = place.slot, self.slabs | place.slabs
        jobs: dict[torch.device, list[tuple[Tensor, Tensor]]] = {d: [] for d in self.transfers}
        for module, part in packed.modules.items():
            slab = slabs[module]
            for i, page in enumerate(place.pages[module]):
                jobs[slab.a.device] += [(slab.a[page], part.a[i]), (slab.b[page], part.b[i])]
        for module in slabs if slot != NO_SLOT else ():
            part, view = packed.modules.get(module), self.modules[module]
            for name in VECTORS:
                table = place.vectors.get((module, name), getattr(view, name))
                if table is None:
                    continue
                row, own = table[slot], part and getattr(part, name)
                if own is None:
                    kind = {"dtype": row.dtype, "device": "cpu", "pin_memory": row.is_cuda}
                    own = torch.full(row.shape, int(name == "before"), **kind)
                jobs[table.device].append((row, own))
        everyone = [(slot, place.rows, place.of_members)] if slot != NO_SLOT else []
        for block in (*self.blocks, *place.blocks):
            for other, rows, _ in everyone:
                jobs[block.ranks.device] += block.copies(other, rows)
        if place.members:  # new tables
            known = [r for r in self.residents if r is not None and r.slot != slot]
            everyone += [(r.slot, r.rows, [m.slot for m in r.members]) for r in known]
        for block, mixed in place.mixed:
            for other, rows, _ in everyone:
                jobs[block.ranks.device] += block.copies(other, rows, mixed)
        for device, table in (self.members | place.members).items():
            for other, _, slots in everyone:
                kind = {"dtype": table.dtype, "device": "cpu", "pin_memory": table.is_cuda}
                own = torch.full(table.shape[1:], -1, **kind)
                own[: len(slots) or 1] = torch.tensor(slots or [other], dtype=table.dtype)
                jobs[device].append((table[other], own))
        new = [t for slab in place.slabs.values() for t in (slab.a, slab.b)]
        new += [t for block in place.blocks for t in block.tables]
        new += [*place.members.values(), *(t for _, mixed in place.mixed for t in mixed)]
        new += place.vectors.values()
        rooms = []
        for module, room in place.replaced.items():
            for to, own in zip(room, packed.replaced[module], strict=True):
                if to is not None and own is not None:
                    jobs[to.device].append((to, own))
                    rooms.append(to)
        written: Written = []
        for device, transfer in self.transfers.items():
            written.append((transfer, transfer.run(jobs[device], wait=bool(new))))
            transfer.keep(t for t in (*new, *rooms) if t.device == device)
        return written

    def download(self, resident: Resident) -> PackedAdapter:
        """Copy an adapter from the device to host memory."""
        for transfer, written in resident.written:
            transfer.finish(written)
        modules = {}
        for module, pages in resident.pages.items():
            slab, view = self.slabs[module], self.modules[module]
            assert view.ranks is not None and view.scale is not None  # set with the module's slab
            index = torch.tensor(pages, dtype=torch.int64, device=slab.a.device)
            row = resident.slot * self.index.specs[module].experts
            a, b = to_host(slab.a[index]), to_host(slab.b[index])
            own = {"bias": True, "after": module in resident.scaled}
            own |= {"before": module in resident.befores}
            tables = {name: getattr(view, name) for name in VECTORS if own[name]}
            vectors = {n: to_host(t[resident.slot]) for n, t in tables.items() if t is not None}
            rank, scale = int(view.ranks[row]), float(view.scale[row])
            of_bias = resident.scaled.get(module, False)
            scales = resident.rows[module].scales
            modules[module] = PackedModule(a, b, rank, scale, of_bias, scales, **vectors)
        replaced = {
            module: whole.each(to_host)
            for module in self._replacing
            if (whole := self.modules[module].replaced.get(resident.slot)) is not None
        }
        return PackedAdapter(resident.config, modules, replaced, generation=resident.generation)

    # ---------------------------------------------------------------------------------------------
    # Publication and removal: only Python assignments, so no error can leave the store half changed

    def commit(self, place: Placement, resident: Resident) -> None:
        """Publish an adapter: add its placement's memory to the store, and free the victims' slots.

        The views of the modules then refer to new tables and pages.
        """
        self.slabs |= place.slabs
        self.blocks += place.blocks
        for module, free in place.free.items():
            self.slabs[module].free = free
        for victim in place.victims:
            self._free(victim.slot)
        if place.slot != NO_SLOT:
            self.free_slots.remove(place.slot)
            self.residents[place.slot] = resident
        for block in place.blocks:
            for i, name in enumerate(block.names):
                view = self.modules[name]
                view.page_table, view.ranks = block.page_table[i], block.ranks[i]
                view.scale = block.scale[i]
        self.members |= place.members
        for block, mixed in place.mixed:
            block.mixed = mixed
        for block in self.blocks if place.mixed else place.blocks if self.members else ():
            for i, name in enumerate(block.names):
                view = self.modules[name]
                view.page_scale, view.groups = (table[i] for table in block.mixed)
                view.members = self.members[block.scale.device]
        for (module, name), table in place.vectors.items():
            setattr(self.modules[module], name, table)
        # Set the pages after the tables, because a forward reads the tables if it finds a_pages.
        for name, slab in place.slabs.items():
            self.modules[name].b_pages = slab.b
            self.modules[name].a_pages = slab.a
        for name in resident.pages:
            self.modules[name].version += 1
        for name, whole in place.replaced.items():
            view = self.modules[name]
            view.replaced = {**view.replaced, place.slot: whole}
            view.was_replaced = True
            self._replacing.add(name)
        for name in self.slabs:
            view = self.modules[name]
            if view.after is not None:
                scaled = {slot: s for slot, s in view.scaled.items() if slot != place.slot}
                if name in resident.scaled:
                    kind = resident.config.kind
                    scaled[place.slot] = Scaled(view.version, kind, resident.scaled[name])
                view.scaled = scaled

    def mix(self, width: int) -> None:
        """Make compiled graphs read ``width`` or more weights per row, rounded to a power of 2."""
        if width > self.mixed:
            self.mixed = 1 << (width - 1).bit_length()
            for view in self.modules.values():
                view.mixed = self.mixed

    def vacate(self, resident: Resident) -> None:
        """Free the slot and the pages of an adapter.

        The slot's rows in the tables remain until the next adapter overwrites them.
        """
        self._free(resident.slot)
        for module, pages in resident.pages.items():
            slab = self.slabs[module]
            slab.free = sorted([*slab.free, *pages], reverse=True)

    def _free(self, slot: int) -> None:
        self.residents[slot] = None
        self.free_slots.append(slot)
        for name in self._replacing:
            view = self.modules[name]
            view.replaced = {s: whole for s, whole in view.replaced.items() if s != slot}
