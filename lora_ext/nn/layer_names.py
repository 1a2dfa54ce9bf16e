"""Names of adapters that layers keep themselves, as a pool for ``with adapters([...])``."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import context
from .context import Active, Names, UnknownAdapterError
from .rows import Rows, group, rows_of


class _Slots(list[int]):
    """Position of each name among the names of one block; nothing to pin, nothing to release."""

    released = False

    def __init__(self, names: Sequence[str | None]):
        super().__init__(-1 if n in (None, "__base__") else i for i, n in enumerate(names))
        self.names = tuple(names)

    def __enter__(self) -> _Slots:
        return self

    def __exit__(self, *_: object) -> None:
        self.released = True


class LayerNames:
    """The adapters of all layers alive, by name. The names of one layer need not be another's."""

    max_slots = 0
    modules = ()

    def __init__(self) -> None:
        # Of each layer, the open blocks of its forwards, the last one last; None is no block.
        self._blocks: weakref.WeakKeyDictionary[Any, tuple[Active | None, ...]]
        self._blocks = weakref.WeakKeyDictionary()
        self._entered = False  # whether there ever was a block
        self.handle = context.pool_handle(self)

    def add(self, layer: Any) -> None:
        """Let blocks reach a layer: an object with ``adapter_names`` whose ``pool`` is this."""
        self._blocks[layer] = (None,)
        context.attachments.add(layer)

    def block_of(self, layer: Any) -> Active | None:
        """The block of this call of a layer.

        A checkpointed layer runs again in the backward, perhaps in another thread and after its
        block. It then must see what it saw in the forward, or say that it cannot.
        """
        if not self._entered:
            return None
        if torch._C._current_graph_task_id() < 0:  # no backward is running in this thread
            block = context.current(self.handle)
            seen = self._blocks[layer]
            if len(seen) != 1 or seen[0] is not block:
                others = (b for b in seen if b not in (None, block) and not b.lease.released)
                self._blocks[layer] = (*others, block)
            return block
        *others, block = self._blocks[layer]
        if others or (block is not None and block.lease.released):
            raise RuntimeError(
                "adapters: a layer is computed again in the backward, and the block of its forward "
                "was left or is one of several; keep one block open until after backward(), or "
                "give adapter_ids"
            )
        return block

    def acquire(self, names: Sequence[str | None]) -> _Slots:
        """Slots for the names.

        Raises:
            UnknownAdapterError: a name that no layer has.
        """
        known = {known for layer in self._blocks for known in layer.adapter_names}
        for name in names:
            if name is not None and name != "__base__" and name not in known:
                close = difflib.get_close_matches(name, known)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UnknownAdapterError(f"adapters: no layer has an adapter named {name!r}{hint}")
        self._entered = True
        return _Slots(names)


layer_names = LayerNames()


def rows_in_block(
    active: Active,
    names: tuple[str, ...],
    leading: torch.Size,
    device: torch.device,
    of_tokens: bool,
) -> Rows:
    """Rows for a layer with these adapters, an embedding (``of_tokens``) or not.

    Names of the block that the layer lacks are base rows: adapters need not reach every layer.
    """
    if of_tokens:
        active.check_tokens(leading)
    return active.cached((names, leading, device), lambda: _by_name(active, names, leading, device))


def rows_by_name(
    given: Names, names: tuple[str, ...], leading: torch.Size, device: torch.device
) -> Rows:
    """Rows from names given to one layer; those it lacks are base rows.

    Raises:
        ValueError: another number of names than rows or sequences.
    """
    flat, shape = context.parse(given)
    slots = _Slots(list(dict.fromkeys(flat)))
    slot_of = dict(zip(slots.names, slots, strict=True))
    rows = tuple(slot_of[name] for name in flat)
    active = Active(layer_names.handle, slots, rows, shape, len(slots), outer=None)
    return _by_name(active, names, leading, device)


def _by_name(
    active: Active, names: tuple[str, ...], leading: torch.Size, device: torch.device
) -> Rows:
    copies = active.copies(leading)
    place = [names.index(n) if n in names else -1 for n in active.lease.names]
    positions = [place[slot] if slot >= 0 else -1 for slot in active.slots]
    with torch.inference_mode(False), torch.no_grad():
        ids = torch.tensor(positions, dtype=torch.int32).repeat_interleave(copies)  # (T,)
        return group(ids, len(names), device)


# -------------------------------------------------------------------------------------------------
# As in context.py: a graph asks for its rows while it runs. Every adapter of the layer takes part.

_library = torch.library.Library("lora_ext", "FRAGMENT")
_library.define(
    "layer_adapter_ids(str[] names, int default, SymInt[] leading, Device device, bool of_tokens) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)


def _layer_adapter_ids(
    names: Sequence[str],
    default: int,
    leading: Sequence[int],
    device: torch.device,
    of_tokens: bool,
) -> Tensor:
    shape = torch.Size(leading)
    active = context.current(layer_names.handle)
    if active is None:
        return torch.full((shape.numel(),), default, dtype=torch.int32, device=device)
    rows = rows_in_block(active, tuple(names), shape, device, of_tokens)
    used = torch.tensor([*rows.used, -1], dtype=torch.int32, device=device)  # the last serves -1
    return used[rows.ids.long()]


_library.impl("layer_adapter_ids", _layer_adapter_ids, "CompositeExplicitAutograd")


@torch.library.register_fake("lora_ext::layer_adapter_ids", lib=_library)
def _fake_layer_adapter_ids(
    names: Sequence[str],
    default: int,
    leading: Sequence[int],
    device: torch.device,
    of_tokens: bool,
) -> Tensor:
    rows = 1
    for size in leading:
        rows *= size
    return torch.empty((rows,), dtype=torch.int32, device=device)


def traced_rows(
    names: tuple[str, ...],
    default: int,
    leading: torch.Size,
    device: torch.device,
    of_tokens: bool,
) -> Rows:
    """:func:`rows_in_block` for a graph; outside a block every row has the adapter ``default``."""
    ids = torch.ops.lora_ext.layer_adapter_ids(list(names), default, leading, device, of_tokens)
    return rows_of(ids, len(names))
