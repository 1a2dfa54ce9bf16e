"""``with adapters([...])``: the block that every layer with adapters reads.

A block is entered once per batch and read by hundreds of layers. What they share, ids per row and
the plan that groups the rows, is computed by the first layer that sees a shape and kept with the
block.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Set
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _past
from ._activation import Activated, Starts, begun
from ._assignment import Assignment, Batch, Names, TokensFirstError
from ._attachment import Pool, UnknownAdapterError, only_pool, pool_handle
from ._entry import Entry
from ._rows import Rows, capturing

__all__ = ["Block", "Names", "Pool", "TokensFirstError", "UnknownAdapterError", "adapters"]


class Step(Protocol):
    """What a block needs of :func:`lora_ext.capturable`, into which its names go."""

    pool: Any

    def write(self, assignment: Assignment) -> None:
        """Let replays serve these names."""

    def note_capture(self, device: torch.device, rows: int = 0) -> None:
        """A layer is computed."""

    def check_outside_capture(self) -> None:
        """A layer is computed outside of every block."""

    def table(self, factors: Any) -> Tensor:
        """DoRA's factors of a layer, by slot."""
        ...

    def bank(self, name: str) -> tuple[Any, Tensor]:
        """Weights of the adapters that replace a module, and the place of each row."""
        ...

    def rows(
        self,
        assignment: Assignment,
        leading: torch.Size,
        device: torch.device,
        tokens_first: bool,
        batch: Batch | None,
    ) -> Rows | None:
        """Rows that replays follow; None where these names are not the step's."""


@dataclass(frozen=True, eq=False)
class Block:
    """One entered ``adapters`` block. Frozen: even what its assignment keeps are equal entries from
    any thread."""

    handle: int  # of the pool
    lease: Any
    assignment: Assignment
    slots: tuple[int, ...]  # one per name of the assignment
    num_slots: int
    outer: Block | None
    entry: Entry
    task: int = -1  # the backward inside which it was entered
    #: Rows are tokens of many requests, packed by a server.
    packed: bool = False
    #: What the output head reads where the model gives it some of the tokens alone.
    head: Block | None = None
    #: Whose buffers its names were written into.
    step: Step | None = None

    def rows(
        self,
        leading: torch.Size,
        device: torch.device,
        tokens_first: bool = False,
        of_tokens: bool = False,
    ) -> Rows:
        """Rows of activations ``(*leading, I)``, or of tokens ``leading``, for a pool's layer: ids
        are slots."""
        if self.lease.released:
            raise _outlived()
        if of_tokens:
            self.assignment.check_tokens(leading, tokens_first)
        found = self.rows_of_step(leading, device, tokens_first)
        if found is not None:
            return found
        key = (leading, tokens_first)
        return self.assignment.kept.get(key, device, self._rows, leading, device, tokens_first)

    def rows_of_step(
        self, leading: torch.Size, device: torch.device, tokens_first: bool
    ) -> Rows | None:
        """Rows that a captured graph follows; None outside of :func:`lora_ext.capturable`."""
        if self.step is None:
            return None
        where = leading, device, tokens_first, _batch.get()
        return self.step.rows(self.assignment, *where)

    def _rows(self, leading: torch.Size, device: torch.device, tokens_first: bool) -> Rows:
        used = tuple(range(self.num_slots)) if self.assignment.occurring else ()
        return self.assignment.rows(used, self.slots, leading, device, tokens_first, _batch.get())

    def rows_among(
        self,
        names: tuple[str, ...],
        leading: torch.Size,
        device: torch.device,
        tokens_first: bool = False,
        of_tokens: bool = False,
    ) -> Rows:
        """Rows for a layer with these adapters of its own, likewise."""
        if self.lease.released:
            raise _outlived()
        if of_tokens:
            self.assignment.check_tokens(leading, tokens_first)
        return self.assignment.among(names, leading, device, tokens_first, _batch.get())

    def rows_of_slots(
        self, slots: Set[int], leading: torch.Size, device: torch.device, tokens_first: bool
    ) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """Those of ``slots`` that serve a row, these rows, and which of the slots serves each."""
        order = tuple(sorted(slots & self._serving))
        if not order:
            return (), _NOTHING, _NOTHING
        key = (order, leading, tokens_first)
        return self.assignment.kept.get(
            key, device, self._rows_of_slots, order, leading, device, tokens_first
        )

    def _rows_of_slots(
        self, order: tuple[int, ...], leading: torch.Size, device: torch.device, tokens_first: bool
    ) -> tuple[tuple[int, ...], Tensor, Tensor]:
        if capturing(device):
            raise RuntimeError(
                "adapters: expected no DoRA adapter and no replaced module while a CUDA graph is "
                "captured, found one: its rows and factors are chosen on the host; capture inside "
                "lora_ext.capturable(pool, max_rows)"
            )
        table = [order.index(slot) if slot in order else -1 for slot in self.slots]
        each = self.assignment.per_row(table, leading, device, tokens_first, _batch.get())
        rows = (each >= 0).nonzero()[:, 0]
        return order, rows, each[rows].long()

    def rows_of_each(
        self, slots: Set[int], leading: torch.Size, device: torch.device, tokens_first: bool
    ) -> tuple[tuple[int, Tensor], ...]:
        """Those of ``slots`` that serve a row, each with its rows."""
        order = tuple(sorted(slots & self._serving))
        if not order:
            return ()
        key = ("each", order, leading, tokens_first)
        return self.assignment.kept.get(
            key, device, self._rows_of_each, order, leading, device, tokens_first
        )

    def _rows_of_each(self, order: tuple[int, ...], *where: Any) -> tuple[tuple[int, Tensor], ...]:
        _, rows, which = self._rows_of_slots(order, *where)
        return tuple((slot, rows[which == i]) for i, slot in enumerate(order))

    def remedy(self) -> str:
        """Return the remedy for names that do not fit the rows of a pool's layer."""
        batch, assignment = _batch.get(), self.assignment
        if batch is None:
            return f"{_ONE_EACH}; {_LEAVE_OUT}"
        names = assignment.shape[0] * assignment.repeat if assignment.shape else batch.sequences
        if isinstance(assignment.places, Tensor) or names == batch.sequences:
            return _LEAVE_OUT
        return f"{_ONE_EACH}: it has {batch.sequences} (set by batch_size= in a pipeline)"

    @property
    def _serving(self) -> frozenset[int]:
        return frozenset(self.slots[place] for place in self.assignment.occurring)

    def __repr__(self) -> str:
        return f"Block({self.assignment.names})"


