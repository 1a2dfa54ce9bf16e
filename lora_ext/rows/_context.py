"""``with adapters([...])``: the block in which layers find the adapter of each row.

A block is entered once per batch and read by hundreds of layers. The first layer with a new layout
computes the ids per row and their plan (rows grouped by adapter). The block's assignment caches
ids and plan for the other layers.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import warnings
import weakref
from collections.abc import Iterator, Set
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _past
from ._activation import Activated, Starts, with_starts
from ._assignment import Assignment, Batch, Layout, Names
from ._attachment import Pool, only_pool, pool_handle
from ._rows import Rows, capturing, planned


class EntryPoint:
    """Thread, task and backward pass in which a block was entered, and whether it was left.

    Copies of a block with other assignments share this object.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        task = _current_task()
        self._task = None if task is None else weakref.ref(task)
        self.backward = torch._C._current_graph_task_id()  # -1 outside of every backward
        self.served = False  # whether a layer has read the block's rows
        self.left = False

    @property
    def here(self) -> bool:
        """True if this thread and this task, not a parent of the task, entered the block."""
        same = self._task if self._task is None else self._task()
        return self.thread == threading.get_ident() and same is _current_task()


def _current_task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


class SlotRows(NamedTuple):
    """Rows of a layer that use certain slots of a pool, sorted by slot."""

    slots: tuple[int, ...]  # slots that a row uses, in ascending order
    rows: Tensor  # (D,) int64, indices of the rows
    which: Tensor  # (D,) int64, for each of `rows` the index of its slot in `slots`
    by_slot: tuple[Tensor, ...]  # the rows of each slot


