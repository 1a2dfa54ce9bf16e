"""A block that keeps the calls of a :class:`lora_ext.tenants.Service` in their queues."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from lora_ext.tenants import Service


@contextmanager
def held(service: Service) -> Iterator[None]:
    """Block the service's thread until the block ends, so that calls wait in their queues."""
    gate: Future[None] = Future()
    begun = threading.Event()

    def hold() -> None:
        begun.set()
        gate.result()

    service._scheduler.put("test", service._own, hold)
    assert begun.wait(60)  # An earlier call, or one of another queue, may run first.
    try:
        yield
    finally:
        gate.set_result(None)
