"""Streams and events without a GPU: work is queued, and done later in any order that is allowed.

A stream is a queue. ``run`` picks, with a seed, any stream whose first entry may go: an event that
it waits for has been passed, or it waits for none. So an order that no event forbids does occur.
"""

import contextlib
import random


class Event:
    """Passed once the work that was queued before its last record is done."""

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
    """A queue of ``(ready or None, work)``."""

    numbers = iter(range(1, 10**9))

    def __init__(self, world):
        self.world, self.queue = world, []
        self.cuda_stream = next(Stream.numbers)
        world.streams.append(self)

    def wait_event(self, event):
        number = event.recorded  # a later record is not waited for
        self.queue.append((lambda: event.passed >= number, lambda: None))

    def wait_stream(self, other):
        event = self.world.Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self):
        self.world.run(until=lambda: not self.queue)


class FakeCuda:
    """What ``lora_ext.pool._transfer`` uses of ``torch.cuda``."""

    def __init__(self, seed):
        self.streams = []
        self.random = random.Random(seed)
        self.active = Stream(self)
        self.capturing = False
        self.waits = 0  # how often the host waited with work left to do

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
        """Do what is queued: all of it, or until a condition holds, at which the host waited."""
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
