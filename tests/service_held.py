"""A context manager that keeps the calls of a :class:`lora_ext.tenants.Service` in their queues."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from lora_ext.tenants import Service


@contextmanager
def held(service: Service) -> Iterator[None]:
    """Stop the service's thread inside the ``with`` block, so that calls wait in their queues."""
    gate: Future[None] = Future()
    begun = threading.Event()

    def hold() -> None:
        begun.set()
        gate.result()

    service._scheduler.put("test", service._own, hold)
    assert begun.wait(60)  # Calls that were queued earlier, or in another queue, may run first.
    try:
        yield
    finally:
        gate.set_result(None)
