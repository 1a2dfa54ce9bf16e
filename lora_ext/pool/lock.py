"""A lock that finalizers may ask for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class PoolLock:
    """One thread at a time, as often as it likes.

    Python may collect garbage anywhere: a generator that was dropped inside a block then lets its
    adapters go in the middle of a load by the same thread, which this lock does not stop. So what
    lets adapters go is put off until the thread is done: :meth:`at_end`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._jobs: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        try:
            while self._depth == 1 and self._jobs:
                self._jobs.popleft()()
        finally:
            self._depth -= 1
            self._lock.release()

    def at_end(self, job: Callable[[], None]) -> None:
        """Do something when the thread, which has the lock, leaves it; what it raises is raised
        there."""
        self._jobs.append(job)
