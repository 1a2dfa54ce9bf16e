"""Forwards of one model in several threads, where some of them change its configuration.

transformers writes the ``is_causal=`` of a call into the model's configuration and takes it out
again when the call ends; masks of every thread are made by it. Each step of continuous batching is
such a call. So a forward with ``is_causal=`` runs alone, and others run side by side.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

#: Managers of attached models that run. Compiled forwards are guarded by it.
managers = 0
_count = threading.Lock()


def managers_changed(by: int) -> None:
    """One has started (1) or ended (-1)."""
    global managers
    with _count:
        managers += by


class Gate:
    """What the forwards of one model pass: many at once, or one alone. First come, first served."""

    def __init__(self) -> None:
        self._entrance = threading.Lock()
        self._left = threading.Condition()
        self._inside = 0
        self._thread = threading.local()

    @property
    def inside(self) -> bool:
        """Whether this thread is."""
        return getattr(self._thread, "inside", False)

    @contextlib.contextmanager
    def passed(self, alone: bool) -> Iterator[None]:
        """Wait, then be inside. A thread that is inside already stays so."""
        if self.inside:
            yield
            return
        self._thread.inside = True
        try:
            with self._alone() if alone else self._among_others():
                yield
        finally:
            self._thread.inside = False

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self._entrance:  # nobody else comes in
            with self._left:
                self._left.wait_for(lambda: self._inside == 0)
            yield

    @contextlib.contextmanager
    def _among_others(self) -> Iterator[None]:
        with self._entrance, self._left:
            self._inside += 1
        try:
            yield
        finally:
            with self._left:
                self._inside -= 1
                self._left.notify_all()
