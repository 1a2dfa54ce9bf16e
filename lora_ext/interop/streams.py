"""Requests of a continuous-batching manager as asynchronous streams, for servers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

_PATIENCE = 1.0  # seconds without a token after which we ask whether the manager still runs


class RequestStream:
    """The new tokens of one request, as an asynchronous iterator of lists.

    The request begins here, inside a running event loop. A reader that is slow gets longer lists,
    and neither the manager nor another reader waits for it.

    Args:
        manager: transformers' manager of an attached model, started.
        input_ids: the prompt.
        settings: of the manager's ``add_request``: ``adapter_name``, ``max_new_tokens``,
            ``eos_token_id``, ``sampling``.

    Raises:
        RuntimeError: the manager takes no requests, or, from the iterator, the request failed. And
            what ``add_request`` raises.
    """

    def __init__(self, manager: Any, input_ids: Sequence[int], **settings: Any):
        self.request_id = uuid.uuid4().hex
        #: Every token so far.
        self.tokens: list[int] = []
        self._manager, self._read = manager, 0
        ends = settings.get("eos_token_id", manager.generation_config.eos_token_id)
        self._ends = [[end] for end in (ends if isinstance(ends, list) else [ends])]
        self._last: Any = None
        self._arrived = asyncio.Event()
        self._cancelled = False
        manager.register_result_handler(self.request_id, self._take)
        accepted = None
        try:
            accepted = manager.add_request(
                input_ids, request_id=self.request_id, streaming=True, **settings
            )
        finally:
            if accepted is None:
                self._forget()
        if accepted is None:
            raise RuntimeError("RequestStream: the manager takes no requests: it stops or failed")

    @property
    def finished(self) -> bool:
        """Whether no token will come any more."""
        return self._cancelled or (self._last is not None and self._last.is_finished())

    @property
    def finish_reason(self) -> str | None:
        """ "stop" after an end token or :meth:`cancel`, "length" without, None while it runs."""
        if not self.finished:
            return None
        return "stop" if self._cancelled or self.tokens[-1:] in self._ends else "length"

    def cancel(self) -> None:
        """End the request, and let its adapter go. Whoever has all it wants calls this."""
        if not self.finished:
            self._cancelled = True
            self._manager.cancel_request(self.request_id)
            self._forget()
            self._arrived.set()

    def __aiter__(self) -> AsyncIterator[list[int]]:
        return self

    async def __anext__(self) -> list[int]:
        while self._read == len(self.tokens):
            if self._last is not None and self._last.error is not None:
                raise RuntimeError(f"RequestStream: the request failed: {self._last.error}")
            if self.finished:
                raise StopAsyncIteration
            try:
                await asyncio.wait_for(self._arrived.wait(), _PATIENCE)
            except asyncio.TimeoutError:
                if not self._manager.is_running():
                    self.cancel()
                    raise RuntimeError("RequestStream: the manager has stopped") from None
            self._arrived.clear()
        new, self._read = self.tokens[self._read :], len(self.tokens)
        return new

    async def texts(self, tokenizer: Any, stop: Sequence[str] = ()) -> AsyncIterator[str]:
        """Its text in pieces, up to a stop string, which ends the request."""
        text = TextStream(tokenizer, stop)
        async for tokens in self:
            if piece := text.feed(tokens):
                yield piece
            if text.stopped:
                self.cancel()
                return
        if rest := text.flush():
            yield rest

    def _take(self, output: Any) -> None:
        self._last = output
        self.tokens = output.generated_tokens  # all since the prompt
        self._arrived.set()

    def _forget(self) -> None:
        router = self._manager.output_router
        with router._lock:
            router.result_handlers.pop(self.request_id, None)


class TextStream:
    """Text of tokens that come one after another: whole characters, up to the first stop string.

    Args:
        tokenizer: of transformers. stop: texts that end the answer and are no part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._window: list[int] = []  # what was told already, and what comes after it
        self._told = 0
        self._held = ""  # may be the beginning of a stop string

    def feed(self, tokens: Sequence[int]) -> str:
        """What can be said now that these have come."""
        self._window += tokens
        text = self._text()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # a character whose other bytes are yet to come
        return self._tell(text)

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        text = self._tell(self._text()) + self._held
        self._held = ""
        return text

    def _text(self) -> str:
        """After what was told. Tokenizers join words by what stands before them."""
        told, text = (
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for ids in (self._window[: self._told], self._window)
        )
        return text[len(told) :]

    def _tell(self, text: str) -> str:
        self._window, self._told = self._window[self._told :], len(self._window) - self._told
        if self.stopped:
            return ""
        text, self._held = self._held + text, ""
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - kept
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` begin ``stop``."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
