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
        #: Objects with ``adapter_names``. A layer also registers itself in ``context.attachments``.
        self.layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.handle = context.pool_handle(self)

    def acquire(self, names: Sequence[str | None]) -> _Slots:
        """Slots for the names.

        Raises:
            UnknownAdapterError: a name that no layer has.
        """
        known = {known for layer in self.layers for known in layer.adapter_names}
        for name in names:
            if name is not None and name != "__base__" and name not in known:
                close = difflib.get_close_matches(name, known)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UnknownAdapterError(f"adapters: no layer has an adapter named {name!r}{hint}")
        return _Slots(names)


layer_names = LayerNames()


def rows_in_block(names: tuple[str, ...], leading: torch.Size, device: torch.device) -> Rows | None:
    """Rows for a layer with these adapters, or None outside a block.

    Names of the block that the layer lacks are base rows: adapters need not reach every layer.
    """
    active = context.current(layer_names.handle)
    if active is None:
        return None
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
    "layer_adapter_ids(str[] names, int default, SymInt[] leading, Device device) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)


def _layer_adapter_ids(
    names: Sequence[str], default: int, leading: Sequence[int], device: torch.device
) -> Tensor:
    shape = torch.Size(leading)
    rows = rows_in_block(tuple(names), shape, device)
    if rows is None:
        return torch.full((shape.numel(),), default, dtype=torch.int32, device=device)
    used = torch.tensor([*rows.used, -1], dtype=torch.int32, device=device)  # the last serves -1
    return used[rows.ids.long()]


_library.impl("layer_adapter_ids", _layer_adapter_ids, "CompositeExplicitAutograd")


@torch.library.register_fake("lora_ext::layer_adapter_ids", lib=_library)
def _fake_layer_adapter_ids(
    names: Sequence[str], default: int, leading: Sequence[int], device: torch.device
) -> Tensor:
    rows = 1
    for size in leading:
        rows *= size
    return torch.empty((rows,), dtype=torch.int32, device=device)


def traced_rows(
    names: tuple[str, ...], default: int, leading: torch.Size, device: torch.device
) -> Rows:
    """:func:`rows_in_block` for a graph; outside a block every row has the adapter ``default``."""
    ids = torch.ops.lora_ext.layer_adapter_ids(list(names), default, leading, device)
    return rows_of(ids, len(names))