@dataclass(frozen=True, eq=False)
class Block:
    """An entered ``adapters`` block. It is immutable, so any thread may read it."""

    handle: int  # number of the pool
    lease: Any
    assignment: Assignment
    slots: tuple[int, ...]  # slot of each name of the assignment
    num_slots: int  # number of slots of the pool
    outer: Block | None
    entry: EntryPoint
    #: True if the rows are tokens of many requests that a server has packed into one row.
    packed: bool = False
    #: Block for the output head, if the model passes only some of the tokens to the head.
    head: Block | None = None
    #: Step of :func:`lora_ext.capturable` whose buffers contain the block's slots, or None.
    step: Any = None

    def rows(
        self,
        leading: torch.Size,
        device: torch.device,
        tokens_first: bool = False,
        of_tokens: bool = False,
    ) -> Rows:
        """Return the rows of a layer of the pool, with slots as ids.

        Args:
            leading: Dimensions of the activations before the features, or all dimensions of token
                ids.
            device: Device of the activations.
            tokens_first: Whether ``leading`` is ``(tokens, sequences, ...)``.
            of_tokens: Whether the layer is an embedding. A single row with one id per name is then
                rejected, because the ids may be positions that all sequences share.

        Raises:
            ValueError: If the number of names does not match ``leading``.
            RuntimeError: If the block was left, and a task or thread that was started inside it
                still runs.
        """
        if self.lease.released:
            raise _outlived()
        if of_tokens:
            self.assignment.check_tokens(Layout(leading, device, tokens_first))
        if self.step is not None:
            rows = self.step_rows(current_layout(leading, device, tokens_first))
            if rows is not None:
                return rows
        # The key is not a Layout, because creating one would take a third of the lookup's time. It
        # omits the batch of the model's forward, which decides only whether the names match the
        # shape (`Assignment.spread`). For a cached result the names have matched this shape before,
        # and the ids are the same for any batch.
        key = (leading, tokens_first)
        return self.assignment.kept.get(key, device, self._slot_ids, leading, device, tokens_first)

    def rows_among(
        self,
        names: tuple[str, ...],
        leading: torch.Size,
        device: torch.device,
        tokens_first: bool = False,
        of_tokens: bool = False,
        mixes: bool = False,
    ) -> Rows:
        """Return the rows of a layer with its own adapters, such as a layer of :mod:`lora_ext.nn`.

        ``names`` are the layer's adapters. The ids are indices into ``used``, which contains
        indices into ``names``. Other arguments and errors are those of :meth:`rows` and, for
        ``mixes``, of :meth:`Assignment.rows_among`.
        """
        if self.lease.released:
            raise _outlived()
        layout = Layout(leading, device, tokens_first, _batch.get())
        if of_tokens:
            self.assignment.check_tokens(layout)
        return self.assignment.rows_among(names, layout, mixes)

    def step_rows(self, layout: Layout) -> Rows | None:
        """Return the rows in the buffers of the :func:`lora_ext.capturable` step.

        Returns None if there is no step or the layer cannot use its buffers.
        """
        return None if self.step is None else self.step.rows(self.assignment, layout)

    def slot_rows(self, slots: Set[int], layout: Layout) -> SlotRows | None:
        """Return the rows that use one of these slots of the pool, or None if no row does."""
        serving = {self.slots[place] for place in self.assignment.occurring}
        order = tuple(sorted(slots & serving))
        if not order:
            return None
        key = (order, layout.leading, layout.tokens_first)
        return self.assignment.kept.get(key, layout.device, self._slot_rows, order, layout)

    def _slot_ids(self, *where: Any) -> Rows:
        used = tuple(range(self.num_slots)) if self.assignment.occurring else ()
        layout = current_layout(*where)
        weights = self.assignment.row_weights(layout)
        return planned(used, self.assignment.ids(self.slots, layout), weights)

    def _slot_rows(self, order: tuple[int, ...], layout: Layout) -> SlotRows:
        if capturing(layout.device):
            raise RuntimeError(
                "adapters: expected adapters that neither scale outputs nor replace modules while "
                "a graph is captured, found one that does; use lora_ext.capturable(pool, max_rows)"
            )
        table = [order.index(slot) if slot in order else -1 for slot in self.slots]
        each = self.assignment.ids(table, layout)
        by_slot = tuple((each == i).nonzero()[:, 0] for i in range(len(order)))
        rows = torch.cat(by_slot)
        return SlotRows(order, rows, each[rows].long(), by_slot)

    def remedy(self) -> str:
        """Return the remedy for the error message if names do not match a layer's rows."""
        batch, assignment = _batch.get(), self.assignment
        if batch is None:
            return f"{_ONE_EACH}; {_LEAVE_OUT}"
        names = assignment.shape[0] * assignment.repeat if assignment.shape else batch.sequences
        if isinstance(assignment.places, Tensor) or names == batch.sequences:
            return _LEAVE_OUT
        return f"{_ONE_EACH}; it has {batch.sequences} sequences (a pipeline has batch_size=)"

    def __repr__(self) -> str:
        return f"Block({self.assignment.names})"


_ONE_EACH = "give one name for each sequence of the batch, or adapters('name') for all of them"
_LEAVE_OUT = (
    "if the rows of that module are not the model's sequences or tokens, exclude the module with "
    "AdapterPool(targets=...), or pass token_ids of the module's shape"
)


def _outlived() -> RuntimeError:
    return RuntimeError(
        "adapters: the block was left while tasks or threads that were started inside it still "
        "run; wait for them inside the block, or enter a block in each of them"
    )


_block: ContextVar[Block | None] = ContextVar("lora_ext.adapters", default=None)
_batch: ContextVar[Batch | None] = ContextVar("lora_ext.batch", default=None)
_step: ContextVar[Any] = ContextVar("lora_ext.step", default=None)


def innermost() -> Block | None:
    """Return the innermost block of any pool in this thread and task."""
    return _block.get()


def outwards(block: Block | None) -> Iterator[Block]:
    """Yield a block and its outer blocks, innermost first."""
    while block is not None:
        yield block
        block = block.outer


