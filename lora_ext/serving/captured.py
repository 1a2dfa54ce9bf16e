"""``capturable``: a decode step whose CUDA graph supports changes of names, ranks and adapters.

A replay of a captured graph repeats kernels on fixed addresses and runs no Python, so it cannot
read names. The slot of each row, and all values that depend on it, are therefore written to fixed
addresses before a replay. The plan (rows grouped by adapter) is computed inside the graph: the
first layer with some number of rows computes it, and later layers with as many rows use it. In
versions of torch that cannot return the graph in capture, every layer computes its own plan.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import instance, integer, require
from lora_ext.pool import AdapterPool
from lora_ext.rows import Assignment, Layout, Rows, capture, in_step, planned

from .layers._pool_dora import DoraFactors, DoraTable
from .layers._pool_replaced import ReplacedBank

# Parts of a module's forward that a graph computes if adapters have them, by field of its slab.
_PARTS = {"a_pages": "factors", "bias": "a bias", "magnitude": "DoRA magnitudes"}
_REPLACED = "a module of its own"


def capturable(pool: AdapterPool, max_rows: int, *, replaced: int = 1) -> Capturable:
    """Allocate memory for a captured step of at most ``max_rows`` rows, one name each.

    ::

        step = lora_ext.capturable(pool, max_rows=4)
        with step, lora_ext.adapters(["a", "b", None, "a"]):
            model(ids)  # once without a graph, as torch asks for
            with torch.cuda.graph(graph):
                logits = model(ids)
        with step, lora_ext.adapters(["c", None, "a"]):  # rows without a name: the base model
            graph.replay()

    Args:
        pool: the pool of the adapters; all its modules must be on one device.
        max_rows: most rows of a step: sequences with one token each, or tokens.
        replaced: most adapters of one step that replace modules (``modules_to_save``). Each needs a
            copy of its weight and another product of all rows, for every replaced module.

    Raises:
        TypeError: If ``pool`` is not a pool.
        ValueError: If ``max_rows`` is below 1, ``replaced`` is below 0, or the pool is on several
            devices.
    """
    instance("capturable", "pool", pool, AdapterPool)
    integer("capturable", "max_rows", max_rows, 1, expected="an integer, at least 1")
    integer("capturable", "replaced", replaced, 0, expected="an integer, at least 0")
    devices = {spec.device for spec in pool.index.specs.values()}
    one = len(devices) == 1
    require(one, "capturable", "pool", "modules on one device", sorted(map(str, devices)))
    return Capturable(pool, max_rows, replaced, devices.pop())


@dataclass
class _Graphs:
    """Properties of all graphs that were captured in a step.

    Attributes:
        rows: rows of the largest graph; 0 before the first capture.
        parts: values of :data:`_PARTS` and :data:`_REPLACED` by module, fixed at the first capture.
        served: serial numbers of checked adapters that need no other parts.
    """

    rows: int = 0
    parts: dict[str, frozenset[str]] | None = None
    served: set[int] = field(default_factory=set)


class Capturable:
    """Capturable step, made by :func:`capturable`.

    Blocks of :func:`lora_ext.adapters` that are entered inside ``with step`` write their names
    here, with one copy. The adapters named last stay pinned until other names are written, so a
    replay after a block uses them, even if they were unloaded since. A graph that was captured
    inside keeps this object and the pool alive, in versions of torch that expose the graph being
    captured.

    Only one thread may use the step at a time. A forward whose number of rows differs from the
    number of names, such as a prefill, is computed as without the step; in a capture it raises.

    State, all owned by this object:

    * Permanent, at fixed addresses that graphs read: ``_buffer`` with two views of one number per
      row. ``_ids`` has the slot of the row's adapter, -1 for the base model. ``_places`` has the
      place of that adapter in the banks, -1 if it replaces no module.
    * Permanent after a first forward that needs it: ``_dora``, a table of DoRA's factors per layer,
      and ``_banks``, for each replaced module the weights of up to ``replaced`` adapters by place.
    * Until other names are written: ``_lease``, the pins; ``_assignment``, the names; and
      ``_owners``, for each place of the banks the adapter whose weights are there.
    * ``_graphs`` grows with captures. ``_entered`` is the context of ``with step``, None outside.
      ``_closed`` is set once.
    """

    def __init__(self, pool: AdapterPool, max_rows: int, replaced: int, device: torch.device):
        self.pool, self.max_rows, self.replaced, self.device = pool, max_rows, replaced, device
        with torch.inference_mode(False):
            self._buffer = torch.full((2, max_rows), -1, dtype=torch.int32, device=device)
        self._ids, self._places = self._buffer
        self._dora: dict[DoraFactors, DoraTable] = {}
        self._banks: dict[str, ReplacedBank] = {}
        self._lease: Any = None
        self._assignment: Assignment | None = None
        self._owners: list[Any] = [None] * replaced
        self._graphs = _Graphs()
        self._entered: contextlib.AbstractContextManager[None] | None = None
        self._closed = False

    def __repr__(self) -> str:
        """Return the settings."""
        return f"Capturable(max_rows={self.max_rows}, replaced={self.replaced}, {self.device})"

    def __enter__(self) -> Capturable:
        """Make blocks of the pool, in this thread and task, write their names here."""
        self._check_open()
        if self._entered is not None:
            raise RuntimeError("capturable: expected a step to be entered once, found it entered")
        self._entered = in_step(self)
        self._entered.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        entered, self._entered = self._entered, None
        assert entered is not None
        entered.__exit__(None, None, None)

    def close(self) -> None:
        """Unpin the adapters. Later replays serve the base model, and later writes raise."""
        self._clear()
        self._closed = True

    def __del__(self) -> None:
        """Unpin the adapters."""
        if self.__dict__.get("_lease") is not None:
            self._lease.__exit__()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("capturable: expected an open step, found one that was closed")

    # ---------------------------------------------------------------------------------------------
    # Before a replay

    def write(self, assignment: Assignment) -> None:
        """Write the names for replays, and pin their adapters until the next write.

        After an error, even of the pool, replays use the base model. In a capture, or after
        :meth:`close`, nothing changes.

        Raises:
            ValueError: If there are more names than rows, or an adapter needs a part that a
                captured graph lacks.
            RuntimeError: If the step is closed, or a graph is being captured.
            NotImplementedError: If an adapter is activated.
        """
        self._check_open()
        if capture(self.device) is not None:
            raise RuntimeError(
                "adapters: expected a block around a capture, found one entered inside it"
            )
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._buffer.copy_(self._rows_of_names(assignment), non_blocking=True)
        except BaseException:
            self._clear()
            raise
        self._assignment = assignment

    def _rows_of_names(self, assignment: Assignment) -> Tensor:
        """Pin the adapters, write their weights, and return the values of ``_buffer``.

        DoRA's factors and the weights of replaced modules are copied to the tables and banks that
        graphs read. The result, ``(2, max_rows)`` int32, has the slot of each row and its place in
        the banks. After an error the caller releases the pins.
        """
        per_row = assignment.shape != ()  # rows without a name use the base model
        count = len(assignment.places) if per_row else 0
        most = self._graphs.rows or self.max_rows
        if count > most:
            limit = f"max_rows={most}" if most == self.max_rows else f"the {most} rows captured"
            raise ValueError(f"adapters: names: expected at most {limit}, found {count}")
        self._release()  # before the new lease, so that the pool can evict these adapters
        self._lease = lease = self.pool.acquire(assignment.names)
        for name, invocation in zip(assignment.names, lease.invocations, strict=True):
            if invocation:
                raise NotImplementedError(
                    f"capturable: adapter {name!r}: expected one that serves all tokens, found an "
                    "activated one, whose rows depend on the prompt"
                )
        residents = {resident.slot: resident for resident in lease.residents}.values()
        for resident in residents:
            if missing := self._missing_parts(resident):
                found = f"{' and '.join(missing[1])} at {missing[0]!r}"
                raise ValueError(
                    f"capturable: adapter {resident.name!r}: expected what the graphs compute, "
                    f"found {found}; make a new capturable and capture again"
                )
        self._place(residents)
        for table in self._dora.values():
            table.follow(residents)
        for bank in self._banks.values():
            bank.follow(self._owners)
        owners = [None if owner is None else owner.slot for owner in self._owners]
        places = [owners.index(slot) if slot in owners else -1 for slot in lease]
        of_names = [[*lease, -1], [*places, -1]]  # index -1, the base model, selects the last
        rest = self.max_rows - count
        names = assignment.places  # the index of each row's name
        if isinstance(names, Tensor):  # on a device: its values are not known here
            of_rows = torch.tensor(of_names, dtype=torch.int32, device=names.device)[:, names]
            return torch.nn.functional.pad(of_rows, (0, rest), value=-1)
        if per_row:
            row_names = [*names, *[-1] * rest]
        else:  # one name for all rows
            row_names = [names[0]] * self.max_rows
        values = [[of_name[name] for name in row_names] for of_name in of_names]
        pin = self._buffer.is_cuda
        return torch.tensor(values, dtype=torch.int32, device="cpu", pin_memory=pin)

    def _clear(self) -> None:
        self._buffer.fill_(-1)
        self._release()

    def _release(self) -> None:
        lease, self._lease, self._assignment = self._lease, None, None
        if lease is not None:
            lease.__exit__()

    # ---------------------------------------------------------------------------------------------
    # Captures, and the adapters that captured graphs can serve

    def _slabs(self) -> dict[str, Any]:
        return {**self.pool.modules, **self.pool.experts}

    def note_capture(self, device: torch.device, rows: int = 0) -> None:
        """Record the parts of all modules if a layer of the pool is being captured."""
        graph = capture(device)
        if graph is None:
            return
        graphs = self._graphs
        graphs.rows = max(graphs.rows, rows)
        if graphs.parts is None:
            graphs.parts = {
                name: frozenset(
                    [part for field, part in _PARTS.items() if getattr(slab, field) is not None]
                    + [_REPLACED] * (name in self._banks)
                )
                for name, slab in self._slabs().items()
            }
        if getattr(graph, "lora_ext_step", None) is not self:
            graph.lora_ext_step = self  # keep the memory alive that the graph reads

    def check_outside_capture(self) -> None:
        """Raise RuntimeError if a layer is captured outside of every block.

        No replay of that graph would serve an adapter.
        """
        if capture(self.device) is not None:
            raise RuntimeError(
                "capturable: expected a block of lora_ext.adapters around the capture, found none; "
                "adapters(None) will do: replays serve the names that are written before them"
            )

    def _missing_parts(self, resident: Any) -> tuple[str, list[str]] | None:
        """Return the first module for which the graphs lack parts of the adapter, and these."""
        graphs = self._graphs
        if graphs.parts is None or resident.serial in graphs.served:
            return None
        for name, slab in self._slabs().items():
            targeted = name in resident.pages
            biased = targeted and resident.config.lora_bias and slab.bias is not None
            needs = {
                _PARTS["a_pages"]: targeted,
                _PARTS["bias"]: biased,
                _PARTS["magnitude"]: resident.slot in slab.dora,
                _REPLACED: resident.slot in slab.replaced,
            }
            missing = {part for part, needed in needs.items() if needed} - graphs.parts[name]
            if missing:
                return name, sorted(missing)
        graphs.served.add(resident.serial)
        return None

    def _place(self, residents: Collection[Any]) -> None:
        """Assign a place to each adapter that replaces modules, if possible its current one."""
        slabs = [slab for slab in self._slabs().values() if slab.replaced]
        for r in residents:
            if any(r.slot in s.replaced and s.replaced[r.slot].rows is not None for s in slabs):
                expected = "none with trainable_token_indices in a step"
                raise NotImplementedError(
                    f"capturable: adapters: expected {expected}, found {r.name!r}"
                )
        replacing = [r for r in residents if any(r.slot in slab.replaced for slab in slabs)]
        expected = f"at most {self.replaced} adapters of a step that replace modules"
        found = f"{[r.name for r in replacing]!r:.200}"
        require(len(replacing) <= self.replaced, "capturable", "replaced", expected, found)
        self._owners = [owner if owner in replacing else None for owner in self._owners]
        for resident in replacing:
            if resident not in self._owners:
                self._owners[self._owners.index(None)] = resident

    # ---------------------------------------------------------------------------------------------
    # Called by layers

    def rows(self, assignment: Assignment, layout: Layout) -> Rows | None:
        """Return the rows in the buffers that replays read, with all slots in use.

        Returns:
            None if the layer cannot use the buffers, and computes its rows as without the step:

            * ``assignment`` is not the object that was written last. The buffers then contain
              other names: those of a block that was entered later, or of this block before
              ``generate`` changed its rows. The test is for identity because the plan of the
              buffers is kept with the assignment, which is valid only while they contain it.
            * The layer is on another device, or has more than ``max_rows`` rows.
            * The names are one per token, and the layer has tokens first.
            * A name has several rows, as in a prefill.

        Raises:
            ValueError: In one of these cases in a capture, or if the names do not fit the layout.
        """
        device, count = layout.device, math.prod(layout.leading)
        if (
            assignment is not self._assignment
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
        """Return DoRA's factors of a layer, ``(slots + 1, O)``, the last row for the base model."""
        if factors not in self._dora:
            self._check_warm(factors.name)
            table = self._dora[factors] = DoraTable(factors, self.pool.max_slots)
            table.follow(self._lease.residents)
        return self._dora[factors].c

    def bank(self, name: str) -> tuple[ReplacedBank | None, Tensor]:
        """Return the weights of the adapters that replace a module, and the place of each row.

        The first is None if no adapter in the pool replaces it.
        """
        slab = self.pool.modules[name]
        whole = any(each.rows is None for each in slab.replaced.values())
        if name not in self._banks and whole and self.replaced:
            self._check_warm(name)
            bank = self._banks[name] = ReplacedBank(slab, self.replaced)
            bank.follow(self._owners)
        return self._banks.get(name), self._places

    def _check_warm(self, name: str) -> None:
        if capture(self.device) is not None:
            raise RuntimeError(
                f"capturable: {name}: expected a step that has run once outside of a capture with "
                "these adapters in the pool, found its first run captured"
            )
