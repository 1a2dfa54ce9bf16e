"""Unique name and number for each load of an adapter, inside vLLM's engine.

vLLM identifies an adapter by its name and path in the keys of the prefix cache, by its name in a
step, and by its number (``lora_int_id``) in the slots. After a reload, these no longer identify the
weights:

* If one name has two numbers, a step contains only one of them, and an error ends the engine.
* If the files at a path have changed, requests would use cached blocks of the old weights.

The wrapped engine therefore assigns a new name and number to each load after the first. A request
uses the load that was current when the request arrived.

The same wrapper reads the invocation of an activated adapter and stores it in the request
(:mod:`._activated`). It rejects requests that the adapter cannot serve, since an error in a step
would end the engine.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import _activated, _interface

_LOADS = "_lora_ext_loads"


@dataclass(frozen=True)
class _Load:
    user_id: int
    request: Any  # LoRA request with the name and number inside the engine
    stamp: object  # state of the files when they were loaded


class Loads:
    """Registry of the adapters that one engine has loaded.

    A *user's number* is the ``lora_int_id`` of an adapter in requests, and an *engine's number* is
    the ``lora_int_id`` of one load inside the engine.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, str], _Load] = {}
        self._user_ids: dict[int, int] = {}  # user's number by engine's number
        self._last: dict[int, int] = {}  # engine's number of the last load by user's number
        self._names: set[str] = set()  # all names inside the engine
        self._fresh = itertools.count(1 << 48)  # larger than any user's number
        self._lock = threading.Lock()  # Requests arrive in a separate thread.

    def of_request(self, request: Any) -> Any:
        """Return the LoRA request of the last load of an adapter.

        A new load is created if the adapter has none, or if ``load_inplace`` is set and the files
        have changed since the last load.
        """
        with self._lock:
            load = self._known.get(_key(request))
            if load is None or (request.load_inplace and load.stamp != _stamp(request)):
                load = self._new(request)
                self._keep(request, load)
            return load.request

    def add_lora(self, into: Callable[[Any], bool], lora_request: Any) -> bool:
        """Load an adapter with ``into``, the engine's ``add_lora``.

        If ``into`` raises, the last load of the adapter remains current.
        """
        with self._lock:
            load = self._known.get(_key(lora_request))
            if load is None or lora_request.load_inplace:
                load = self._new(lora_request)
        loaded = into(load.request)
        with self._lock:
            self._keep(lora_request, load)
        return loaded

    def remove_lora(self, out_of: Callable[[int], bool], lora_id: int) -> bool:
        """Remove every load that was requested under the ``lora_int_id`` ``lora_id``.

        A later request with this number creates a new load. Returns whether any load was removed.

        Args:
            out_of: the engine's ``remove_lora``.
            lora_id: user's number.
        """
        with self._lock:
            ids = [i for i, user in self._user_ids.items() if user == lora_id] or [lora_id]
            self._known = {k: each for k, each in self._known.items() if each.user_id != lora_id}
        return any([out_of(each) for each in ids])

    def pin_lora(self, into: Callable[[int], bool], lora_id: int) -> bool:
        """Pin the last load that was requested under the ``lora_int_id`` ``lora_id``.

        ``into`` is the engine's ``pin_lora``; its result is returned.
        """
        with self._lock:
            last = self._last.get(lora_id, lora_id)
        return into(last)

    def list_loras(self, listed: Callable[[], set[int]]) -> set[int]:
        """Return the user's numbers of the loads; ``listed`` is the engine's ``list_loras``."""
        ids = listed()
        with self._lock:
            return {self._user_ids.get(each, each) for each in ids}

    def _new(self, request: Any) -> _Load:
        invocation = _activated.read(request)
        made = copy.copy(request)
        if invocation:
            _activated.send(made, invocation)
        if made.lora_int_id in self._user_ids:
            made.lora_int_id = next(self._fresh)
        numbered = (f"{request.lora_name}#{n}" for n in itertools.count(2))
        made.lora_name = next(
            name
            for name in itertools.chain([request.lora_name], numbered)
            if name not in self._names
        )
        # The number is new to the workers, so they read the files without `load_inplace`.
        made.load_inplace = False
        self._names.add(made.lora_name)
        self._user_ids[made.lora_int_id] = request.lora_int_id
        return _Load(request.lora_int_id, made, _stamp(request))

    def _keep(self, request: Any, load: _Load) -> None:
        self._known[_key(request)] = self._known[_key(load.request)] = load
        self._last[load.user_id] = load.request.lora_int_id


def _key(request: Any) -> tuple[str, int, str]:
    _activated.check_single(request)
    return request.lora_name, request.lora_int_id, request.lora_path


def _stamp(request: Any) -> object:
    """Return a value that changes whenever the files in the adapter's folder change.

    Returns None if there is no such folder, as for a repository on the Hugging Face Hub.
    """
    try:
        with os.scandir(os.path.expanduser(request.lora_path)) as entries:
            found = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return None
    return {n: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in found}


def follow_loads(engine: Any) -> None:
    """Wrap the methods of vLLM's ``EngineCore`` that load adapters and receive requests.

    The methods are wrapped once in the process, and each engine has one :class:`Loads`.
    """

    def loads(self: Any) -> Loads:
        return self.__dict__.setdefault(_LOADS, Loads())

    def preprocess_add_request(inner: Any, self: Any, request: Any, *args: Any) -> Any:
        if getattr(request, "lora_request", None) is not None:
            request.lora_request = loads(self).of_request(request.lora_request)
            invocation = _activated.invocation_of(request.lora_request)
            _activated.check(request, invocation)
        return inner(self, request, *args)

    _interface.wrap(engine, "preprocess_add_request", preprocess_add_request)

    def follow(name: str) -> None:
        def call(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(loads(self), name)(functools.partial(inner, self), *args, **kwargs)

        _interface.wrap(engine, name, call)

    for name in ("add_lora", "remove_lora", "pin_lora", "list_loras"):
        follow(name)
