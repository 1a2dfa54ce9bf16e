"""Promised responses per API key, and calls that run in the order of their sequence numbers."""

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

KEPT = 1024  # most stored responses of a key
MOST = 512  # most open promises of a key
GAP = 10.0  # seconds to wait for a missing call before later ones run

Answer = dict[str, Any]


class GoneError(LookupError):
    """Error for an object that does not exist, has another owner, or was removed."""


@dataclass(eq=False)
class Model:
    """Model of a training client; its calls run by number, whatever their order of arrival."""

    tenant: Tenant
    next: int = 1
    waiting: dict[int, tuple[Future[Any], Callable[[], Any], float]] = field(default_factory=dict)
    promised: OrderedDict[int, str] = field(default_factory=OrderedDict)

    def pump(self, asking: int | None = None) -> None:
        """Start the calls that are next; raise an error of call ``asking`` to the caller."""
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
                return  # it has been promised and is tried again later
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
    """Promises by key, with separate limits for each key."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._of_keys: defaultdict[str, OrderedDict[str, Future[Any]]] = defaultdict(OrderedDict)

    def new(self, key: str, future: Future[Any] | None = None) -> tuple[str, Future[Any]]:
        """Add a promise of a key, unless too many are open; return its name and future."""
        name, future = uuid.uuid4().hex, future or Future()
        with self.lock:
            own = self._of_keys[key]
            done = [each for each, known in own.items() if known.done()]
            if (count := len(own) - len(done) + 1) > MOST:
                raise QueueFullError(f"queue: expected at most {MOST} open promises, found {count}")
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
        """Return a promise of a call of a model; a repeated number returns the same promise.

        ``begin`` puts the call into the tenant's queue; ``told`` makes the response from its
        result.
        """
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
                    raise  # the client repeats it with the same number
                if number is not None:  # a repeated call gets the same error
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
