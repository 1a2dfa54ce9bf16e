"""Slots, pages and tables on the device: the half of the pool that knows nothing of names.

An adapter is written into pages and a slot that nothing refers to; the pool publishes the name
last, and holds its lock around every method here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_ext.adapter.config import AdapterConfig
from lora_ext.adapter.model_index import ModelIndex
from lora_ext.adapter.replaced import Replaced

from .packing import PackedAdapter
from .pages import (
    ModuleSlab,
    PackedModule,
    PackedReplaced,
    Slab,
    TableBlock,
    in_words,
    magnitude_dtype,
    page_count,
)
from .transfer import StreamTransfer, Transfer, to_host, transfer_to

Written = list[tuple[Transfer, Any]]  # copies that may still be queued


class PoolFullError(RuntimeError):
    """No room, and nothing unpinned that could make way."""


@dataclass
class Resident:
    """An adapter in a slot. Once published, only pins, copies and the fate of the name change."""

    name: str
    slot: int
    config: AdapterConfig
    pages: dict[str, list[int]]
    written: Written = field(default_factory=list)  # empty once every stream may read it
    pins: int = 0
    retired: bool = False  # the name is gone or means another slot; freed with the last pin
    #: No other adapter of the process has it, nor a later version of this one.
    serial: int = field(default_factory=itertools.count(1).__next__)


@dataclass
class Plan:
    """Where a new adapter goes, made without touching anything."""

    slot: int
    pages: dict[str, list[int]]
    free: dict[str, list[int]]  # free pages afterwards, of the modules that change
    victims: list[Resident]
    slabs: dict[str, Slab]  # new ones, unknown to the store until commit
    blocks: list[TableBlock]
    biases: dict[str, Tensor] = field(default_factory=dict)  # as are these
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    replaced: dict[str, Replaced] = field(default_factory=dict)

    @property
    def memory(self) -> list[Tensor]:
        """What was allocated for this plan."""
        pages = [t for slab in self.slabs.values() for t in (slab.a, slab.b)]
        tables = [t for b in self.blocks for t in (b.page_table, b.ranks, b.scale)]
        return [*pages, *tables, *self.biases.values(), *self.magnitudes.values()]


class PageStore:
    """Memory for ``max_slots`` adapters, ``pages`` pages per module, allocated module by module."""

    def __init__(self, index: ModelIndex, max_slots: int, max_rank: int, pages: int):
        self.index = index
        self.max_slots = max_slots
        self.pages = pages
        self.modules = {
            name: ModuleSlab(spec.in_features, spec.out_features, experts=spec.experts)
            for name, spec in index.specs.items()
        }
        self.residents: list[Resident | None] = [None] * max_slots
        self.slabs: dict[str, Slab] = {}
        self.blocks: list[TableBlock] = []
        self._replacing: set[str] = set()  # modules that an adapter has replaced
        self._max_pages = page_count(max_rank)
        self._free_slots = list(range(max_slots - 1, -1, -1))
        devices = {spec.device for spec in index.specs.values()}
        self.transfers = {device: transfer_to(device) for device in devices}

    def mark_use(self) -> None:
        """Steps queued so far may read pages that are about to become free (CUDA only)."""
        for transfer in self._on_streams:
            transfer.mark_use()

    def check_outside_capture(self) -> None:
        """Refuse to pin inside the capture of a graph (CUDA only)."""
        for transfer in self._on_streams:
            transfer.check_outside_capture()

    def before_reading(self, resident: Resident) -> None:
        """Let the current stream read a resident whose bytes may still be on their way."""
        done = [transfer.before_reading(written) for transfer, written in resident.written]
        if all(done):
            resident.written = []

    @cached_property
    def _on_streams(self) -> list[StreamTransfer]:
        return [t for t in self.transfers.values() if isinstance(t, StreamTransfer)]

    # ---------------------------------------------------------------------------------------------
    # Finding room

    def plan(self, name: str, packed: PackedAdapter, order: Iterable[Resident]) -> Plan:
        """Choose slot, pages and victims.

        Args:
            name: for the message.
            packed: the adapter to place.
            order: residents, the first to be evicted first; pinned ones are passed over.

        Raises:
            PoolFullError: says what would be needed and who holds it.
        """
        need = {module: part.a.shape[0] for module, part in packed.modules.items()}
        for module, count in need.items():
            experts = self.index.specs[module].experts
            if count > self.pages * experts:
                raise PoolFullError(
                    f"AdapterPool: {name!r} needs {count // experts} pages of {module}, "
                    f"the pool has pages={self.pages}"
                )
        free = {m: list(self.slabs[m].free) for m in need if m in self.slabs}
        slots = list(self._free_slots)
        victims: list[Resident] = []
        lacking = {module for module in free if len(free[module]) < need[module]}
        for resident in order:
            if slots and not lacking:
                break
            if resident.pins or (slots and lacking.isdisjoint(resident.pages)):
                continue  # in use, or of no help
            victims.append(resident)
            slots.append(resident.slot)
            for module, pages in resident.pages.items():
                free.setdefault(module, list(self.slabs[module].free)).extend(pages)
            lacking = {module for module in lacking if len(free[module]) < need[module]}
        if not slots or lacking:
            wanted = [] if slots else [f"one of max_slots={self.max_slots} slots"]
            for module in sorted(lacking)[:3]:
                wanted.append(
                    f"{need[module]} pages of {module} ({len(free[module])} can be freed)"
                )
            pinned = sorted({r.name for r in self.residents if r is not None and r.pins})
            raise PoolFullError(
                f"AdapterPool: {name!r} needs {' and '.join(wanted)}, but the rest is pinned, "
                f"by {len(pinned)} adapters: {pinned[:8]}"
            )
        specs = self.index.specs
        new = {
            m: Slab.allocate(specs[m], self.pages * specs[m].experts) for m in need if m not in free
        }
        free |= {module: slab.free for module, slab in new.items()}
        pages = {m: [free[m].pop() for _ in range(count)] for m, count in need.items()}
        return Plan(
            slots[-1],
            pages,
            free,
            victims,
            new,
            self._new_blocks(new),
            *self._new_vectors(new, packed),
            {module: self._room_for(module, whole) for module, whole in packed.replaced.items()},
        )

    def _room_for(self, module: str, whole: PackedReplaced) -> Replaced:
        device = self.index.modules[module].device
        try:
            bias = None if whole.bias is None else torch.empty_like(whole.bias, device=device)
            return Replaced(torch.empty_like(whole.weight, device=device), bias)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise MemoryError(
                f"AdapterPool: expected room for {module} of an adapter that replaces it "
                f"({in_words(whole.nbytes)}), found none ({error}); unload other adapters"
            ) from error

    def _new_blocks(self, new: dict[str, Slab]) -> list[TableBlock]:
        together: dict[tuple[torch.device, int], list[str]] = {}
        for module in new:
            spec = self.index.specs[module]
            together.setdefault((spec.device, spec.experts), []).append(module)
        return [
            TableBlock.allocate(names, self.max_slots, self._max_pages, device, experts)
            for (device, experts), names in together.items()
        ]

    def _new_vectors(
        self, new: dict[str, Slab], packed: PackedAdapter
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Biases and magnitudes (S, O) of modules that had none so far."""
        biases, magnitudes = {}, {}
        for module, part in packed.modules.items():
            slab = new[module] if module in new else self.slabs[module]
            shape = self.max_slots, slab.b.shape[1]
            dtype, device = slab.b.dtype, slab.b.device
            if part.bias is not None and slab.bias is None:
                biases[module] = torch.zeros(shape, dtype=dtype, device=device)
            if part.magnitude is not None and slab.magnitude is None:
                magnitudes[module] = torch.zeros(shape, dtype=magnitude_dtype(dtype), device=device)
        return biases, magnitudes

    # ---------------------------------------------------------------------------------------------
    # Bytes

    @property
    def replaced_bytes(self) -> int:
        """Of whole modules that adapters brought along."""
        wholes = [w for name in self._replacing for w in self.modules[name].replaced.values()]
        return sum(tensor.nbytes for whole in wholes for tensor in whole if tensor is not None)

    def upload(
        self,
        slot: int,
        pages: dict[str, list[int]],
        packed: PackedAdapter,
        plan: Plan | None = None,
    ) -> Written:
        """Write pages, and the slot's rows of every table: no row of an earlier owner survives.
        Without a plan, what the adapter replaces is where it was.

        Returns:
            the copies, which may still be queued; :attr:`Resident.written`. They are done where the
            plan brings new memory: whoever has pinned another slot reads it without waiting.
        """
        modules, replaced = packed.modules, packed.replaced
        slabs = self.slabs | plan.slabs if plan else self.slabs
        blocks = self.blocks + plan.blocks if plan else self.blocks
        jobs: dict[torch.device, list[tuple[Tensor, Tensor]]] = {d: [] for d in self.transfers}
        for module, part in modules.items():
            slab = slabs[module]
            for i, page in enumerate(pages[module]):
                jobs[slab.a.device] += [(slab.a[page], part.a[i]), (slab.b[page], part.b[i])]
        for module, slab in slabs.items():
            part = modules.get(module)
            bias = plan.biases.get(module, slab.bias) if plan else slab.bias
            magnitude = plan.magnitudes.get(module, slab.magnitude) if plan else slab.magnitude
            for table, own in (
                (bias, part.bias if part else None),
                (magnitude, part.magnitude if part else None),
            ):
                if table is not None:
                    jobs[table.device].append((table[slot], _row(table[slot], own)))
        for block in blocks:
            jobs[block.ranks.device] += block.rows(slot, pages, modules)
        for module, room in (plan.replaced if plan else {}).items():
            whole = replaced[module]
            jobs[room.weight.device].append((room.weight, whole.weight))
            if room.bias is not None and whole.bias is not None:
                jobs[room.weight.device].append((room.bias, whole.bias))
        new = plan.memory if plan else []
        written: Written = []
        for device, transfer in self.transfers.items():
            written.append((transfer, transfer.run(jobs[device], wait=bool(new))))
            whole = [t for each in (plan.replaced.values() if plan else ()) for t in each]
            own = [tensor for tensor in (*new, *whole) if tensor is not None]
            transfer.keep(tensor for tensor in own if tensor.device == device)
        return written

    def download(self, resident: Resident) -> PackedAdapter:
        """Copy a resident's pages to host memory."""
        for transfer, written in resident.written:
            transfer.finish(written)
        modules = {}
        for module, pages in resident.pages.items():
            slab, view = self.slabs[module], self.modules[module]
            assert view.ranks is not None and view.scale is not None  # the module has a slab
            index = torch.tensor(pages, device=slab.a.device)
            row = resident.slot * self.index.specs[module].experts
            modules[module] = PackedModule(
                to_host(slab.a[index]),
                to_host(slab.b[index]),
                None if slab.bias is None else to_host(slab.bias[resident.slot]),
                int(view.ranks[row]),
                float(view.scale[row]),
                to_host(slab.magnitude[resident.slot])
                if resident.config.use_dora and slab.magnitude is not None
                else None,
            )
        replaced = {
            module: PackedReplaced(
                to_host(whole.weight), None if whole.bias is None else to_host(whole.bias)
            )
            for module in self._replacing
            if (whole := self.modules[module].replaced.get(resident.slot)) is not None
        }
        return PackedAdapter(resident.config, modules, replaced)

    # ---------------------------------------------------------------------------------------------
    # Bookkeeping that cannot fail

    def commit(self, plan: Plan, resident: Resident) -> None:
        """Make a plan's memory the store's, and let the modules see it."""
        self.slabs |= plan.slabs
        self.blocks += plan.blocks
        for module, free in plan.free.items():
            self.slabs[module].free = free
        for victim in plan.victims:
            self.residents[victim.slot] = None
            self._free_slots.append(victim.slot)
            self._forget_replaced(victim.slot)
        self._free_slots.remove(plan.slot)
        self.residents[plan.slot] = resident
        for block in plan.blocks:
            for i, name in enumerate(block.names):
                view = self.modules[name]
                view.page_table, view.ranks = block.page_table[i], block.ranks[i]
                view.scale = block.scale[i]
        for name, bias in plan.biases.items():
            self.slabs[name].bias = self.modules[name].bias = bias
        for name, magnitude in plan.magnitudes.items():
            self.slabs[name].magnitude = self.modules[name].magnitude = magnitude
        for name, slab in plan.slabs.items():  # last: a forward that sees the pages sees the rest
            self.modules[name].b_pages = slab.b
            self.modules[name].a_pages = slab.a
        for name in resident.pages:
            self.modules[name].version += 1
        for name, whole in plan.replaced.items():
            view = self.modules[name]
            view.replaced = {**view.replaced, plan.slot: whole}
            view.was_replaced = True
            self._replacing.add(name)
        for name, slab in self.slabs.items():
            if slab.magnitude is not None:
                view = self.modules[name]
                dora = {slot: v for slot, v in view.dora.items() if slot != plan.slot}
                if resident.config.use_dora and name in resident.pages:
                    dora[plan.slot] = view.version
                view.dora = dora

    def vacate(self, resident: Resident) -> None:
        """Free slot and pages. The rows stay: the slot's next owner writes all of them."""
        self.residents[resident.slot] = None
        self._free_slots.append(resident.slot)
        self._forget_replaced(resident.slot)
        for module, pages in resident.pages.items():
            self.slabs[module].free.extend(pages)

    def _forget_replaced(self, slot: int) -> None:
        for name in self._replacing:
            view = self.modules[name]
            view.replaced = {s: whole for s, whole in view.replaced.items() if s != slot}


def _row(row: Tensor, own: Tensor | None) -> Tensor:
    """An adapter's row of a table, zeros where it has none."""
    if own is not None:
        return own
    return torch.zeros(row.shape, dtype=row.dtype, device="cpu", pin_memory=row.is_cuda)
