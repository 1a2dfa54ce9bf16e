"""Responses in OpenAI's format, complete or as a stream of events."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from lora_ext.serving import RequestStream

from ._requests import Chat, Completion, Embedding

_OBJECTS = {  # field `object` of complete and of streamed responses, by kind of request
    Chat: ("chat.completion", "chat.completion.chunk"),
    Completion: ("text_completion", "text_completion"),
}


class Choice:
    """Answer to one prompt of a request: a running request of the engine, and what was sent of it.

    Args:
        asked: body of the request.
        stream: the running request.
        index: number of the prompt in the request.
        tokenizer: tokenizer of the model.
    """

    def __init__(self, asked: Chat | Completion, stream: RequestStream, index: int, tokenizer: Any):
        self.stream, self._asked, self._index = stream, asked, index
        self._texts = stream.texts(tokenizer, asked.stop or ())
        self._sent = 0  # number of tokens whose ids were sent

    async def whole(self) -> dict[str, Any]:
        """Return the choice of a complete response, after the last token."""
        text = "".join([text async for text in self._texts])
        said: dict[str, Any] = {"text": text}
        if isinstance(self._asked, Chat):
            said = {"message": {"role": "assistant", "content": text}}
        return self._choice(said, self._prompt(), self._new(self.stream.finish_reason))

    async def parts(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the choices of the events of a streamed response."""
        chat = isinstance(self._asked, Chat)
        first = self._prompt()
        if chat:
            yield self._choice({"delta": {"role": "assistant", "content": ""}}, first)
        elif first:
            yield self._choice({"text": ""}, first)
        async for text in self._texts:
            yield self._choice(
                {"delta": {"content": text}} if chat else {"text": text}, self._new()
            )
        said: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        yield self._choice(said, self._new(self.stream.finish_reason))

    def _choice(self, said: dict[str, Any], *more: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": self._index, **said, "logprobs": None, "finish_reason": None}
        for fields in more:
            choice |= fields
        return choice

    def _prompt(self) -> dict[str, Any]:
        """Return the fields about the prompt that the request asks for."""
        return {"prompt_token_ids": self.stream.prompt} if self._asked.return_token_ids else {}

    def _new(self, reason: str | None = None) -> dict[str, Any]:
        """Return the fields about the tokens since the last call; with a reason, about all."""
        stream, begin = self.stream, self._sent
        self._sent = stream.decoded if reason is None else len(stream.tokens)
        fields: dict[str, Any] = {"finish_reason": reason}
        if self._asked.return_token_ids:
            fields["token_ids"] = stream.tokens[begin : self._sent]
        return fields


@contextlib.contextmanager
def _cancelled(choices: Sequence[Choice]) -> Iterator[None]:
    """Cancel what still runs of a request when the block is left."""
    try:
        yield
    finally:
        for choice in choices:
            choice.stream.cancel()


def _head(asked: Chat | Completion, choices: Sequence[Choice]) -> dict[str, Any]:
    head = {"id": choices[0].stream.request_id, "created": int(time.time()), "model": asked.model}
    return {**head, "object": _OBJECTS[type(asked)][bool(asked.stream)]}


def _usage(choices: Sequence[Choice]) -> dict[str, int]:
    usages = [choice.stream.usage for choice in choices]
    return {name: sum(usage[name] for usage in usages) for name in usages[0]}


async def whole(asked: Chat | Completion, choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the complete response to a request, after the last token of each choice."""
    with _cancelled(choices):
        found = [await choice.whole() for choice in choices]
    return {**_head(asked, choices), "choices": found, "usage": _usage(choices)}


async def events(
    asked: Chat | Completion, choices: Sequence[Choice], failed: Callable[[Exception], str]
) -> AsyncIterator[str]:
    """Yield the server-sent events of a running request.

    If the request fails, the error is sent as an event, because the status 200 has been sent
    already. The last event is always ``[DONE]``.

    Args:
        asked: body of the request.
        choices: answers to the request's prompts.
        failed: function that formats an error as JSON.
    """
    head = _head(asked, choices)
    if asked.usage_wanted:
        head["usage"] = None
    try:
        with _cancelled(choices):
            async for part in _merged([choice.parts() for choice in choices]):
                yield f"data: {json.dumps({**head, 'choices': [part]})}\n\n"
        if asked.usage_wanted:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': _usage(choices)})}\n\n"
    except Exception as error:
        yield f"data: {failed(error)}\n\n"
    yield "data: [DONE]\n\n"


async def _merged(parts: Sequence[AsyncIterator[dict[str, Any]]]) -> AsyncIterator[dict[str, Any]]:
    """Yield the items of several iterators as they come."""
    if len(parts) == 1:
        async for part in parts[0]:
            yield part
        return
    waiting = {asyncio.ensure_future(anext(each)): each for each in parts}
    try:
        while waiting:
            ready, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in ready:
                each = waiting.pop(future)
                with contextlib.suppress(StopAsyncIteration):
                    yield future.result()
                    waiting[asyncio.ensure_future(anext(each))] = each
    finally:
        for future in waiting:
            future.cancel()


def embeddings(asked: Embedding, vectors: Tensor, tokens: int) -> dict[str, Any]:
    """Return the response of ``/v1/embeddings``.

    Args:
        asked: body of the request.
        vectors: embeddings ``(N, D)`` of ``N`` texts, float32 on the CPU.
        tokens: total number of tokens of the texts.
    """
    if asked.encoding_format == "base64":
        kept = [base64.b64encode(v.numpy().astype("<f4").tobytes()).decode() for v in vectors]
    else:
        kept = vectors.tolist()
    data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(kept)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": asked.model, "usage": usage}