_NOTHING = torch.empty(0, dtype=torch.int64)
_ONE_EACH = "give one name for each sequence of the batch, or adapters('name') for all of them"
_LEAVE_OUT = (
    "if the rows of that module are not the model's sequences or tokens, leave it out with "
    "AdapterPool(targets=...), or give token_ids of the module's shape"
)


def _outlived() -> RuntimeError:
    return RuntimeError(
        "adapters: the block was left while work started inside it still runs, and its adapters "
        "are no longer pinned; wait for tasks and threads inside the block, or enter one in each "
        "of them"
    )


_block: ContextVar[Block | None] = ContextVar("lora_ext.adapters", default=None)
_batch: ContextVar[Batch | None] = ContextVar("lora_ext.batch", default=None)
_step: ContextVar[Step | None] = ContextVar("lora_ext.step", default=None)


def innermost() -> Block | None:
    """The innermost block of all pools, in this thread and task."""
    return _block.get()


def put(block: Block | None) -> None:
    """Let another block be the innermost, until :func:`entered` around is left."""
    _block.set(block)
    _note(block)


def current(handle: int, in_graph: bool = False) -> Block | None:
    """The innermost block entered for this pool, in this thread and task; in a backward, which
    computes a layer again, the one that the layer's forward saw.

    Args:
        handle: of the pool. in_graph: a compiled graph asks, whose backward has no grad mode.
    """
    block = _block.get()
    task = torch._C._current_graph_task_id()
    if task >= 0:  # inside a backward, whose thread may be autograd's own, without our contextvars
        return _of_forward(handle, task, block, in_graph)
    # A switch between tasks changes the context where nobody enters or leaves a block.
    if block is not _past.here.last:
        _past.note(block)
    while block is not None and block.handle != handle:
        block = block.outer
    if block is not None:
        block.entry.served = True
        return block
    if any_block:
        _look_for_a_lost_block(handle)
    step = _step.get()
    if step is not None and pool_handle(step.pool) == handle:
        step.check_outside_capture()
    return None


