"""Pools, the models attached to them, and the layers of ``lora_ext.nn``, which own their adapters.

An ``adapters`` block without ``pool=`` finds its pool with :func:`only_pool`.
"""

from __future__ import annotations

import difflib
import gc
import itertools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from ._entries import Entry, members_of, names_in


class UnknownAdapterError(KeyError):
    """Error for an adapter name that is unknown to a pool or to all layers of ``lora_ext.nn``."""

    def __str__(self) -> str:
        """Return the message without KeyError's quotes."""
        return self.args[0]


class Pool(Protocol):
    """Interface of :class:`lora_ext.AdapterPool`, which this package cannot import."""

    max_slots: int
    modules: Any

    def acquire(self, names: Sequence[Entry]) -> Any:
        """Pin adapters.

        Returns:
            A list of slots that is also a context manager. It has the attributes ``released`` and
            ``invocations`` (one per name), and ``renew()``, which pins the same adapters again.
        """


# No number is used twice, so a graph compiled for a deleted pool cannot use another pool.
_handles: weakref.WeakKeyDictionary[Pool, int] = weakref.WeakKeyDictionary()
_counter = itertools.count()


def pool_handle(pool: Pool) -> int:
    """Return the number that represents a pool in compiled graphs."""
    return _handles.setdefault(pool, next(_counter))


#: Objects with an attribute ``pool``: attached models' states, and layers with their own adapters.
attachments: weakref.WeakSet[Any] = weakref.WeakSet()


def only_pool() -> Pool:
    """Return the only pool of the objects in :data:`attachments`.

    Raises:
        RuntimeError: If there is no pool.
        ValueError: If there are several pools.
    """
    pools = {id(a.pool): a.pool for a in attachments}
    if len(pools) > 1:
        gc.collect()  # unreachable models might not have been collected
        pools = {id(a.pool): a.pool for a in attachments}
    if not pools:
        raise RuntimeError(
            "adapters: expected an attached model, found none; call lora_ext.attach(model, pool), "
            "or pass pool=; a model of from_peft accepts adapter_names= instead of a block"
        )
    if len(pools) > 1:
        raise ValueError(
            f"adapters: pool: expected one of the {len(pools)} pools that have models attached, "
            "found None; pass pool= (lora_ext.nn.layer_names for layers with their own adapters)"
        )
    return next(iter(pools.values()))


# -------------------------------------------------------------------------------------------------
# Layers with their own adapters


class Places(list[int]):
    """Lease for layers with their own adapters: a list of indices.

    It has the interface of a pool's lease and pins nothing.

    Args:
        places: Index of each name in the block. A pool's lease contains slots instead.
        invocations: Invocation of each name (the tokens that activate its adapter); empty for an
            adapter that applies to all tokens.
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
        """Make the lease valid again, for a backward pass after the block was left."""
        self.released = False


class LayerNames:
    """Registry of all layers that own their adapters, with the interface of a pool.

    Layers may have adapters of different names.
    """

    max_slots = 0
    modules = ()

    def __init__(self) -> None:
        self._layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.handle = pool_handle(self)

    def add(self, layer: Any) -> None:
        """Register a layer with the attributes ``adapter_names`` and ``pool``, this object."""
        self._layers.add(layer)
        attachments.add(layer)

    def acquire(self, names: Sequence[Any]) -> Places:
        """Return a lease of the names.

        Raises:
            NotImplementedError: If a mixture contains an aLoRA adapter.
            UnknownAdapterError: If no layer has an adapter with one of the names.
        """
        known = {known for layer in self._layers for known in layer.adapter_names}
        each = [[name for name, _ in members_of(entry, "adapters: names")] for entry in names]
        for name in itertools.chain.from_iterable(map(names_in, names)):
            if name not in known:
                close = difflib.get_close_matches(name, known)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UnknownAdapterError(f"adapters: no layer has an adapter named {name!r}{hint}")
        invocations: list[tuple[int, ...]] = []
        for own in each:
            found = [(name, start) for name in own if (start := self._invocation(name))]
            if found and len(own) > 1:
                raise NotImplementedError(
                    "adapters: names: expected ordinary adapters in a mixture, found the aLoRA "
                    f"adapter {found[0][0]!r}; use it alone"
                )
            if own:
                invocations.append(found[0][1] if found else ())
        return Places(range(len(names)), invocations)

    def _invocation(self, name: str | None) -> tuple[int, ...]:
        """Return the invocation of an adapter; raise ValueError if layers have different ones."""
        found = self._invocations(name)
        if len(found) > 1:
            gc.collect()  # unreachable layers form reference cycles
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
