"""Who has adapters: pools, the models that are attached to them, layers with adapters of their own.

``adapters`` blocks find their pool here when the caller gives none.
"""

from __future__ import annotations

import difflib
import gc
import itertools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol


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
        """Pin adapters: a list of slots that is a context manager, knows ``released`` and the
        ``invocations`` of the names, and pins the same again with ``renew()``."""


# A pool that nobody holds any more takes its number with it. No number is given twice, so that a
# graph compiled for one pool cannot meet another one under it.
_handles: weakref.WeakKeyDictionary[Pool, int] = weakref.WeakKeyDictionary()
_counter = itertools.count()


def pool_handle(pool: Pool) -> int:
    """A number for the pool that a compiled graph can hold."""
    return _handles.setdefault(pool, next(_counter))


#: What ``attach`` left on models that are still alive, and layers that keep adapters of their own:
#: objects with a ``pool``.
attachments: weakref.WeakSet[Any] = weakref.WeakSet()


def only_pool() -> Pool:
    """The one pool that anything is attached to.

    Raises:
        RuntimeError: there is none. ValueError: there are several.
    """
    pools = {id(a.pool): a.pool for a in attachments}
    if len(pools) > 1:
        gc.collect()  # models that nobody holds any more may wait for the collector
        pools = {id(a.pool): a.pool for a in attachments}
    if not pools:
        raise RuntimeError(
            "adapters: expected an attached model, found none; call lora_ext.attach(model, pool), "
            "or give pool=; a model of from_peft takes adapter_names= instead of a block"
        )
    if len(pools) > 1:
        raise ValueError(
            f"adapters: pool: expected one of the {len(pools)} pools that have models attached, "
            "found None (lora_ext.nn.layer_names stands for layers with adapters of their own)"
        )
    return next(iter(pools.values()))


# -------------------------------------------------------------------------------------------------
# Layers with adapters of their own


class Places(list[int]):
    """A place for each name of one block; nothing to pin, nothing to release.

    Args:
        places: of the names. invocations: of each name, empty for an adapter of all tokens.
    """

    released = False

    def __init__(self, places: Iterable[int] = (), invocations: Sequence[tuple[int, ...]] = ()):
        super().__init__(places)
        self.invocations = invocations or [()] * len(self)

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
        self.handle = pool_handle(self)

    def add(self, layer: Any) -> None:
        """Let blocks reach a layer: an object with ``adapter_names`` whose ``pool`` is this."""
        self._layers.add(layer)
        attachments.add(layer)

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
        return Places(range(len(names)), [self._invocation(name) for name in names])

    def _invocation(self, name: str | None) -> tuple[int, ...]:
        """Of an adapter, which is one and the same in every layer that has it."""
        found = self._invocations(name)
        if len(found) > 1:
            gc.collect()  # a model that is gone may be there until then, as its layers form circles
            found = self._invocations(name)
        if len(found) > 1:
            raise ValueError(
                f"adapters: names: expected one invocation of {name!r} in all layers that have an "
                f"adapter of that name, found {sorted(found)!r:.200}"
            )
        return found.pop() if found else ()

    def _invocations(self, name: str | None) -> set[tuple[int, ...]]:
        return {
            tuple(layer.alora_invocation_tokens.get(name) or ())
            for layer in self._layers
            if name in layer.adapter_names and hasattr(layer, "alora_invocation_tokens")
        }


layer_names = LayerNames()
