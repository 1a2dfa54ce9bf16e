"""Of requests that come together over a text that nobody has read, one goes ahead.

Pages of keys and values can be shared once they are computed. Requests in one batch over the same
unread text would each compute all of it; those that come second wait here until the first has its
first token, and then read what it has written.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_PATIENCE = 1.0  # seconds after which a waiting request asks whether anybody still reads
_REMEMBERED = 16  # prompts that have been read


@dataclass(frozen=True)
class Asked:
    """A request's tokens, its adapter (None: the base model), and where that begins: what lies
    before is the base model's."""

    tokens: Sequence[int]
    adapter: str | None
    start: int

    def shared(self, other: Asked, page: int) -> int:
        """How many tokens are of pages that both requests may read."""
        count = 0
        for mine, others in zip(self.tokens, other.tokens, strict=False):
            if mine != others:
                break
            count += 1
        if self.adapter != other.adapter:
            count = min(count, self.start, other.start)
        return count // page * page


class Ahead:
    """The prompts that a manager reads and has read.

    Args:
        page: tokens of a page. alive: whether the manager still runs.
    """

    def __init__(self, page: int, alive: Callable[[], bool]):
        self._page, self._alive = page, alive
        self._reading: dict[Any, tuple[Asked, asyncio.Event]] = {}
        self._read: deque[Asked] = deque(maxlen=_REMEMBERED)

    async def wait(self, asked: Asked) -> None:
        """Until nobody reads more of this prompt for the first time."""
        while self._alive() and (event := self._worth_waiting(asked)) is not None:
            try:
                await asyncio.wait_for(event.wait(), _PATIENCE)
            except asyncio.TimeoutError:
                continue

    def _worth_waiting(self, asked: Asked) -> asyncio.Event | None:
        known = max((asked.shared(other, self._page) for other in self._read), default=0)
        for other, event in self._reading.values():
            if asked.shared(other, self._page) > known:
                return event
        return None

    def begins(self, stream: Any, asked: Asked) -> None:
        """A stream's prompt is being read."""
        self._reading[stream] = asked, asyncio.Event()

    def ends(self, stream: Any) -> None:
        """It has its first token, or will have none."""
        asked, event = self._reading.pop(stream, (None, None))
        if asked is not None and stream.tokens:
            self._read.append(asked)
        if event is not None:
            event.set()
