"""Where a block was entered: the thread and the task, as far as it can know them by itself."""

from __future__ import annotations

import asyncio
import threading
import weakref
from typing import Any


class Entry:
    """Where a block was entered, until it is left."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        task = _task()
        self._task = None if task is None else weakref.ref(task)
        self.served = False  # whether a layer has asked for rows
        self.left = False

    @property
    def here(self) -> bool:
        """Whether this thread and task entered it, and no parent of the task."""
        same = self._task if self._task is None else self._task()
        return self.thread == threading.get_ident() and same is _task()


def _task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None
