"""Responses in OpenAI's format, complete or as a stream of events."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from torch import Tensor

from lora_ext.serving import RequestStream

from ._requests import Chat, Completion, Embedding

_OBJECTS = {  # field `object` of complete and of streamed responses, by kind of request
    Chat: ("chat.completion", "chat.completion.chunk"),
    Completion: ("text_completion", "text_completion"),
}


def _head(asked: Chat | Completion, stream: RequestStream) -> dict[str, Any]:
    head = {"id": stream.request_id, "created": int(time.time()), "model": asked.model}
    head["adapter_generation"] = stream.generation
    return {**head, "object": _OBJECTS[type(asked)][bool(asked.stream)]}


def whole(asked: Chat | Completion, stream: RequestStream, text: str) -> dict[str, Any]:
    """Return the complete response to a finished request that generated ``text``."""
    said: dict[str, Any] = {"text": text}
    if isinstance(asked, Chat):
        said = {"message": {"role": "assistant", "content": text}}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": stream.finish_reason}
    return {**_head(asked, stream), "choices": [choice], "usage": stream.usage}


async def events(
    asked: Chat | Completion,
    stream: RequestStream,
    texts: AsyncIterator[str],
    failed: Callable[[Exception], str],
) -> AsyncIterator[str]:
    """Yield the server-sent events of a running request.

    If the request fails, the error is sent as an event, because the status 200 has been sent
    already. The last event is always ``[DONE]``.

    Args:
        asked: body of the request.
        stream: the running request in the engine.
        texts: pieces of the generated text.
        failed: function that formats an error as JSON.
    """
    head = _head(asked, stream)
    if asked.usage_wanted:
        head["usage"] = None

    def event(text: str | None, reason: str | None = None, **more: str) -> str:
        said: dict[str, Any] = {"text": text or ""}
        if isinstance(asked, Chat):
            said = {"delta": {**more} if text is None else {**more, "content": text}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

    try:
        if isinstance(asked, Chat):
            yield event("", role="assistant")
        async for text in texts:
            yield event(text)
        yield event(None, stream.finish_reason)
        if asked.usage_wanted:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': stream.usage})}\n\n"
    except Exception as error:
        yield f"data: {failed(error)}\n\n"
    yield "data: [DONE]\n\n"


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