def untouched(pool: Pool, device: torch.device) -> None:
    """A layer of this pool is computed that no adapter has touched yet, nor a captured graph will
    let one touch."""
    step = _step.get()
    if step is not None and step.pool is pool:
        step.note_capture(device)


def _of_forward(handle: int, task: int, block: Block | None, in_graph: bool) -> Block | None:
    inside = block is not None and block.task == task  # a block that this backward has entered
    if not inside:
        block = _past.block_of_forward(task)
    while block is not None and block.handle != handle:
        block = block.outer
    if block is None or inside:
        return block
    if not torch.is_grad_enabled() and not in_graph:
        raise RuntimeError(
            "adapters: expected no reentrant checkpoint inside another, found one: the inner one "
            "has no node in the forward's graph; give use_reentrant=False"
        )
    if block.lease.released:  # the forward's block was left: its adapters are pinned again until
        block.lease.renew()  # the backward ends, which is when autograd calls what is queued
        torch.autograd.Variable._execution_engine.queue_callback(block.lease.__exit__)
    return block


@contextlib.contextmanager
def in_step(step: Step) -> Iterator[None]:
    """Inside, blocks of the step's pool write their names into it."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


@contextlib.contextmanager
def forward_of(batch: Batch | None) -> Iterator[None]:
    """Inside, a model computes this batch: its layers may see it flattened or turned."""
    token = _batch.set(batch)
    try:
        yield
    finally:
        _batch.reset(token)


# -------------------------------------------------------------------------------------------------
# Entering

#: Whether a block is open, in any thread. A compiled graph is guarded by it: one graph for the time
#: without blocks, one for the time with.
any_block = False
#: Whether one of them has adapters that begin in mid-sequence, for which no compiled graph looks.
any_activated = False
_open: dict[int, Block] = {}  # by id
_open_lock = threading.Lock()


@contextlib.contextmanager
def adapters(
    names: Names,
    token_ids: Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    starts: Starts = None,
    pool: Pool | None = None,
) -> Iterator[None]:
    """Serve the rows of every forward inside the block with these adapters.

    The adapters are pinned in the pool until the block is left. Blocks nest: the innermost one of
    a pool counts. Each thread and each asyncio task has its own; a new thread starts without any.
    A backward that computes layers again (activation checkpointing) sees the block of their
    forward, also when it has been left since.

    Args:
        names: one name per sequence of the batch; or one per token, as a list of all rows or a
            list of lists; or a single one for every row. None and ``"__base__"`` are the base
            model.
        token_ids: for each token the place of its name in ``names``, -1 for the base model:
            integers of the shape of the activations without features, ``(B, T)`` or ``(rows,)``.
            They are copied and checked here, which waits for the device.
        input_ids: the prompts, ``(B, T)`` integers: an activated adapter serves its row from the
            last place on at which its invocation stands there, and a row without it is the base
            model's, with a warning. Default: the forwards' own, where a model of transformers is
            attached.
        starts: these places, where they are known: one per name, counted in the row's tokens, pads
            too; None: an activated adapter serves none of the row, an ordinary one all.
        pool: default is the pool of the attached models, or the adapters of the layers of
            :mod:`lora_ext.nn`, when there is but one of them.

    Raises:
        UnknownAdapterError: a name that the pool, or every layer, lacks. ValueError: no names,
            lists of unequal lengths, ``token_ids`` that are no integers in ``[-1, len(names))``,
            more than one of the three, or several pools to choose from. And from the model's
            forward, when the batch has another size than ``names`` or another shape than
            ``token_ids``, or where an activated adapter begins is not to be seen.
    """
    with of_call(names, token_ids, input_ids=input_ids, starts=starts, pool=pool) as block:
        if block.outer is not None:
            _tell_of_a_block_inside_another(block)
        yield


@contextlib.contextmanager
def of_call(
    names: Names,
    token_ids: Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    starts: Starts = None,
    pool: Pool | None = None,
) -> Iterator[Block]:
    """:func:`adapters` around one call, which is over before anybody else goes on."""
    assignment = Assignment.of(names, token_ids)
    pool = only_pool() if pool is None else pool
    step = _step.get()
    if step is not None and step.pool is pool:
        step.write(assignment)
    else:
        step = None
    with pool.acquire(assignment.names) as lease:
        assignment = begun(assignment, lease.invocations, token_ids, input_ids, starts)
        outer = _block.get()
        block = Block(
            pool_handle(pool),
            lease,
            assignment,
            tuple(lease),
            pool.max_slots,
            outer,
            Entry(),
            torch._C._current_graph_task_id(),
            step=step,
        )
        with _open_lock:
            _open[id(block)] = block
            _count_open()
        try:
            # Without a token: it would put back the block around, which may have been left before.
            put(block)
            yield block
        finally:
            with _open_lock:
                del _open[id(block)]
                _count_open()
            block.entry.left = True
            _leave(block)


@contextlib.contextmanager
def entered(block: Block | None) -> Iterator[None]:
    token = _block.set(block)
    try:
        _note(block)
        yield
    finally:
        _block.reset(token)
        _note(_block.get())


def _note(block: Block | None) -> None:
    if torch._C._current_graph_task_id() < 0:
        _past.note(block)


def _count_open() -> None:
    global any_block, any_activated, _changes
    any_block = bool(_open)
    any_activated = any(isinstance(block.assignment, Activated) for block in _open.values())
    _changes += 1


def _leave(block: Block) -> None:
    innermost = _block.get()
    if innermost is None or innermost.entry is not block.entry:
        raise RuntimeError(
            f"adapters: expected the innermost block to be left first, found {innermost} where "
            f"{block} is left: a generator that yields inside a block leaves it to whoever drives "
            "the generator; enter and leave a block between two yields"
        )
    outer = block.outer
    while outer is not None and outer.entry.left:
        outer = outer.outer
    put(outer)


# -------------------------------------------------------------------------------------------------
# Forwards that a block does not reach


# A generator that yields inside a block leaves it to whoever drives the generator: contextvars
# belong to threads and tasks, and no block can see who runs inside it. Where two such generators
# alternate, the block that was entered last serves both. What blocks do know by themselves is the
# order in which they come and go. A block inside another one that has served already is what
# alternating looks like, and rare otherwise: a warning tells of it once, before a row of it is
# served. Leaving in another order than entering raises, in `_leave`.


def _tell_of_a_block_inside_another(block: Block) -> None:
    outer = block.outer
    while outer is not None and outer.handle != block.handle:
        outer = outer.outer
    if (
        outer is None
        or block.handle in _told
        or not (outer.entry.served and outer.entry.here)
        or not block.assignment.names  # the base model by a block of its own: it is meant
        or outer.assignment.same_as(block.assignment)
    ):
        return
    _told.add(block.handle)
    inner, around = block.assignment.each(), outer.assignment.each()
    warnings.warn(
        f"adapters: a block of {inner!r:.200} is entered inside one of {around!r:.200} that has "
        "served: until it is left it serves every forward of this thread and task, also those of a "
        "generator that has yielded inside the block around and goes on. Leave a block before a "
        "yield, or give adapter_names= to each call",
        stacklevel=4,
    )


_changes = 0  # of what is open
_warned: set[int] = set()  # pools
_told: set[int] = set()  # pools, of blocks inside blocks


def _look_for_a_lost_block(handle: int) -> None:
    """Warn, once for a pool, where one thread serves without a block and another one has one."""
    if handle in _warned or _past.here.looked.get(handle) == _changes:
        return
    _past.here.looked[handle] = _changes
    thread = threading.current_thread()
    elsewhere = [
        block
        for block in list(_open.values())
        if block.handle == handle
        and block.entry.thread != thread.ident
        and block.assignment.names  # a block of the base model is nothing to miss
    ]
    if elsewhere:
        _warned.add(handle)
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        other = names.get(elsewhere[-1].entry.thread)
        warnings.warn(
            f"adapters: thread {thread.name!r} runs a model without a block, and serves the base "
            "model, attach's default or what its layers have active, while thread "
            f"{other!r} is inside "
            f"adapters({list(elsewhere[-1].assignment.names)!r:.200}): a block does not reach "
            "other threads. Enter adapters(...) in the thread, or give adapter_names= to the "
            "call; adapters(None) says that the base model is meant",
            stacklevel=4,
        )
