"""Unique name and number for each load of an adapter, inside vLLM's engine.

vLLM keys blocks of its prefix cache by an adapter's name and path, a step's adapters by name, and
slots by number. After a reload these no longer identify one set of weights. A name with two numbers
leaves one of them out of the step, which ends the engine, and changed files at one path would use
cached blocks of the old files. The wrapped engine therefore gives each load after the first a new
name and number. A request keeps those of the load that was current when it arrived.

The same wrapper reads the invocation of an activated adapter and sends it along
(:mod:`._activated`). It rejects requests that the adapter cannot answer, since an error in the
middle of a step would end the engine.
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
    request: Any  # with the engine's name and number
    stamp: object  # state of the files when they were loaded


class Loads:
    """Loads of the adapters of one engine."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, str], _Load] = {}
        self._user_ids: dict[int, int] = {}  # engine's number: user's number
        self._last: dict[int, int] = {}  # user's number: engine's number of the last load
        self._names: set[str] = set()
        self._fresh = itertools.count(1 << 48)  # above any number that a user gives
        self._lock = threading.Lock()  # requests arrive in a separate thread

    def of_request(self, request: Any) -> Any:
        """Return the last load of a request's adapter, and load the adapter if there was no load.

        With ``load_inplace`` it is loaded again if the files have changed.
        """
        with self._lock:
            load = self._known.get(_key(request))
            if load is None or (request.load_inplace and load.stamp != _stamp(request)):
                load = self._new(request)
                self._keep(request, load)
            return load.request

    def load(self, request: Any, into: Callable[[Any], bool]) -> bool:
        """Load an adapter with ``into``, the engine's function; if it raises, nothing changes."""
        with self._lock:
            load = self._known.get(_key(request))
            if load is None or request.load_inplace:
                load = self._new(request)
        loaded = into(load.request)
        with self._lock:
            self._keep(request, load)
        return loaded

    def remove(self, user_id: int, out_of: Callable[[int], bool]) -> bool:
        """Remove all loads of a number; a later request for it makes a new load."""
        with self._lock:
            ids = [i for i, user in self._user_ids.items() if user == user_id] or [user_id]
            self._known = {k: each for k, each in self._known.items() if each.user_id != user_id}
        return any([out_of(each) for each in ids])

    def pin(self, user_id: int, into: Callable[[int], bool]) -> bool:
        """Pin the last load of a number."""
        with self._lock:
            last = self._last.get(user_id, user_id)
        return into(last)

    def listed(self, ids: set[int]) -> set[int]:
        """Return the user's numbers of the engine's numbers ``ids``."""
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
        made.load_inplace = False  # the number is new to the workers, so they read the files
        self._names.add(made.lora_name)
        self._user_ids[made.lora_int_id] = request.lora_int_id
        return _Load(request.lora_int_id, made, _stamp(request))

    def _keep(self, request: Any, load: _Load) -> None:
        self._known[_key(request)] = self._known[_key(load.request)] = load
        self._last[load.user_id] = load.request.lora_int_id


def _key(request: Any) -> tuple[str, int, str]:
    return request.lora_name, request.lora_int_id, request.lora_path


def _stamp(request: Any) -> object:
    """Return a value that changes with the files of a folder; None for a name on the Hub."""
    try:
        with os.scandir(os.path.expanduser(request.lora_path)) as entries:
            found = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return None
    return {n: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in found}


def follow_loads(engine: Any) -> None:
    """Wrap methods of vLLM's ``EngineCore`` with :class:`Loads`, once in the process."""

    def loads(self: Any) -> Loads:
        return self.__dict__.setdefault(_LOADS, Loads())

    def preprocess_add_request(inner: Any, self: Any, request: Any, *args: Any) -> Any:
        if getattr(request, "lora_request", None) is not None:
            request.lora_request = loads(self).of_request(request.lora_request)
            invocation = _activated.invocation_of(request.lora_request)
            _activated.check(request, invocation)
        return inner(self, request, *args)

    def add_lora(inner: Any, self: Any, lora_request: Any) -> bool:
        return loads(self).load(lora_request, functools.partial(inner, self))

    def remove_lora(inner: Any, self: Any, lora_id: int) -> bool:
        return loads(self).remove(lora_id, functools.partial(inner, self))

    def pin_lora(inner: Any, self: Any, lora_id: int) -> bool:
        return loads(self).pin(lora_id, functools.partial(inner, self))

    def list_loras(inner: Any, self: Any) -> set[int]:
        return loads(self).listed(inner(self))

    for door in (preprocess_add_request, add_lora, remove_lora, pin_lora, list_loras):
        _interface.wrap(engine, door.__name__, door)
