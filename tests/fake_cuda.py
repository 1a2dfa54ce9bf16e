"""Streams and events without a GPU: work is queued, and executed later in any allowed order.

A stream is a queue. ``run`` repeatedly picks, at random with a seed, a stream whose first entry is
ready: the entry waits for no event, or for an event that has passed. Every order that the events
allow can occur.
"""

import contextlib
import random


class Event:
    """Event that has passed once all work queued before its last ``record`` is done."""

    def __init__(self, world):
        self.world = world
        self.recorded = self.passed = 0

    def record(self, stream):
        self.recorded += 1
        number = self.recorded

        def passes():
            self.passed = max(self.passed, number)

        stream.queue.append((None, passes))

    def query(self):
        return self.passed >= self.recorded

    def synchronize(self):
        self.world.run(until=self.query)


class Stream:
    """Queue of ``(ready, work)``: ``work`` may run if ``ready`` is None or returns True."""

    numbers = iter(range(1, 10**9))

    def __init__(self, world):
        self.world, self.queue = world, []
        self.cuda_stream = next(Stream.numbers)
        world.streams.append(self)

    def wait_event(self, event):
        number = event.recorded  # The stream does not wait for later records.
        self.queue.append((lambda: event.passed >= number, lambda: None))

    def wait_stream(self, other):
        event = self.world.Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self):
        self.world.run(until=lambda: not self.queue)


class FakeCuda:
    """Substitute for the part of ``torch.cuda`` that ``lora_ext.pool._transfer`` uses."""

    def __init__(self, seed):
        self.streams = []
        self.random = random.Random(seed)
        self.active = Stream(self)
        self.capturing = False
        self.waits = 0  # number of times that the host waited for unfinished work

    def Stream(self, device=None):
        return Stream(self)

    def Event(self):
        return Event(self)

    def current_stream(self, device=None):
        return self.active

    def is_current_stream_capturing(self):
        return self.capturing

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.active = self.active, stream
        try:
            yield
        finally:
            self.active = before

    def launch(self, work):
        self.active.queue.append((None, work))

    def run(self, until=None):
        """Execute all queued work or, if ``until`` is given, only until ``until()`` is True. If it
        is not True at once, a wait of the host is counted."""
        if until is not None and not until():
            self.waits += 1
        while not (until is not None and until()):
            able = [
                s for s in self.streams if s.queue and (s.queue[0][0] is None or s.queue[0][0]())
            ]
            if not able:
                assert not any(s.queue for s in self.streams), "a stream waits for ever"
                assert until is None, "the host waits for ever"
                return
            self.random.choice(able).queue.pop(0)[1]()
