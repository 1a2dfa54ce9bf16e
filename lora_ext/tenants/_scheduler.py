"""Scheduling of the tenants' calls: one queue per tenant, and one thread that runs the model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from lora_ext._checks import require
from lora_ext.serving import QueueFullError

from ._batch import BatchStep, Call, Part

#: Number of tokens by which each step raises the credit of a waiting tenant. A part of the tenant's
#: call can join the parts of other tenants if it has no more tokens than the credit.
QUANTUM = 1024
_MAX_WAIT_SHARE = 1 / 3  # maximum wait for recent tenants, divided by the last step's duration
_MAX_ROUNDS = 8  # maximum number of rounds between two steps that run items other than calls


def settle(future: Future[Any], action: Callable[[], Any]) -> None:
    """Run ``action`` and set its result or error on the future."""
    try:
        done = action()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(done)


class Queue:
    """Pending items of one tenant, in order: calls, and functions that run without a step."""

    def __init__(self, size: int | None = None, tokens: int = 0) -> None:
        self.size = size  # maximum number of waiting items; None has no limit
        self.tokens = tokens  # maximum number of tokens of the waiting calls, unless only one waits
        self.items: deque[Call | tuple[Future[Any], Callable[[], Any]]] = deque()
        self.credit = 0
        self.closed: str | None = None  # reason why new items are rejected

    def head(self) -> Call | None:
        """Return the first item if it is a call, otherwise None."""
        first = self.items[0] if self.items else None
        return first if isinstance(first, Call) else None

    @property
    def ready(self) -> bool:
        """True if there is a first item and it is not a call."""
        return bool(self.items) and self.head() is None

    def check_room(self, where: str, item: Call | Callable[[], Any]) -> None:
        """Raise QueueFullError if adding ``item`` would exceed a limit of the queue."""
        if self.size is None or not self.items:
            return
        expected, fits = f"at most {self.size} calls in the queue", len(self.items) < self.size
        require(fits, where, "queue", expected, len(self.items) + 1, QueueFullError)
        if isinstance(item, Call):
            held = sum(each.tokens for each in self.items if isinstance(each, Call))
            expected = f"at most {self.tokens} tokens of calls in the queue"
            fits = held + item.tokens <= self.tokens
            require(fits, where, "queue", expected, held + item.tokens, QueueFullError)


class Scheduler:
    """Thread that runs the items of all queues in order, with common steps for several tenants.

    Deficit round robin in tokens decides which parts of calls join a step. An item that is not a
    call, such as `save` or an optimizer step, runs as soon as it is the first in its queue. Before
    a step, the thread waits briefly for calls of the tenants of the last two steps. Without this
    wait, a tenant that was late once would miss every second step from then on.

    Args:
        step: forward and backward of the model.
        max_tokens: maximum number of tokens of a step, including padding.
        size: maximum number of waiting items of a tenant.
    """

    def __init__(self, step: BatchStep, max_tokens: int, size: int):
        self.step, self.max_tokens, self.size = step, max_tokens, size
        #: Number of steps, of parts in all steps, and of parts in the largest step.
        self.counts = {"steps": 0, "parts": 0, "most": 0}
        self._changed = threading.Condition()
        self._queues: list[Queue] = []
        self._recent: deque[set[Queue]] = deque([set(), set()], 2)
        self._duration = 0.0
        self._rounds = 0  # rounds of items that are not calls, since the last step
        self._stopping = False
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="lora_ext.tenants")
        self._thread.start()

    def add(self, bounded: bool = True) -> Queue:
        """Add a queue, which has no limits if ``bounded`` is False."""
        queue = Queue(self.size, self.size * self.max_tokens) if bounded else Queue()
        with self._changed:
            self._queues.append(queue)
        return queue

    def put(self, where: str, queue: Queue, item: Call | Callable[[], Any]) -> Future[Any]:
        """Append an item to a queue; return the future of its result.

        Raises:
            QueueFullError: If the queue is full.
            RuntimeError: If the tenant or the service is closed.
        """
        future = item.future if isinstance(item, Call) else Future()
        with self._changed:
            if self._stopping or queue.closed:
                why = queue.closed or "the service is closed"
                raise RuntimeError(f"{where}: expected an open tenant, but {why}")
            queue.check_room(where, item)
            # A running future cannot be cancelled: later calls depend on its result.
            future.set_running_or_notify_cancel()
            queue.items.append(item if isinstance(item, Call) else (future, item))
            self._changed.notify()
        return future

    def close(self, queue: Queue, why: str, last: Callable[[], Any]) -> Future[Any]:
        """Drop the waiting items of a queue, close it, and run ``last`` as its last item.

        Returns the future of ``last``. The futures of dropped items raise, and their messages
        contain ``why``.
        """
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            dropped, queue.items = queue.items, deque()
            queue.items.append((future, last))
            queue.closed = why
            self._changed.notify()
        _drop(dropped, why)
        return future

    def stop(self) -> None:
        """End the thread after the running step; the futures of waiting items raise."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for queue in self._queues:
            _drop(queue.items, "the service is closed")

    # ---------------------------------------------------------------------------------------------
    # The thread

    def _loop(self) -> None:
        torch.set_num_threads(self._threads)  # A new thread would use all cores.
        while True:
            with self._changed:
                while not self._stopping and not any(queue.items for queue in self._queues):
                    self._changed.wait()
                if self._stopping:
                    return
            if self._rounds < _MAX_ROUNDS and self._run_ready_items():
                self._rounds += 1
                continue
            self._wait_for_others()
            parts = self._chosen()
            if parts:
                self._run(parts)
            if parts or self._rounds == _MAX_ROUNDS:
                self._rounds = 0

    def _run_ready_items(self) -> bool:
        """Run the first item of each queue if it is not a call; return whether any was run.

        This is a separate method so that no variable of the waiting loop keeps the items alive: the
        last item of a tenant refers to all tensors of the tenant.
        """
        with self._changed:
            items = [queue.items.popleft() for queue in self._queues if queue.ready]
            self._queues = [q for q in self._queues if q.items or not q.closed]
        for item in items:
            assert not isinstance(item, Call)
            settle(*item)
        return bool(items)

    def _wait_for_others(self) -> None:
        deadline = time.monotonic() + _MAX_WAIT_SHARE * self._duration
        with self._changed:
            while not self._stopping:
                late = set().union(*self._recent).intersection(self._queues)
                if all(queue.head() is not None for queue in late):
                    return
                if any(queue.ready for queue in self._queues):
                    return  # The ready item runs first. The next item in its queue may be a call.
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    return

    def _chosen(self) -> list[Part]:
        parts: list[Part] = []
        members: set[Queue] = set()
        rows = longest = 0
        with self._changed:
            if self._rounds < _MAX_ROUNDS and any(queue.ready for queue in self._queues):
                return []
            for queue in self._queues:
                call = queue.head()
                if call is None or not call.parts:
                    queue.credit = 0
                    continue
                queue.credit = min(queue.credit + QUANTUM, self.max_tokens)
                part = call.parts[0]
                more, wide = len(part.lengths), max(part.lengths)
                fits = (rows + more) * max(longest, wide) <= self.max_tokens
                if parts and not (fits and more * wide <= queue.credit):
                    continue
                queue.credit -= min(queue.credit, more * wide)
                rows, longest = rows + more, max(longest, wide)
                parts.append(call.parts.pop(0))
                members.add(queue)
            if members:
                self._recent.append(members)
            self._queues.append(self._queues.pop(0))  # The next step begins with another tenant.
        return parts

    def _run(self, parts: list[Part]) -> None:
        begin = time.monotonic()
        self.step.run(parts)
        self._duration = time.monotonic() - begin
        self.counts["steps"] += 1
        self.counts["parts"] += len(parts)
        self.counts["most"] = max(self.counts["most"], len(parts))
        with self._changed:
            ended = [queue for queue in self._queues if (c := queue.head()) and not c.parts]
            calls = [queue.items.popleft() for queue in ended]
        for call in calls:
            assert isinstance(call, Call)
            if not call.future.done():
                call.finish()


def _drop(items: deque[Any], why: str) -> None:
    for item in items:
        error = RuntimeError(f"tenants: the call was dropped: {why}")
        if isinstance(item, Call):
            item.fail(error)
        elif not item[0].done():
            item[0].set_exception(error)
