"""Promised responses per API key, and calls that run in the order of their sequence numbers.

A request is answered at once with a promise: a ``request_id`` with which the client retrieves the
response later.
"""

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

KEPT = 1024  # maximum number of stored responses per API key
MOST = 512  # maximum number of promises per API key whose responses are not ready
GAP = 10.0  # seconds for which a call waits for a missing earlier call

Answer = dict[str, Any]


class GoneError(LookupError):
    """Error for an object that does not exist, belongs to another API key, or was removed."""


@dataclass(eq=False)
class Model:
    """Model of a training client, with calls that run in the order of their sequence numbers.

    Calls may arrive out of order.

    Args:
        tenant: tenant of the service that trains the model.
        next: sequence number of the next call to run.
        waiting: future, start function and time of arrival of each waiting call, by number.
        promised: ``request_id`` of each call by number, for repeated requests.
    """

    tenant: Tenant
    next: int = 1
    waiting: dict[int, tuple[Future[Any], Callable[[], Any], float]] = field(default_factory=dict)
    promised: OrderedDict[int, str] = field(default_factory=OrderedDict)

    def pump(self, asking: int | None = None) -> None:
        """Start waiting calls in order, until one has to wait for a missing call.

        If call ``asking`` cannot start, its error is raised. The error of another call is set on
        its future.
        """
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
                return  # The call has a promise already, so it is tried again later.
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
    """Promised responses of all API keys. ``MOST`` and ``KEPT`` apply to each key separately."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._of_keys: defaultdict[str, OrderedDict[str, Future[Any]]] = defaultdict(OrderedDict)

    def new(self, key: str, future: Future[Any] | None = None) -> tuple[str, Future[Any]]:
        """Add a promise and return its name and future.

        Raises:
            QueueFullError: If too many responses of the key are not ready.
        """
        name, future = uuid.uuid4().hex, future or Future()
        with self.lock:
            own = self._of_keys[key]
            done = [each for each, known in own.items() if known.done()]
            if (count := len(own) - len(done) + 1) > MOST:
                raise QueueFullError(f"queue: expected at most {MOST} pending calls, found {count}")
            for each in done[: max(0, len(own) + 1 - KEPT)]:
                del own[each]
            own[name] = future
        return name, future

    def get(self, key: str, name: str) -> Future[Any]:
        """Return the future of a promise; raise GoneError if the key has no promise ``name``."""
        with self.lock:
            found = self._of_keys[key].get(name) if key in self._of_keys else None
        if found is None:
            raise GoneError(f"request_id: expected an id of this API key, found {name!r:.200}")
        return found

    def at_once(self, key: str, action: Callable[[], Any]) -> Answer:
        """Run an action in a new thread and return a promise of its result."""
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
        """Run a call of a model in the order of sequence numbers; return a promise of its response.

        Args:
            key: API key.
            model: model of the call.
            number: sequence number of the call; None runs it at once. For a repeated number, the
                promise of the first request is returned.
            begin: function that adds the call to the queue of a tenant and returns its future.
            told: function that makes the response from the result of the call.
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
                    raise  # The client repeats the request with the same number.
                if number is not None:  # A repeated request must get the same error.
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