def innermost_of(block: Block | None, handle: int) -> Block | None:
    """Return the innermost block of a pool among ``block`` and its outer blocks."""
    return next((each for each in outwards(block) if each.handle == handle), None)


def current_layout(leading: torch.Size, device: torch.device, tokens_first: bool) -> Layout:
    """Return the layout of a layer's rows in the forward that this thread and task runs."""
    return Layout(leading, device, tokens_first, _batch.get())


def put(block: Block | None) -> None:
    """Set the innermost block until the surrounding :func:`entered` is left."""
    _block.set(block)
    _record(block)


def current(handle: int, in_graph: bool = False) -> Block | None:
    """Return the block that a layer of a pool must use; every layer calls this function.

    In a forward, this is the innermost block of the pool in this thread and task. If the backward
    pass recomputes a layer, it is the block of the layer's forward.

    Args:
        handle: Number of the pool, from :func:`pool_handle`.
        in_graph: Whether a compiled graph calls this function. The backward of a graph disables
            grad mode.

    Raises:
        RuntimeError: If there is no block while a step of the pool is captured, or if the block of
            the forward cannot be found.
    """
    block = _block.get()
    task = torch._C._current_graph_task_id()  # -1 outside of every backward
    # The context variable does not contain the block of the forward. In the thread that calls
    # backward it contains that thread's current block, and in autograd's threads it is None.
    if task >= 0:
        return _of_forward(handle, task, block, in_graph)
    # A block is recorded for autograd nodes when it is entered or left, but not when asyncio
    # switches to another task. The first layer after a switch records the block of the new task.
    if block is not _past.here.last:
        _past.record(block)
    while block is not None and block.handle != handle:
        block = block.outer
    if block is not None:
        block.entry.served = True
        return block
    if any_block:
        _warn_of_block_elsewhere(handle)
    step = _step.get()
    if step is not None and pool_handle(step.pool) == handle:
        step.check_outside_capture()
    return None


def untouched(pool: Pool, device: torch.device) -> None:
    """Record in the capturable step that a layer without adapters ran on ``device``."""
    step = _step.get()
    if step is not None and step.pool is pool:
        step.note_capture(device)


def _of_forward(handle: int, task: int, block: Block | None, in_graph: bool) -> Block | None:
    """Return the block for a layer that is recomputed in a backward pass.

    Args:
        handle: Number of the pool.
        task: Autograd's id of the backward pass.
        block: Current block. The layer uses it only if it was entered in this backward pass, by a
            checkpointed function that contains ``with adapters(...)``.
        in_graph: See :func:`current`.
    """
    inside = block is not None and block.entry.backward == task
    block = innermost_of(block if inside else _past.block_of_forward(task), handle)
    if block is None or inside:
        return block
    # Only a reentrant checkpoint inside the recomputed region disables grad mode. Its node is
    # created now and not in the forward, so it does not lead to the block of the forward.
    if not torch.is_grad_enabled() and not in_graph:
        raise RuntimeError(
            "adapters: expected no reentrant checkpoint inside another, found one: the inner one "
            "has no node in the forward's graph; pass use_reentrant=False"
        )
    if block.lease.released:
        # The adapters were unpinned when the block was left. Pin them again until the end of this
        # backward pass, when autograd calls the queued callback.
        block.lease.renew()
        torch.autograd.Variable._execution_engine.queue_callback(block.lease.__exit__)
    return block


