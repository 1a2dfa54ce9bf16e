"""Names of adapters that layers keep themselves, as a pool for ``with adapters([...])``."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Sequence
from typing import Any

from . import attachment
from .attachment import UnknownAdapterError


class Places(list[int]):
    """A place for each name of one block; nothing to pin, nothing to release."""

    released = False

    def __enter__(self) -> Places:
        return self

    def __exit__(self, *_: object) -> None:
        self.released = True

    def renew(self) -> None:
        """For the backward of a forward in the block: the names mean what they meant."""
        self.released = False


class LayerNames:
    """The adapters of all layers alive, by name. The names of one layer need not be another's."""

    max_slots = 0
    modules = ()

    def __init__(self) -> None:
        self._layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.handle = attachment.pool_handle(self)

    def add(self, layer: Any) -> None:
        """Let blocks reach a layer: an object with ``adapter_names`` whose ``pool`` is this."""
        self._layers.add(layer)
        attachment.attachments.add(layer)

    def acquire(self, names: Sequence[str | None]) -> Places:
        """Places for the names.

        Raises:
            UnknownAdapterError: a name that no layer has.
        """
        known = {known for layer in self._layers for known in layer.adapter_names}
        for name in names:
            if name is not None and name not in known:
                close = difflib.get_close_matches(name, known)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UnknownAdapterError(f"adapters: no layer has an adapter named {name!r}{hint}")
        return Places(range(len(names)))


layer_names = LayerNames()
