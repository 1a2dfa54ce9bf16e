"""``capturable``: a decode step whose CUDA graph follows names, ranks, loads and unloads.

A captured graph reads memory, and no names. What says which adapter has each row, and what else
depends on it, therefore lies at fixed addresses and is written before a replay; the graph's first
layer groups the rows by adapter, and all others use what it made.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import integer, require
from lora_ext.pool import AdapterPool
from lora_ext.rows import Assignment, Layout, Rows, capture, in_step, planned

from .layers._pool_dora import DoraFactors, DoraTable
from .layers._pool_replaced import ReplacedBank

# What a graph computes for a module, as far as adapters decide it.
_PARTS = {"a_pages": "factors", "bias": "a bias", "magnitude": "DoRA magnitudes"}
_WHOLE = "a module of its own"


def capturable(pool: AdapterPool, max_rows: int, *, replaced: int = 1) -> Capturable:
    """Room for a captured step of at most ``max_rows`` rows, one name each.

    ::

        step = lora_ext.capturable(pool, max_rows=4)
        with step, lora_ext.adapters(["a", "b", None, "a"]):
            model(ids)  # once without a graph, as torch asks for
            with torch.cuda.graph(graph):
                logits = model(ids)
        with step, lora_ext.adapters(["c", None, "a"]):  # rows without a name: the base model
            graph.replay()

    Args:
        pool: whose adapters the step serves; all its modules on one device.
        max_rows: most rows of a step: sequences with one token each, or tokens.
        replaced: most adapters of one step that bring modules of their own (``modules_to_save``).
            Each is a copy of its weight and a product of all rows more, wherever an adapter has
            replaced a module.

    Raises:
        TypeError: no pool. ValueError: numbers below 1 and 0, or a pool on several devices.
    """
    fits, found = isinstance(pool, AdapterPool), type(pool).__name__
    require(fits, "capturable", "pool", "an AdapterPool", found, TypeError)
    integer("capturable", "max_rows", max_rows, 1, expected="an integer, at least 1")
    integer("capturable", "replaced", replaced, 0, expected="an integer, at least 0")
    devices = {spec.device for spec in pool.index.specs.values()}
    one = len(devices) == 1
    require(one, "capturable", "pool", "modules on one device", sorted(map(str, devices)))
    return Capturable(pool, max_rows, replaced, devices.pop())


class Capturable:
    """What :func:`capturable` makes. Blocks of :func:`lora_ext.adapters` that are entered inside
    ``with step`` write their names here, with one copy.

    The adapters named last stay pinned until other names are written, so a replay behind a block
    serves them, also where they were unloaded since. A graph that was captured inside keeps this
    object, and with it the pool, alive (from the torch on that shows the graph it captures).

    One thread at a time. A forward with another number of rows than names, such as a prefill, is
    served as without the step; captured, it raises.
    """

    def __init__(self, pool: AdapterPool, max_rows: int, replaced: int, device: torch.device):
        self.pool, self.max_rows, self.replaced, self.device = pool, max_rows, replaced, device
        with torch.inference_mode(False):
            self._buffer = torch.full((2, max_rows), -1, dtype=torch.int32, device=device)
        # Of each row the slot, and the place of an adapter with modules of its own.
        self._ids, self._places = self._buffer
        self._lease: Any = None
        self._written: Assignment | None = None
        self._inside: contextlib.ExitStack | None = None
        self._closed = False
        self._most = 0  # rows of a captured graph
        self._parts: dict[str, frozenset[str]] | None = None  # of the captured graphs, by module
        self._needs: dict[int, dict[str, frozenset[str]]] = {}  # of adapters, by serial
        self._holds: list[Any] = [None] * replaced  # who has each place
        self._tables: dict[DoraFactors, DoraTable] = {}
        self._banks: dict[str, ReplacedBank] = {}

    def __repr__(self) -> str:
        """Settings."""
        return f"Capturable(max_rows={self.max_rows}, replaced={self.replaced}, {self.device})"

    def __enter__(self) -> Capturable:
        """Blocks of the pool, in this thread and task, write their names here."""
        self._check_open()
        if self._inside is not None:
            raise RuntimeError("capturable: expected a step to be entered once, found it entered")
        self._inside = contextlib.ExitStack()
        self._inside.enter_context(in_step(self))
        return self

    def __exit__(self, *_: object) -> None:
        inside, self._inside = self._inside, None
        assert inside is not None
        inside.close()

    def close(self) -> None:
        """Let the adapters go: replays serve the base model from here on, and writing raises."""
        self._clear()
        self._closed = True

    def __del__(self) -> None:
        """The pins end with it."""
        if self.__dict__.get("_lease") is not None:
            self._lease.__exit__()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("capturable: expected an open step, found one that was closed")

    # ---------------------------------------------------------------------------------------------
    # Before a replay

    def write(self, assignment: Assignment) -> None:
        """Let replays serve these names, and pin their adapters until other names are written.

        After an error, and what the pool raises, replays serve the base model; in a capture nothing
        has changed.

        Raises:
            ValueError: more names than rows, or an adapter that needs what a captured graph lacks.
            RuntimeError: the step is closed, or a graph is being captured. NotImplementedError: an
                activated adapter.
        """
        self._check_open()
        if capture(self.device) is not None:
            raise RuntimeError(
                "adapters: expected a block around a capture, found one entered inside it"
            )
        try:
            self._write(assignment)
        except BaseException:
            self._clear()
            raise

    def _write(self, assignment: Assignment) -> None:
        count = 0 if assignment.shape == () else len(assignment.places)  # with names of their own
        most = self._most or self.max_rows
        if count > most:
            limit = f"max_rows={most}" if most == self.max_rows else f"the {most} rows captured"
            raise ValueError(f"adapters: names: expected at most {limit}, found {count}")
        self._release()  # first, so that it can make way
        self._lease = lease = self.pool.acquire(assignment.names)
        for name, invocation in zip(assignment.names, lease.invocations, strict=True):
            if invocation:
                raise NotImplementedError(
                    f"capturable: adapter {name!r}: expected one that serves all tokens, found an "
                    "activated one, whose rows depend on the prompt"
                )
        residents = {resident.slot: resident for resident in lease.residents}.values()
        for resident in residents:
            self._check(resident)
        self._place(residents)
        for table in self._tables.values():
            table.follow(residents)
        for bank in self._banks.values():
            bank.follow(self._holds)
        holds = [None if held is None else held.slot for held in self._holds]
        places = [holds.index(slot) if slot in holds else -1 for slot in lease]
        self._fill(assignment, [[*lease, -1], [*places, -1]], count)
        self._written = assignment

    def _fill(self, assignment: Assignment, table: list[list[int]], count: int) -> None:
        places = assignment.places
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(places, Tensor):  # on a device: nothing of it is known here
                each = torch.tensor(table, dtype=torch.int32, device=places.device)[:, places]
                whole = torch.nn.functional.pad(each, (0, self.max_rows - count), value=-1)
            else:
                fill = self.max_rows - count
                rest = [places[0]] * fill if assignment.shape == () else [-1] * fill
                order = [*places[:count], *rest]
                each = [[of[place] for place in order] for of in table]
                pin = self._buffer.is_cuda
                whole = torch.tensor(each, dtype=torch.int32, device="cpu", pin_memory=pin)
            self._buffer.copy_(whole, non_blocking=True)

    def _clear(self) -> None:
        self._buffer.fill_(-1)  # whoever had the slots: a failed write has released them
        self._release()

    def _release(self) -> None:
        lease, self._lease, self._written = self._lease, None, None
        if lease is not None:
            lease.__exit__()

    # ---------------------------------------------------------------------------------------------
    # What a captured graph has, and what an adapter needs

    def _modules(self) -> dict[str, Any]:
        return {**self.pool.modules, **self.pool.experts}

    def note_capture(self, device: torch.device, rows: int = 0) -> None:
        """A layer of the pool is computed. In a capture, what the layers do is settled by now."""
        graph = capture(device)
        if graph is None:
            return
        self._most = max(self._most, rows)
        if self._parts is None:
            self._parts = {
                name: frozenset(
                    [each for part, each in _PARTS.items() if getattr(slab, part) is not None]
                    + [_WHOLE] * (name in self._banks)
                )
                for name, slab in self._modules().items()
            }
        if getattr(graph, "lora_ext_step", None) is not self:
            graph.lora_ext_step = self  # it reads our memory, and the pool's

    def check_outside_capture(self) -> None:
        """A layer of the pool is computed outside of every block.

        Raises:
            RuntimeError: and captured: no replay would serve an adapter.
        """
        if capture(self.device) is not None:
            raise RuntimeError(
                "capturable: expected a block of lora_ext.adapters around the capture, found none; "
                "adapters(None) will do: replays serve the names that are written before them"
            )

    def _check(self, resident: Any) -> None:
        if self._parts is None:
            return
        needs = self._needs.get(resident.serial)
        if needs is None:
            needs = self._needs[resident.serial] = self._needs_of(resident)
        elif not needs:
            return
        for module, parts in needs.items():
            lacks = sorted(parts - self._parts[module])
            if lacks:
                raise ValueError(
                    f"capturable: adapter {resident.name!r}: expected what a captured graph "
                    f"computes, found {' and '.join(lacks)} at {module!r}, where there was none "
                    "at the capture; make a new capturable and capture again"
                )
        self._needs[resident.serial] = {}  # the graphs have it all

    def _needs_of(self, resident: Any) -> dict[str, frozenset[str]]:
        needs: dict[str, frozenset[str]] = {}
        for name, slab in self._modules().items():
            parts = []
            if name in resident.pages:
                parts.append(_PARTS["a_pages"])
                if resident.config.lora_bias and slab.bias is not None:
                    parts.append(_PARTS["bias"])
            if resident.slot in slab.dora:
                parts.append(_PARTS["magnitude"])
            if resident.slot in slab.replaced:
                parts.append(_WHOLE)
            if parts:
                needs[name] = frozenset(parts)
        return needs

    def _place(self, residents: Any) -> None:
        """Give each adapter with modules of its own a place, the one that it had if it can be."""
        slabs = [slab for slab in self._modules().values() if slab.replaced]
        for r in residents:
            some = any(s.replaced[r.slot].rows is not None for s in slabs if r.slot in s.replaced)
            if some:
                raise NotImplementedError(
                    "capturable: adapters: expected none with trainable_token_indices in a step, "
                    f"found {r.name!r}"
                )
        bring = [r for r in residents if any(r.slot in slab.replaced for slab in slabs)]
        if len(bring) > self.replaced:
            raise ValueError(
                f"capturable: replaced: expected at most {self.replaced} adapters of a step that "
                f"bring modules of their own, found {[r.name for r in bring]!r:.200}"
            )
        self._holds = [held if held in bring else None for held in self._holds]
        for resident in bring:
            if resident not in self._holds:
                self._holds[self._holds.index(None)] = resident

    # ---------------------------------------------------------------------------------------------
    # What the layers ask for

    def rows(self, assignment: Assignment, layout: Layout) -> Rows | None:
        """Rows that replays follow, with all slots in use; None where each name has several rows,
        or the names are not those that were written last.

        Raises:
            ValueError: the same in a capture.
        """
        device, count = layout.device, math.prod(layout.leading)
        if (
            assignment is not self._written
            or device != self.device
            or count > self.max_rows
            or (layout.tokens_first and len(assignment.shape) == 2)
            or (assignment.shape != () and assignment.spread(layout) != (1, 1))
        ):
            if capture(device) is None:
                return None
            raise ValueError(
                f"capturable: expected a captured forward of at most {self.max_rows} rows on "
                f"{self.device}, each with one of the names written last, found activations of "
                f"shape {(*layout.leading, 'features')} on {device}"
            )
        self.note_capture(device, count)
        return assignment.kept.get(("step", count), device, self._rows, count)

    def _rows(self, count: int) -> Rows:
        return planned(tuple(range(self.pool.max_slots)), self._ids[:count])

    def table(self, factors: DoraFactors) -> Tensor:
        """DoRA's factors of one layer, ``(slots + 1, O)``, the last for rows of the base model."""
        if factors not in self._tables:
            self._check_warm(factors.name)
            table = self._tables[factors] = DoraTable(factors, self.pool.max_slots)
            table.follow(self._lease.residents)
        return self._tables[factors].c

    def bank(self, name: str) -> tuple[ReplacedBank | None, Tensor]:
        """The weights of adapters that replace a module, and the place of each row; None where no
        adapter in the pool does."""
        slab = self.pool.modules[name]
        whole = any(each.rows is None for each in slab.replaced.values())
        if name not in self._banks and whole and self.replaced:
            self._check_warm(name)
            bank = self._banks[name] = ReplacedBank(slab, self.replaced)
            bank.follow(self._holds)
        return self._banks.get(name), self._places

    def _check_warm(self, name: str) -> None:
        if capture(self.device) is not None:
            raise RuntimeError(
                f"capturable: {name}: expected a step that has run once outside of a capture with "
                "these adapters in the pool, found its first run captured"
            )
