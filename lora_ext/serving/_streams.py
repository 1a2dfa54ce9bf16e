"""Requests of a continuous-batching manager as asynchronous streams, for servers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

_RECHECK_SECONDS = 1.0  # without a token, after which a stream looks whether the manager runs


class RequestStream:
    """The new tokens of one request, as an asynchronous iterator of lists.

    The request begins here, inside a running event loop. A reader that is slow gets longer lists,
    and neither the manager nor another reader waits for it.

    Args:
        manager: transformers' manager of an attached model, started.
        input_ids: the prompt.
        settings: of the manager's ``add_request``: ``adapter_name``, ``max_new_tokens``,
            ``eos_token_id``, ``sampling``.
        ended: called once, with this stream, when no token will come any more.
        begun: called with this stream when its first token has come, or none will.

    Raises:
        RuntimeError: the manager takes no requests, or, from the iterator, the request failed. And
            what ``add_request`` raises.
    """

    def __init__(
        self,
        manager: Any,
        input_ids: Sequence[int],
        *,
        ended: Callable[[RequestStream], None] | None = None,
        begun: Callable[[RequestStream], None] | None = None,
        **settings: Any,
    ):
        self.request_id = uuid.uuid4().hex
        self._prompt_length = len(input_ids)
        #: Every token so far.
        self.tokens: list[int] = []
        self.cancelled = self.stopped = False  # the latter by a stop string
        self._broken: str | None = None
        self._manager, self._read = manager, 0
        ends = settings.get("eos_token_id", manager.generation_config.eos_token_id)
        self._ends = [[end] for end in (ends if isinstance(ends, list) else [ends])]
        self._last: Any = None
        self._arrived = asyncio.Event()
        self._ended, self._begun = ended, begun
        self._watcher: asyncio.Future[None] | None = None
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
        return self.cancelled or (self._last is not None and self._last.is_finished())

    @property
    def finish_reason(self) -> str | None:
        """What OpenAI calls it: after an end token, a stop string or :meth:`cancel` "stop", else
        "length"; None while it runs."""
        if not self.finished:
            return None
        ended = self.stopped or self.cancelled or self.tokens[-1:] in self._ends
        return "stop" if ended else "length"

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of the answer so far, as OpenAI calls them."""
        prompt, answer = self._prompt_length, len(self.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
        }

    def cancel(self) -> None:
        """End the request, and let its adapter go. Whoever has all it wants calls this."""
        if not self.finished:
            self.cancelled = True
            self._manager.cancel_request(self.request_id)
            self._end()
            self._arrived.set()

    def interrupt(self, why: str) -> None:
        """End the request with an error for its reader, a :class:`RuntimeError` of these words."""
        if not self.finished:
            self._broken = why
            self.cancel()

    def until_gone(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """Cancel when the client of an ASGI connection has gone.

        Args:
            receive: of the connection, whose body has been read.
        """

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.cancel()

        if not self.finished:
            self._watcher = asyncio.ensure_future(watch())

    def __aiter__(self) -> AsyncIterator[list[int]]:
        return self

    async def __anext__(self) -> list[int]:
        while self._read == len(self.tokens):
            if self._broken is not None:
                raise RuntimeError(f"RequestStream: {self._broken}")
            if self._last is not None and self._last.error is not None:
                raise RuntimeError(f"RequestStream: the request failed: {self._last.error}")
            if self.finished:
                raise StopAsyncIteration
            try:
                await asyncio.wait_for(self._arrived.wait(), _RECHECK_SECONDS)
            except asyncio.TimeoutError:
                if not self._manager.is_running():
                    self.cancel()
                    raise RuntimeError("RequestStream: the manager has stopped") from None
            self._arrived.clear()
        new, self._read = self.tokens[self._read :], len(self.tokens)
        return new

    async def texts(self, tokenizer: Any, stop: str | Sequence[str] = ()) -> AsyncIterator[str]:
        """Yield the text in pieces, up to a stop string, which ends the request."""
        text = TextStream(tokenizer, stop)
        async for tokens in self:
            if piece := text.feed(tokens):
                yield piece
            if text.stopped:
                self.stopped = True
                self.cancel()
                return
        if rest := text.flush():
            yield rest

    def _take(self, output: Any) -> None:
        if self.finished:
            return
        self._last = output
        self.tokens = output.generated_tokens  # all since the prompt
        self._arrived.set()
        if self.finished:
            self._end()
        elif self._begun is not None and self.tokens:
            self._begun(self)

    def _end(self) -> None:
        if self._begun is not None:
            self._begun(self)
        self._forget()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._ended is not None:
            self._ended(self)

    def _forget(self) -> None:
        router = self._manager.output_router
        with router._lock:
            router.result_handlers.pop(self.request_id, None)


class TextStream:
    """Text of tokens that come one after another: whole characters, up to the first stop string.

    Args:
        tokenizer: of transformers. stop: a text, or several, that ends the answer and is no part
            of it.
    """

    def __init__(self, tokenizer: Any, stop: str | Sequence[str] = ()):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self._window: list[int] = []  # what was told already, and what comes after it
        self._told = 0
        self._held = ""  # may be the beginning of a stop string

    def feed(self, tokens: Sequence[int]) -> str:
        """Return the text that is certain after these tokens."""
        self._window += tokens
        text = self._text()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # a character whose other bytes are yet to come
        return self._tell(text)

    def flush(self) -> str:
        """Return the rest of the text when no more tokens come."""
        text = self._tell(self._text()) + self._held
        self._held = ""
        return text

    def _text(self) -> str:
        """Return the text after what was returned; tokenizers join words by their predecessors."""
        how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        told = self._tokenizer.decode(self._window[: self._told], **how)
        return self._tokenizer.decode(self._window, **how)[len(told) :]

    def _tell(self, text: str) -> str:
        if text:  # tokens without a text are nothing to join to
            self._window = self._window[self._told :]
        self._told = len(self._window)
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
    """Return the number of characters at the end of ``text`` that begin ``stop``."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
