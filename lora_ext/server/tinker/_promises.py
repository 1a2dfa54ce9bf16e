"""Promises of answers by key, and calls that run in the order of their numbers."""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lora_ext.tenants import QueueFullError, Tenant, settle

KEPT = 1024  # answers of a key
MOST = 512  # promises of a key that are open
GAP = 10.0  # seconds after which a call that never came is not waited for

Answer = dict[str, Any]


class GoneError(LookupError):
    """What somebody asks for was never there, is not theirs, or is no more."""


@dataclass(eq=False)
class Model:
    """A training client's model: its calls run by their numbers, in whatever order they come."""

    tenant: Tenant
    next: int = 1
    waiting: dict[int, tuple[Future[Any], Callable[[], Any], float]] = field(default_factory=dict)
    promised: OrderedDict[int, str] = field(default_factory=OrderedDict)

    def pump(self, asking: int | None = None) -> None:
        """Begin the calls whose turn it is; what the asking one raises goes to its caller."""
        while self.waiting:
            first = min(self.waiting)
            future, start, since = self.waiting[first]
            if first > self.next and time.monotonic() - since < GAP:
                return
            try:
                start()
            except QueueFullError:
                if first == asking:
                    del self.waiting[first]
                    raise
                return  # it was promised: later
            except Exception as error:
                self._begun(first)
                if first == asking:
                    raise
                future.set_exception(error)
            else:
                self._begun(first)

    def _begun(self, number: int) -> None:
        del self.waiting[number]
        self.next = number + 1


class Promises:
    """What was promised to whom; what one key asks for takes nothing of another's."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._of_keys: defaultdict[str, OrderedDict[str, Future[Any]]] = defaultdict(OrderedDict)

    def new(self, key: str, future: Future[Any] | None = None) -> tuple[str, Future[Any]]:
        """One more of a key, unless too many are open: its name and the future behind it."""
        name, future = uuid.uuid4().hex, future or Future()
        with self.lock:
            own = self._of_keys[key]
            done = [each for each, known in own.items() if known.done()]
            if len(own) - len(done) >= MOST:
                raise QueueFullError(f"queue: expected at most {MOST} open promises, found as many")
            for each in done[: max(0, len(own) + 1 - KEPT)]:
                del own[each]
            own[name] = future
        return name, future

    def get(self, key: str, name: str) -> Future[Any]:
        """Return the future of a name; raise GoneError if this key has none."""
        with self.lock:
            found = self._of_keys[key].get(name) if key in self._of_keys else None
        if found is None:
            raise GoneError(f"request_id: expected a promise of this server, found {name!r:.200}")
        return found

    def at_once(self, key: str, action: Callable[[], Any]) -> Answer:
        """Return a promise of an action, which runs in a new thread."""
        name, future = self.new(key)
        threading.Thread(target=settle, args=(future, action), daemon=True).start()
        return {"request_id": name}

    def in_order(
        self,
        key: str,
        model: Model,
        number: int | None,
        begin: Callable[[Tenant], Future[Any]],
        told: Callable[[Any], Any],
    ) -> Answer:
        """Of a call of a model, which ``begin`` puts into its tenant's queue; ``told`` makes the
        answer of its result. The same number again is the same call."""
        with self.lock:
            if number is not None and number in model.promised:
                return {"request_id": model.promised[number]}
            request, future = self.new(key)

            def start() -> None:
                source = begin(model.tenant)
                source.add_done_callback(lambda done: settle(future, lambda: told(done.result())))

            try:
                if number is None or number < model.next:
                    start()
                else:
                    model.waiting[number] = future, start, time.monotonic()
                    model.pump(number)
            except BaseException as error:
                del self._of_keys[key][request]
                if isinstance(error, QueueFullError):
                    raise  # it comes again under its number
                if number is not None:  # refused, and so done with
                    refused: Future[Any] = Future()
                    refused.set_exception(error)
                    self._promised(model, number, self.new(key, refused)[0])
                raise
            if number is not None:
                self._promised(model, number, request)
            return {"request_id": request}

    def _promised(self, model: Model, number: int, request: str) -> None:
        model.promised[number] = request
        if len(model.promised) > KEPT:
            model.promised.popitem(last=False)
