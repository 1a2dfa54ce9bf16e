"""``capturable``: capture a decode step in a CUDA graph that can use any adapters of the pool.

A replay of a captured graph repeats kernels on fixed addresses and runs no Python, so it cannot
read the names of adapters. The slot of each row's adapter (its index in the tables of the pool),
and all values that depend on it, are therefore written to fixed addresses before a replay. The plan
(rows grouped by adapter) is computed inside the graph: the first layer with a certain number of
rows computes the plan, and later layers with the same number of rows reuse it. In versions of torch
that cannot return the graph that is being captured, every layer computes a plan.
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
from lora_ext.rows import Assignment, Layout, Rows, _rows, in_step

from .layers._pool_after import AfterTable, PoolAfter
from .layers._pool_replaced import ReplacedBank

# Parts of a module's forward that are captured only if an adapter in the pool needs them. The keys
# are fields of ModuleSlab that are not None in this case; the values are names for messages.
_PARTS = {
    "a_pages": "factors",
    "bias": "a bias",
    "after": "scales of outputs",
    "before": "scales of inputs",
}
_REPLACED = "a replaced module"


def capturable(
    pool: AdapterPool, max_rows: int, *, replaced: int = 1, mixed: int = 1
) -> Capturable:
    """Return a step that CUDA graphs can capture, with adapter names for at most ``max_rows`` rows.

    ::

        step = lora_ext.capturable(pool, max_rows=4)
        with step, lora_ext.adapters(["a", "b", None, "a"]):
            model(ids)  # once without a graph, as torch requires
            with torch.cuda.graph(graph):
                logits = model(ids)
        with step, lora_ext.adapters(["c", None, "a"]):  # row 3 has no name: base model
            graph.replay()

    Args:
        pool: pool that contains the adapters. All its modules must be on one device.
        max_rows: maximum number of rows in a step. A row is a sequence with one token, or a token.
        replaced: maximum number of adapters in one step that replace modules
            (``modules_to_save``). For every replaced module, each such adapter needs a copy of the
            weight and one more product with all rows.
        mixed: maximum number of adapters in a row's mixture. If it is 0, all weights must be 1.

    Raises:
        TypeError: If ``pool`` is not a pool.
        ValueError: If ``max_rows`` is below 1, ``replaced`` or ``mixed`` is below 0, or the pool is
            on several devices.
        PoolFullError: If the pool has no room for the tables of mixtures.
    """
    instance("capturable", "pool", pool, AdapterPool)
    integer("capturable", "max_rows", max_rows, 1, expected="an integer, at least 1")
    integer("capturable", "replaced", replaced, 0, expected="an integer, at least 0")
    integer("capturable", "mixed", mixed, 0, expected="an integer, at least 0")
    devices = {spec.device for spec in pool.index.specs.values()}
    one = len(devices) == 1
    require(one, "capturable", "pool", "modules on one device", sorted(map(str, devices)))
    pool.prepare_mixtures(mixed)  # graphs read the tables of mixtures even before the first mixture
    return Capturable(pool, max_rows, replaced, mixed, devices.pop())


@dataclass
class _Graphs:
    """Properties of all graphs that were captured in a step.

    Attributes:
        rows: number of rows of the largest graph; 0 before the first capture.
        parts: captured parts of each module, as values of :data:`_PARTS` and :data:`_REPLACED`;
            fixed at the first capture.
        served: serial numbers of adapters that were checked and need only captured parts.
    """

    rows: int = 0
    parts: dict[str, frozenset[str]] | None = None
    served: set[int] = field(default_factory=set)


class Capturable:
    """Step of a model that CUDA graphs can capture, made by :func:`capturable`.

    A block of :func:`lora_ext.adapters` that is entered inside ``with step`` writes the slots of
    its adapters to this object, with one copy to the device. These adapters stay pinned until the
    next block writes other adapters. A replay after the block therefore still uses them, even if
    they have been unloaded. In versions of torch that expose the graph being captured, a graph that
    was captured inside ``with step`` keeps this object and the pool alive.

    Only one thread may use the step at a time. If the number of rows of a forward differs from the
    number of names, as in a prefill, the forward is computed as without the step. In a capture,
    such a forward raises ValueError.

    State, all owned by this object:

    * Permanent, at fixed addresses that graphs read: ``_buffer`` (2, max_rows) and its two rows,
      the views ``_ids`` and ``_places``. ``_ids`` contains the slot of each row's adapter, -1 for
      the base model. ``_places`` contains the index of this adapter in the banks, -1 if the adapter
      replaces no module. ``_weights`` (max_rows, mixed) contains the weights of each row, 1 by
      default; ``_weighted`` is True if some are not 1.
    * Permanent after the first forward that needs it: ``_after``, one table of scales per layer,
      and ``_banks``, one bank per replaced module. A bank stacks the weights of up to
      ``replaced`` adapters; the index of an adapter, its place, is the same in all banks.
    * Until other names are written: ``_lease``, which pins the adapters; ``_assignment``, the
      names; and ``_owners``, the adapter at each place of the banks, or None.
    * ``_graphs`` is updated by each capture. ``_entered`` is the context of ``with step``, or None
      outside of it. ``_closed`` is set by :meth:`close`.
    """

    def __init__(
        self, pool: AdapterPool, max_rows: int, replaced: int, mixed: int, device: torch.device
    ):
        self.pool, self.max_rows, self.replaced, self.device = pool, max_rows, replaced, device
        self.mixed = mixed
        with torch.inference_mode(False):
            self._buffer = torch.full((2, max_rows), -1, dtype=torch.int32, device=device)
            self._weights = torch.ones(max_rows, mixed, dtype=torch.float32, device=device)
        self._weighted = False
        self._ids, self._places = self._buffer
        self._after: dict[PoolAfter, AfterTable] = {}
        self._banks: dict[str, ReplacedBank] = {}
        self._lease: Any = None
        self._assignment: Assignment | None = None
        self._owners: list[Any] = [None] * replaced
        self._graphs = _Graphs()
        self._entered: contextlib.AbstractContextManager[None] | None = None
        self._closed = False

    def __repr__(self) -> str:
        """Return a string with the settings and the device."""
        settings = f"max_rows={self.max_rows}, replaced={self.replaced}, mixed={self.mixed}"
        return f"Capturable({settings}, {self.device})"

    def __enter__(self) -> Capturable:
        """Make this thread's and task's blocks of the pool write their adapters to this object."""
        self._check_open()
        if self._entered is not None:
            raise RuntimeError("capturable: expected one `with step` at a time, found a nested one")
        self._entered = in_step(self)
        self._entered.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        entered, self._entered = self._entered, None
        assert entered is not None
        entered.__exit__(None, None, None)

    def close(self) -> None:
        """Unpin the adapters. Later replays use the base model; later blocks raise RuntimeError."""
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
        """Write the slots of a block's adapters for replays; pin the adapters until the next write.

        After an error, including errors of the pool, replays use the base model. However, a call
        inside a capture or after :meth:`close` raises an error without changing anything.

        Raises:
            ValueError: If there are more names than rows, or if an adapter needs a part (see
                :data:`_PARTS`) that a captured graph does not compute.
            RuntimeError: If the step is closed, or a graph is being captured.
            NotImplementedError: If an adapter is an aLoRA adapter.
        """
        self._check_open()
        if _rows.capture(self.device) is not None:
            raise RuntimeError(
                "adapters: expected a block entered before the capture, found one entered inside it"
            )
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._buffer.copy_(self._rows_of_names(assignment), non_blocking=True)
                weighted = assignment.weights is not None
                if weighted or self._weighted:
                    self._weighted = weighted
                    self._weights.copy_(self._weights_of_rows(assignment), non_blocking=True)
        except BaseException:
            self._clear()
            raise
        self._assignment = assignment

    def _rows_of_names(self, assignment: Assignment) -> Tensor:
        """Pin the adapters, write their weights, and return the new values of ``_buffer``.

        The scales of outputs and the weights of replaced modules are copied to the tables and
        banks that graphs read. The result, ``(2, max_rows)`` int32, contains for each row the
        adapter's slot and its place in the banks. After an error the caller releases the pins.
        """
        per_row = assignment.shape != ()  # rows without a name use the base model
        count = len(assignment.places) if per_row else 0
        most = self._graphs.rows or self.max_rows
        limit = f"max_rows={most}" if most == self.max_rows else f"the {most} rows captured"
        require(count <= most, "adapters", "names", f"at most {limit}", count)
        widths = [1 if isinstance(name, str) else len(name) for name in assignment.names]
        width = max(widths, default=0)
        if width > self.mixed and (width > 1 or assignment.weights is not None):
            raise ValueError(
                f"capturable: mixed: expected at least {width} for names {assignment.asked!r:.200},"
                f" found {self.mixed}; pass mixed={width} to capturable"
            )
        self._release()  # before the new lease, so that the pool can evict these adapters
        self._lease = lease = self.pool.acquire(assignment.asked)
        for name, invocation in zip(assignment.names, lease.invocations, strict=True):
            what, expected = f"adapter {name!r}", "an ordinary adapter"
            found = "an aLoRA adapter, whose rows depend on the prompt"
            require(not invocation, "capturable", what, expected, found, NotImplementedError)
        residents = {resident.slot: resident for resident in lease.residents}.values()
        for resident in residents:
            if missing := self._missing_parts(resident):
                found = f"{' and '.join(missing[1])} at {missing[0]!r}"
                raise ValueError(
                    f"capturable: adapter {resident.name!r}: expected only parts that the graphs "
                    f"compute, found {found}; create a new capturable and capture again"
                )
        self._place(residents)
        for table in self._after.values():
            table.follow(residents)
        for bank in self._banks.values():
            bank.follow(self._owners)
        owners = [None if owner is None else owner.slot for owner in self._owners]
        places = [owners.index(slot) if slot in owners else -1 for slot in lease]
        of_names = [[*lease, -1], [*places, -1]]  # index -1 selects the last entry: the base model
        rest = self.max_rows - count
        names = assignment.places  # the index of each row's name
        if isinstance(names, Tensor):  # on a device: reading its values would synchronise
            of_rows = torch.tensor(of_names, dtype=torch.int32, device=names.device)[:, names]
            return torch.nn.functional.pad(of_rows, (0, rest), value=-1)
        if per_row:
            row_names = [*names, *[-1] * rest]
        else:  # one name for all rows
            row_names = [names[0]] * self.max_rows
        values = [[of_name[name] for name in row_names] for of_name in of_names]
        pin = self._buffer.is_cuda
        return torch.tensor(values, dtype=torch.int32, device="cpu", pin_memory=pin)

    def _weights_of_rows(self, assignment: Assignment) -> Tensor:
        """Return the new values of ``_weights``; rows and columns without a weight have 1."""
        weights: Any = assignment.weights
        device = weights.device if isinstance(weights, Tensor) else "cpu"
        pin = self._weights.is_cuda and device == "cpu"
        kind: Any = {"dtype": torch.float32, "device": device, "pin_memory": pin}
        values = torch.ones(self._weights.shape, **kind)
        if weights is not None:
            own = torch.as_tensor(weights, dtype=torch.float32)  # (n, K), or (1, K) for all rows
            values[: len(own) if assignment.shape else None, : own.shape[1]] = own
        return values

    def _clear(self) -> None:
        self._buffer.fill_(-1)
        self._release()

    def _release(self) -> None:
        lease, self._lease, self._assignment = self._lease, None, None
        if lease is not None:
            lease.__exit__()

    # ---------------------------------------------------------------------------------------------
    # Captures, and the adapters that captured graphs support

    def _slabs(self) -> dict[str, Any]:
        return {**self.pool.modules, **self.pool.experts}

    def note_capture(self, device: torch.device, rows: int = 0) -> None:
        """Record what a graph contains, if a layer with ``rows`` rows is being captured."""
        graph = _rows.capture(device)
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
            graph.lora_ext_step = self  # keeps the memory that the graph reads

    def check_outside_capture(self) -> None:
        """Raise RuntimeError if a layer is captured outside of every block.

        Replays of such a graph could only compute the base model.
        """
        if _rows.capture(self.device) is not None:
            raise RuntimeError(
                "capturable: expected a block of lora_ext.adapters around the capture, found none; "
                "enter lora_ext.adapters(None), for example: a replay uses the latest names"
            )

    def _missing_parts(self, resident: Any) -> tuple[str, list[str]] | None:
        """Return a module in which the graphs lack parts of an adapter, and the parts; or None."""
        graphs = self._graphs
        if graphs.parts is None or resident.serial in graphs.served:
            return None
        parts = resident.members or (resident,)
        for name, slab in self._slabs().items():
            targeted = name in resident.rows
            biased = slab.bias is not None and any(
                name in part.rows and part.config.lora_bias for part in parts
            )
            needs = {
                _PARTS["a_pages"]: targeted,
                _PARTS["bias"]: biased,
                _PARTS["after"]: resident.slot in slab.scaled,
                _PARTS["before"]: name in resident.befores,
                _REPLACED: resident.slot in slab.replaced,
            }
            missing = {part for part, needed in needs.items() if needed} - graphs.parts[name]
            if missing:
                return name, sorted(missing)
        graphs.served.add(resident.serial)
        return None

    def _place(self, residents: Collection[Any]) -> None:
        """Assign a place in the banks to each adapter that replaces modules, if it has none yet."""
        slabs = [slab for slab in self._slabs().values() if slab.replaced]
        for r in residents:
            whole = all(r.slot not in s.replaced or s.replaced[r.slot].rows is None for s in slabs)
            expected, found = "adapters without trainable_token_indices", repr(r.name)
            require(whole, "capturable", "adapters", expected, found, NotImplementedError)
        replacing = [r for r in residents if any(r.slot in slab.replaced for slab in slabs)]
        expected = f"at most {self.replaced} adapters per step that replace modules"
        found = f"{[r.name for r in replacing]!r:.200}"
        require(len(replacing) <= self.replaced, "capturable", "replaced", expected, found)
        self._owners = [owner if owner in replacing else None for owner in self._owners]
        for resident in replacing:
            if resident not in self._owners:
                self._owners[self._owners.index(None)] = resident

    # ---------------------------------------------------------------------------------------------
    # Called by layers

    def rows(self, assignment: Assignment, layout: Layout) -> Rows | None:
        """Return the rows of a layer as views of the buffers that replays read.

        Any slot may occur in the rows, since later replays may use other adapters. A layer cannot
        use the buffers in four cases:

        * ``assignment`` is not the object that was written last. The buffers then contain other
          adapters: those of a block that was entered later, or those of this block before
          ``generate`` changed its rows. The objects are compared by identity because the assignment
          caches the plan, which is valid only while the buffers contain this assignment.
        * The layer is on another device, or has more than ``max_rows`` rows.
        * There is one name per token, and tokens are the first dimension of the layer's input.
        * A name applies to several rows, as in a prefill.

        Returns:
            The rows, or None if the layer cannot use the buffers. The layer then computes its rows
            as without the step.

        Raises:
            ValueError: If one of these cases occurs in a capture, or if the number of names does
                not match the layout.
        """
        device, count = layout.device, math.prod(layout.leading)
        if (
            assignment is not self._assignment
            or device != self.device
            or count > self.max_rows
            or (layout.tokens_first and len(assignment.shape) == 2)
            or (assignment.shape != () and assignment.spread(layout) != (1, 1))
        ):
            if _rows.capture(device) is None:
                return None
            raise ValueError(
                f"capturable: expected a captured forward of at most {self.max_rows} rows on "
                f"{self.device}, each with one of the names written last, found activations of "
                f"shape {(*layout.leading, 'features')} on {device}"
            )
        self.note_capture(device, count)
        return assignment.kept.get(("step", count), device, self._rows, count)

    def _rows(self, count: int) -> Rows:
        weights = self._weights[:count] if self.mixed else None
        return _rows.planned(tuple(range(self.pool.max_slots)), self._ids[:count], weights)

    def table(self, factors: PoolAfter) -> Tensor:
        """Return the table ``(slots + 1, O + 1)`` of a layer's scales, for O outputs.

        The last row is for the base model.
        """
        if factors not in self._after:
            self._check_warm(factors.name)
            table = self._after[factors] = AfterTable(factors, self.pool.max_slots)
            table.follow(self._lease.residents)
        return self._after[factors].c

    def bank(self, name: str) -> tuple[ReplacedBank | None, Tensor]:
        """Return the bank of a module, and the place of each row's adapter in the bank.

        The bank contains the weights of the adapters that replace the module, or is None if no
        adapter in the pool replaces the module.
        """
        slab = self.pool.modules[name]
        whole = any(each.rows is None for each in slab.replaced.values())
        if name not in self._banks and whole and self.replaced:
            self._check_warm(name)
            bank = self._banks[name] = ReplacedBank(slab, self.replaced)
            bank.follow(self._owners)
        return self._banks.get(name), self._places

    def _check_warm(self, name: str) -> None:
        outside = _rows.capture(self.device) is None
        expected = "that the model runs once with these adapters in the pool before the capture"
        require(outside, "capturable", name, expected, "a capture of its first run", RuntimeError)
