"""Which adapter serves which row: ``with adapters([...])``, read by every layer with adapters.

A context is entered once per batch and read by hundreds of layers. What they share, one id per row
and the plan that groups the rows, is computed by the first layer that sees a shape and kept until
the block is left.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence, Set
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_ext import ops

Names = str | None | Sequence[str | None] | Sequence[Sequence[str | None]]
Rows = tuple[Tensor | None, Tensor | None]  # ids (T,) and their plan, or two None: base model only

# A decode step has one or two shapes; without a KV cache every step brings a new one.
_MAX_SHAPES = 32


class UnknownAdapterError(KeyError):
    """Nobody has an adapter of that name."""

    def __str__(self) -> str:
        """The message without KeyError's quotes."""
        return self.args[0]


class Pool(Protocol):
    """What is needed of :class:`lora_ext.AdapterPool`; this floor does not import that one."""

    max_slots: int
    modules: Any

    def acquire(self, names: Sequence[str | None]) -> Any:
        """Pin adapters: a list of slots that is a context manager and knows ``released``."""


@dataclass(frozen=True, eq=False)
class Active:
    """One entered ``adapters`` block. Frozen: even the cache gets equal entries from any thread."""

    handle: int  # of the pool
    lease: Any
    slots: tuple[int, ...]  # one per name
    shape: tuple[int, ...]  # (): every row; (n,): n sequences or rows; (B, L): each token
    num_slots: int
    outer: Active | None
    repeat: int = 1  # rows per name: beams, or returned sequences
    cache: dict[Hashable, Any] = field(default_factory=dict)
    # Whether names were read as one per "sequence" or "row", and by activations of which shape.
    readings: dict[str, torch.Size] = field(default_factory=dict)

    def rows(self, leading: torch.Size, device: torch.device, of_tokens: bool = False) -> Rows:
        """Ids and plan for activations of shape ``(*leading, I)``, or for tokens ``leading``."""
        if of_tokens:
            self.check_tokens(leading)
        return self.cached((leading, device), lambda: self._compute(leading, device))

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What the first layer to ask under this key computed."""
        if self.lease.released:
            raise RuntimeError(
                "adapters: the block was left while work started inside it still runs, and its "
                "adapters are no longer pinned; wait for tasks and threads inside the block, or "
                "enter one in each of them"
            )
        found = self.cache.get(key)
        if found is None:
            found = compute()
            if len(self.cache) >= _MAX_SHAPES:
                self.cache.clear()
            self.cache[key] = found
        return found

    def _compute(self, leading: torch.Size, device: torch.device) -> Rows:
        copies = self.copies(leading)
        if max(self.slots) < 0:
            return None, None
        # Ordinary tensors even inside inference mode: a later forward of the same block may need
        # gradients.
        with torch.inference_mode(False), torch.no_grad():
            slots = torch.tensor(self.slots, dtype=torch.int32, device="cpu")
            ids = slots.repeat_interleave(copies).to(device)  # (T,)
            return ids, ops.lora_plan(ids, self.num_slots)

    def rows_of(
        self, slots: Set[int], leading: torch.Size, device: torch.device
    ) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """Those of ``slots`` that serve a row, these rows, and which of the slots serves each."""
        used = self.cached("slots", lambda: frozenset(self.slots)).intersection(slots)

        def compute() -> tuple[tuple[int, ...], Tensor, Tensor]:
            copies, order = self.copies(leading), sorted(used)
            with torch.inference_mode(False), torch.no_grad():
                known = torch.tensor(order, dtype=torch.int64, device="cpu")
                each = torch.tensor(self.slots, dtype=torch.int64, device="cpu")
                each = each.repeat_interleave(copies)  # (T,)
                rows = torch.isin(each, known).nonzero()[:, 0]
                which = torch.searchsorted(known, each[rows])
                return tuple(order), rows.to(device), which.to(device)

        return self.cached((leading, device, used), compute)

    def copies(self, leading: torch.Size) -> int:
        """How many consecutive rows take each slot."""
        rows = math.prod(leading)
        if self.shape == ():
            return rows
        named = len(self.slots)
        if len(self.shape) == 1 and leading[:1] == (named * self.repeat,):
            if rows > named * self.repeat:
                self._read_as("sequence", leading)
            return rows // named
        flat = len(self.shape) == 1
        if self.repeat == 1 and rows == named and (flat or leading in (self.shape, (named,))):
            if flat:
                self._read_as("row", leading)
            return 1
        if len(self.shape) == 2:
            expected = f"{self.shape[0]} sequences of {self.shape[1]} tokens"
        elif self.repeat == 1:
            expected = f"a batch of {named} sequences, or {named} rows"
        else:
            expected = (
                f"a batch of {named * self.repeat} = {named} names x {self.repeat} beams or returns"
            )
        raise ValueError(
            f"adapters: names: expected {expected}, "
            f"found activations of shape {_activations(leading)}"
        )

    def _read_as(self, unit: str, leading: torch.Size) -> None:
        """One list of names is one per sequence or one per row, and not the one here and the other
        there: rows that all sequences share, such as positions, can be as many by chance."""
        readings = {**self.readings, unit: leading}
        if len(self.slots) > 1 and len(readings) == 2:
            per_sequence, per_row = readings["sequence"], readings["row"]
            raise ValueError(
                f"adapters: names: found them read as one per sequence by activations of shape "
                f"{_activations(per_sequence)} and as one per row by {_activations(per_row)}; rows "
                "that all sequences share have no adapter of their own: expected no adapter on "
                "that module (or a list of names for each sequence, one per token)"
            )
        self.readings[unit] = leading

    def check_tokens(self, leading: torch.Size) -> None:
        """Refuse one list of names for one row of tokens: it may be of positions, which the
        sequences that the names mean share."""
        named = len(self.slots)
        if self.shape == (named,) != (1,) and leading == (1, named):
            raise ValueError(
                f"adapters: names: found {named} for an embedding that sees one row of {named} "
                f"tokens or positions: expected [[...]], a list for each sequence, where each "
                "token has a name; positions that all sequences share have no adapter of their own"
            )


def _activations(leading: torch.Size) -> str:
    return f"({', '.join(map(str, (*leading, 'features')))})"


_active: ContextVar[Active | None] = ContextVar("lora_ext.adapters", default=None)
_handles: weakref.WeakKeyDictionary[Pool, int] = weakref.WeakKeyDictionary()
_counter = itertools.count()


def pool_handle(pool: Pool) -> int:
    """A number for the pool that a compiled graph can hold."""
    return _handles.setdefault(pool, next(_counter))


def current(handle: int) -> Active | None:
    """The innermost block entered for this pool, in this thread and task."""
    active = _active.get()
    while active is not None and active.handle != handle:
        active = active.outer
    return active


# -------------------------------------------------------------------------------------------------
# Attached models

#: What ``attach`` left on models that are still alive, and layers that keep adapters of their own:
#: objects with a ``pool``.
attachments: weakref.WeakSet[Any] = weakref.WeakSet()

#: Blocks that are open now, in any thread. A compiled graph is guarded by ``any_block``: one graph
#: for the time without blocks, one for the time with.
any_block = False
_blocks = 0
_blocks_lock = threading.Lock()


def _count_blocks(step: int) -> None:
    global _blocks, any_block
    with _blocks_lock:
        _blocks += step
        any_block = _blocks > 0


def _only_pool() -> Pool:
    pools = {id(a.pool): a.pool for a in attachments}
    if len(pools) > 1:
        gc.collect()  # models that nobody holds any more may wait for the collector
        pools = {id(a.pool): a.pool for a in attachments}
    if not pools:
        raise RuntimeError(
            "adapters: expected an attached model, found none; call lora_ext.attach(model, pool), "
            "or give pool="
        )
    if len(pools) > 1:
        raise ValueError(
            f"adapters: pool: expected one of the {len(pools)} pools that have models attached, "
            "found None (lora_ext.nn.layer_names stands for layers with adapters of their own)"
        )
    return next(iter(pools.values()))


@contextlib.contextmanager
def adapters(names: Names, *, pool: Pool | None = None) -> Iterator[None]:
    """Serve the rows of every forward inside the block with these adapters.

    The adapters are pinned in the pool until the block is left. Blocks nest: the innermost one of
    a pool counts. Each thread and each asyncio task has its own; a new thread starts without any.

    Args:
        names: one name per sequence of the batch; or one per token, as a list of all rows or a
            list of lists; or a single one for every row. None and ``"__base__"`` are the base
            model.
        pool: default is the pool of the attached models, or the adapters of the layers of
            :mod:`lora_ext.nn`, when there is but one of them.

    Raises:
        UnknownAdapterError: a name that the pool, or every layer, lacks. ValueError: no names,
            lists of unequal lengths, or several pools to choose from. And from the model's
            forward, when the batch has another size than ``names``.
    """
    flat, shape = parse(names)
    pool = _only_pool() if pool is None else pool
    unique = list(dict.fromkeys(flat))
    with pool.acquire(unique) as lease:
        slot_of = dict(zip(unique, lease, strict=True))
        slots = tuple(slot_of[name] for name in flat)
        handle = pool_handle(pool)
        active = Active(handle, lease, slots, shape, pool.max_slots, outer=_active.get())
        token = _active.set(active)
        _count_blocks(1)
        try:
            yield
        finally:
            _count_blocks(-1)
            _active.reset(token)


def parse(names: Names) -> tuple[list[str | None], tuple[int, ...]]:
    """All names in a row, and whom they are for: :attr:`Active.shape`."""
    if names is None or isinstance(names, str):
        return [names], ()
    if not isinstance(names, Sequence) or not names:
        raise ValueError(f"adapters: names: expected a name or a list of names, found {names!r}")
    # pyright does not narrow a sequence by all(...) over its elements.
    if all(name is None or isinstance(name, str) for name in names):
        return list(names), (len(names),)  # pyright: ignore[reportReturnType]
    if all(isinstance(row, list | tuple) for row in names):
        lengths = sorted({len(row) for row in names})  # pyright: ignore[reportArgumentType]
        if len(lengths) != 1 or lengths[0] == 0:
            raise ValueError(
                f"adapters: names: expected as many names for every sequence, "
                f"found lengths {lengths}"
            )
        flat = [name for row in names for name in row]  # pyright: ignore[reportOptionalIterable]
        if all(name is None or isinstance(name, str) for name in flat):
            return flat, (len(names), lengths[0])
    raise ValueError(f"adapters: names: expected names (str or None), found {names!r:.200}")


@contextlib.contextmanager
def generation_scope() -> Iterator[None]:
    """What :func:`repeat_rows` does lasts until this block is left."""
    token = _active.set(_active.get())
    try:
        yield
    finally:
        _active.reset(token)


def repeat_rows(handle: int, count: int) -> None:
    """From now on every sequence comes ``count`` times in a row, as ``generate`` expands a
    batch."""
    active = current(handle)
    if active is not None and count > 1:
        _active.set(replace(active, outer=_active.get(), repeat=count, cache={}))


# -------------------------------------------------------------------------------------------------
# torch.compile cannot see a ContextVar. The graph asks for its ids through an op that reads it
# while the graph runs, so one graph serves every assignment of rows to adapters.

_library = torch.library.Library("lora_ext", "FRAGMENT")
_library.define(
    "active_adapter_ids(int handle, SymInt[] leading, Device device, bool of_tokens) -> Tensor",
    tags=(
        torch.Tag.pt2_compliant_tag,
        torch.Tag.cudagraph_unsafe,
    ),  # a replay would not read it again
)


def _active_adapter_ids(
    handle: int, leading: Sequence[int], device: torch.device, of_tokens: bool
) -> Tensor:
    active = current(handle)
    shape = torch.Size(leading)
    ids = None if active is None else active.rows(shape, device, of_tokens)[0]
    if ids is None:
        return torch.full((math.prod(shape),), -1, dtype=torch.int32, device=device)
    return ids.clone()  # a graph may reuse the memory of what an op returns


_library.impl("active_adapter_ids", _active_adapter_ids, "CompositeExplicitAutograd")


@torch.library.register_fake("lora_ext::active_adapter_ids", lib=_library)
def _fake_active_adapter_ids(
    handle: int, leading: Sequence[int], device: torch.device, of_tokens: bool
) -> Tensor:
    return torch.empty((math.prod(leading),), dtype=torch.int32, device=device)


def traced_rows(
    handle: int,
    leading: Sequence[int],
    device: torch.device,
    num_slots: int,
    of_tokens: bool = False,
) -> tuple[Tensor, Tensor]:
    """:meth:`Active.rows` for a graph: the ids of whatever block the graph will run in."""
    ids = torch.ops.lora_ext.active_adapter_ids(handle, leading, device, of_tokens)
    return ids, ops.lora_plan(ids, num_slots)
