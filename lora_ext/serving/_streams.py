"""Asynchronous streams of the tokens of continuous-batching requests, for servers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from lora_ext._checks import require

from ._sampling import OVERFLOWS, Logprobs

_RECHECK_SECONDS = 1.0  # time without a token after which a stream checks that the manager runs


class GenerationGoneError(RuntimeError):
    """Error for a request that requires an adapter generation other than the current one."""


def check_generation(current: int | None, asked: int | None) -> None:
    """Raise GenerationGoneError if ``asked`` is neither None nor the current generation."""
    expected, error = f"{current}, the current one", GenerationGoneError
    require(asked in (None, current), "begin", "adapter_generation", expected, asked, error)


class RequestStream:
    """Asynchronous iterator over the new tokens of one request; each item is a list of token ids.

    The constructor starts the request and requires a running event loop. A slow reader receives
    longer lists; neither the manager nor other readers wait for it.

    Args:
        manager: continuous-batching manager of transformers for an attached model; it must have
            been started.
        input_ids: token ids of the prompt.
        ended: function that is called once with this stream after the last token.
        begun: function that is called with this stream when the first token has arrived, or when
            the request ends. This function may be called several times.
        generation: generation that the adapter must have; None accepts any.
        settings: keyword arguments of the manager's ``add_request``: ``adapter_name``,
            ``max_new_tokens``, ``eos_token_id``, ``sampling``, ``logprobs``.

    Raises:
        GenerationGoneError: If the generation of the adapter is not ``generation``.
        RuntimeError: If the manager does not accept requests. The iterator raises RuntimeError if
            the request fails, and ValueError if a logit is NaN or inf, for example because the
            adapter overflows.

    The constructor also raises the errors of ``add_request``.
    """

    def __init__(
        self,
        manager: Any,
        input_ids: Sequence[int],
        *,
        ended: Callable[[RequestStream], None] | None = None,
        begun: Callable[[RequestStream], None] | None = None,
        generation: int | None = None,
        **settings: Any,
    ):
        self.request_id = uuid.uuid4().hex
        self.prompt = list(input_ids)
        #: All tokens generated so far, up to the stop string if one was found.
        self.tokens: list[int] = []
        #: Number of tokens that :meth:`texts` has decoded.
        self.decoded = 0
        self.logprobs: Logprobs | None = settings.get("logprobs")
        self.cancelled = self.stopped = False  # stopped: a stop string ended the request
        #: Generation of the adapter; None for the base model.
        self.generation: int | None = generation
        #: Number that identifies the adapter's version and its weight; 0 for the base model.
        self.version = 0
        self._broken: str | None = None
        self._manager, self._read = manager, 0
        ends = settings.get("eos_token_id", manager.generation_config.eos_token_id)
        self._ends = [[end] for end in (ends if isinstance(ends, list) else [ends])]
        self._last: Any = None
        self._arrived = asyncio.Event()
        self._ended, self._begun = ended, begun
        self._watcher: asyncio.Future[None] | None = None
        self._watched: Sequence[RequestStream] = ()
        manager.register_result_handler(self.request_id, self._take)
        accepted = None
        try:
            how = {"request_id": self.request_id, "streaming": True, "pinned": self._pinned}
            accepted = manager.add_request(input_ids, **how, **settings)
        finally:
            if accepted is None:
                self._forget()
        if accepted is None:
            raise RuntimeError(
                "RequestStream: expected a running manager, found a stopping or failed one"
            )

    @property
    def finished(self) -> bool:
        """True if there will be no more tokens."""
        return self.cancelled or (self._last is not None and self._last.is_finished())

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's ``finish_reason``; None while the request runs.

        It is "stop" after an end token, a stop string or :meth:`cancel`, and otherwise "length".
        """
        if not self.finished:
            return None
        ended = self.stopped or self.cancelled or self.tokens[-1:] in self._ends
        return "stop" if ended else "length"

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens in the prompt and in the answer so far, under OpenAI's names."""
        found = {"prompt_tokens": len(self.prompt), "completion_tokens": len(self.tokens)}
        return {**found, "total_tokens": sum(found.values())}

    def cancel(self) -> None:
        """End the request and unpin its adapter, for example if no more tokens are needed."""
        if not self.finished:
            self.cancelled = True
            self._manager.cancel_request(self.request_id)
            self._end()
            self._arrived.set()

    def interrupt(self, why: str) -> None:
        """End the request; the iterator raises RuntimeError with the message ``why``."""
        if not self.finished:
            self._broken = why
            self.cancel()

    def until_gone(
        self, receive: Callable[[], Awaitable[Any]], others: Sequence[RequestStream] = ()
    ) -> None:
        """Cancel the request when the client of an ASGI connection disconnects.

        Args:
            receive: the connection's ASGI ``receive`` function. The request body must have been
                read already.
            others: other requests of the same connection, which are cancelled too.
        """
        streams = (self, *others)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            for stream in streams:
                stream.cancel()

        if not all(stream.finished for stream in streams):
            watcher = asyncio.ensure_future(watch())
            for stream in streams:
                stream._watcher, stream._watched = watcher, streams

    def __aiter__(self) -> AsyncIterator[list[int]]:
        return self

    async def __anext__(self) -> list[int]:
        while self._read == len(self.tokens):
            if self._broken is not None:
                raise RuntimeError(f"RequestStream: {self._broken}")
            if self._last is not None and self._last.error is not None:
                self.cancel()
                kind = ValueError if OVERFLOWS in self._last.error else RuntimeError
                raise kind(f"RequestStream: the request failed: {self._last.error}")
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
        """Yield the text of the answer in pieces, up to the first of the stop strings.

        A stop string ends the request.
        """
        text = TextStream(tokenizer, stop)
        async for tokens in self:
            piece = ""
            for token in tokens:
                piece += text.feed([token])
                self.decoded += 1
                if text.stopped:
                    break
            if piece:
                yield piece
            if text.stopped:
                self.stopped, self.tokens = True, self.tokens[: self.decoded]
                self.cancel()
                return
        if rest := text.flush():
            yield rest

    def _pinned(self, found: int | None, version: int) -> None:
        check_generation(found, self.generation)
        self.generation, self.version = found, version

    def _take(self, output: Any) -> None:
        if self.finished:
            return
        self._last = output
        # The output contains all generated tokens, not only the new ones.
        self.tokens = self.tokens if output.error else output.generated_tokens
        self._arrived.set()
        if self.finished:
            self._end()
        elif self._begun is not None and self.tokens:
            self._begun(self)

    def _end(self) -> None:
        if self._begun is not None:
            self._begun(self)
        self._forget()
        if self._watcher is not None and all(each.finished for each in self._watched):
            self._watcher.cancel()
        if self._ended is not None:
            self._ended(self)

    def _forget(self) -> None:
        router = self._manager.output_router
        with router._lock:
            router.result_handlers.pop(self.request_id, None)


class TextStream:
    """Incremental decoder that returns whole characters, up to the first stop string.

    Args:
        tokenizer: a transformers tokenizer.
        stop: stop string, or several of them. A stop string ends the answer and is not part of it.
    """

    def __init__(self, tokenizer: Any, stop: str | Sequence[str] = ()):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        # The tokens whose text was returned last, then those whose text has not been returned yet.
        self._window: list[int] = []
        self._told = 0  # number of tokens in the window whose text was returned
        self._held = ""  # text that may be the beginning of a stop string

    def feed(self, tokens: Sequence[int]) -> str:
        """Return the new text that no later token can change."""
        self._window += tokens
        text = self._text()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # an incomplete character
        return self._tell(text)

    def flush(self) -> str:
        """Return the text that is still held back. Call this after the last token."""
        text = self._tell(self._text()) + self._held
        self._held = ""
        return text

    def _text(self) -> str:
        """Return the new text, decoded together with the tokens of the last returned text."""
        how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        told = self._tokenizer.decode(self._window[: self._told], **how)
        return self._tokenizer.decode(self._window, **how)[len(told) :]

    def _tell(self, text: str) -> str:
        if text:  # tokens without text stay in the window with the preceding tokens
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
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