@contextlib.contextmanager
def context_value(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Set a context variable during a ``with`` block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def in_step(step: Any) -> contextlib.AbstractContextManager[None]:
    """Return a context manager in which blocks of a step's pool write their slots to the step."""
    return context_value(_step, step)


def forward_of(batch: Batch | None) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that stores the batch of a model's forward for its layers."""
    return context_value(_batch, batch)


# -------------------------------------------------------------------------------------------------
# Entering

#: True while a block is open in any thread. Compiled graphs are guarded on this value: one graph is
#: compiled for calls without blocks and another one for calls with blocks.
any_block = False
#: True while an open block has activated adapters, which compiled graphs do not support.
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
    """Use these adapters for the rows of every forward inside the block.

    The adapters are pinned in the pool until the block is left. Blocks can be nested; layers use
    the innermost block of their pool. Each thread and each asyncio task has its own blocks, and a
    new thread starts without a block. If a backward pass recomputes layers (activation
    checkpointing), they use the block of the forward, even if that block was left.

    Args:
        names: One name per sequence of the batch; one name per token, as a list of all rows or a
            list of lists; or a single name for all rows. None and ``"__base__"`` select the base
            model. Instead of a name, ``("a", 0.5)`` multiplies the update of adapter "a" by 0.5,
            and ``{"a": 0.7, "b": 0.3}`` is the weighted sum of several adapters (a mixture).
        token_ids: Index into ``names`` for each token, -1 for the base model: an integer tensor in
            the shape of the activations without features, ``(B, T)`` or ``(rows,)``. The tensor is
            copied and checked when the block is entered, which waits for the device.
        input_ids: Token ids of the prompts, ``(B, T)``, for activated adapters (aLoRA). Such an
            adapter applies to the tokens of a row from the last occurrence of its invocation (a
            token sequence). A row without the invocation uses the base model, with a warning.
            Default: the ids of each forward, if a transformers model is attached.
        starts: Positions at which activated adapters begin, if they are known: one per name,
            counted in the tokens of the row including padding. If an entry is None, an activated
            adapter applies to no token of the row, and an ordinary adapter to all tokens.
        pool: Pool that contains the adapters. Default: the only pool with an attached model; or all
            layers of :mod:`lora_ext.nn`, if there are such layers and no attached model.

    Raises:
        UnknownAdapterError: If a name is unknown to the pool, or to all layers of ``lora_ext.nn``.
        TypeError: If a weight is not a real number.
        NotImplementedError: If the update of an adapter in a mixture, or with a weight other than
            1, is not a product of two factors: see :meth:`AdapterPool.acquire`.
        ValueError: If there are no names; if lists have unequal lengths; if a weight is not finite;
            if the adapters of a mixture together exceed the pool's ``max_rank``; if ``token_ids``
            are not integers in ``[-1, len(names))``; if more than one of ``token_ids``,
            ``input_ids`` and ``starts`` is not None; or if ``pool`` is None and several pools have
            attached models.
        RuntimeError: If ``pool`` is None and there is no pool.

    A forward inside the block raises ValueError if the batch does not have the size of ``names`` or
    the shape of ``token_ids``, or if a start is not known.
    """
    with of_call(names, token_ids, pool=pool, input_ids=input_ids, starts=starts) as block:
        if block.outer is not None:
            _warn_of_nested_block(block)
        yield


@contextlib.contextmanager
def of_call(
    names: Names, token_ids: Tensor | None = None, *, pool: Pool | None = None, **prompt: Any
) -> Iterator[Block]:
    """Enter a block of :func:`adapters` around one call, without a warning if it is nested."""
    assignment = Assignment.of(names, token_ids)
    pool = only_pool() if pool is None else pool
    step = _step.get()
    if step is not None and step.pool is pool:
        step.write(assignment)
    else:
        step = None
    with pool.acquire(assignment.asked) as lease:
        assignment = with_starts(assignment, lease.invocations, token_ids, **prompt)
        block = Block(
            pool_handle(pool),
            lease,
            assignment,
            tuple(lease),
            pool.max_slots,
            _block.get(),
            EntryPoint(),
            step=step,
        )
        _count(block)
        try:
            # Do not reset the context variable with its token: that would restore the outer block
            # even if the outer block was left first. `_leave` chooses the innermost open block.
            put(block)
            yield block
        finally:
            block.entry.left = True
            _count(block)
            _leave(block)


@contextlib.contextmanager
def entered(block: Block | None) -> Iterator[None]:
    """Make a block the innermost one during a ``with`` block."""
    try:
        with context_value(_block, block):
            _record(block)
            yield
    finally:
        _record(_block.get())


def _record(block: Block | None) -> None:
    """Record the block of the next autograd nodes; do nothing while a backward pass is running."""
    if torch._C._current_graph_task_id() < 0:
        _past.record(block)


def _count(block: Block) -> None:
    """Add a block to the open blocks, or remove it if it was left."""
    global any_block, any_activated, _changes
    with _open_lock:
        if block.entry.left:
            del _open[id(block)]
        else:
            _open[id(block)] = block
        any_block = bool(_open)
        any_activated = any(isinstance(block.assignment, Activated) for block in _open.values())
        _changes += 1


def _leave(block: Block) -> None:
    found = _block.get()
    if found is None or found.entry is not block.entry:
        raise RuntimeError(
            f"adapters: expected the innermost block to be left first, found {found} innermost "
            f"while {block} is left; a generator should leave a block before it yields"
        )
    put(next((outer for outer in outwards(block.outer) if not outer.entry.left), None))


# -------------------------------------------------------------------------------------------------
# Warnings about forwards to which a block does not apply, or applies by mistake

_changes = 0  # number of times that a block was entered or left, in any thread
_warned_elsewhere: set[int] = set()  # handles of pools, see `_warn_of_block_elsewhere`
_warned_nested: set[int] = set()  # handles of pools, see `_warn_of_nested_block`

# A context variable belongs to a thread or task, not to a generator. If a generator yields inside a
# block, the block stays open for the generator's caller. If two such generators alternate, both use
# the block of the one that entered last. This code cannot detect generators; it only knows the
# order in which blocks are entered and left. Two signs reveal the mistake:
# * A block is entered inside another one that a layer has used. Correct code rarely does this, so
#   `_warn_of_nested_block` warns once per pool, before a layer uses the inner block.
# * A block is left while another one is innermost. `_leave` raises an error.


def _warn_of_nested_block(block: Block) -> None:
    outer = innermost_of(block.outer, block.handle)
    if (
        outer is None
        or block.handle in _warned_nested
        or not (outer.entry.served and outer.entry.here)
        or not block.assignment.names  # a block with only the base model is intended
        or outer.assignment.same_as(block.assignment)
    ):
        return
    _warned_nested.add(block.handle)
    inner, around = block.assignment.each(), outer.assignment.each()
    warnings.warn(
        f"adapters: a block of {inner!r:.200} is entered inside a block of {around!r:.200} that a "
        "forward has used. Until it is left, all forwards of this thread and task use it, even "
        "forwards of a generator that yielded in the outer block. Leave a block before a yield, "
        "or pass adapter_names= to each call",
        stacklevel=4,
    )


def _warn_of_block_elsewhere(handle: int) -> None:
    """Warn once per pool that this thread has no block, if another thread has one."""
    if handle in _warned_elsewhere or _past.here.looked.get(handle) == _changes:
        return
    _past.here.looked[handle] = _changes
    thread = threading.current_thread()
    elsewhere = [
        block
        for block in list(_open.values())
        if block.handle == handle
        and block.entry.thread != thread.ident
        and block.assignment.names  # a block with only the base model needs no warning
    ]
    if elsewhere:
        _warned_elsewhere.add(handle)
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        other = names.get(elsewhere[-1].entry.thread)
        warnings.warn(
            f"adapters: thread {thread.name!r} runs a model without a block, and so uses the base "
            "model, the default of attach or the active adapters of layers, while thread "
            f"{other!r} is inside "
            f"adapters({list(elsewhere[-1].assignment.names)!r:.200}): a block does not apply to "
            "other threads. Enter adapters(...) in the thread, or pass adapter_names= to the "
            "call; adapters(None) selects the base model without a warning",
            stacklevel=4,
        )
