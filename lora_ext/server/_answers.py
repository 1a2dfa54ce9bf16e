"""Responses in OpenAI's format, complete or as a stream of events."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from lora_ext._checks import require
from lora_ext.serving import Engine, Logprobs, RequestStream, TextStream, TokenLogprob

from ._requests import Chat, Completion, Embedding, Prompt

_MOST_VALUES = 50_000  # maximum number of prompt log-probabilities in one response

_OBJECTS = {  # field `object` of complete and of streamed responses, by kind of request
    Chat: ("chat.completion", "chat.completion.chunk"),
    Completion: ("text_completion", "text_completion"),
}


# Tokens, their log-probabilities (None for the first one of a prompt), and their text offsets.
_Tokens: TypeAlias = list[tuple[int, TokenLogprob | None, int]]


@dataclass(eq=False)
class Choice:
    """Answer to one prompt of a request: the engine's running request, and the tokens sent so far.

    Args:
        asked: body of the request.
        engine: engine that runs the request.
        prompt: prompt as the engine received it.
        stream: the running request.
        index: index of the choice in the response.
    """

    asked: Chat | Completion
    engine: Engine
    prompt: Prompt
    stream: RequestStream
    index: int

    def __post_init__(self) -> None:
        self._chat = isinstance(self.asked, Chat)
        texts = self.stream.texts(self.engine.tokenizer, self.asked.stop or ())
        self._texts = self._no_texts() if self.asked.max_tokens == 0 else texts
        self._logprobs = self.stream.logprobs or Logprobs()
        self._sent = 0  # number of generated tokens that were sent
        self._offset = 0  # number of characters before the next token
        self._plain = TextStream(self.engine.tokenizer)  # decodes tokens to find their offsets

    async def _no_texts(self) -> AsyncIterator[str]:
        """Wait until the prompt is computed, drop the token after it, and yield nothing."""
        async for _ in self.stream:
            pass
        self.stream.tokens = []
        for text in ():
            yield text

    async def whole(self) -> dict[str, Any]:
        """Wait for the last token, and return the choice of a complete response."""
        text = "".join([text async for text in self._texts])
        echo, tokens = self._echo()
        message = {"role": "assistant", "content": text}
        said: dict[str, Any] = {"message": message} if self._chat else {"text": echo + text}
        stream, more = self.stream, await self._of_prompt()
        choice = self._choice(said, len(stream.tokens), tokens)
        return {**choice, **more, "finish_reason": stream.finish_reason}

    async def parts(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the choice of each event of a streamed response."""

        def said(text: str) -> dict[str, Any]:
            return {"delta": {"content": text}} if self._chat else {"text": text}

        # The log-probabilities of the prompt are known when the first token is known.
        first = await anext(self._texts, None) if self._logprobs.prompt_top is not None else None
        (echo, tokens), more = self._echo(), await self._of_prompt()
        if self._chat:
            yield {**self._choice({"delta": {"role": "assistant", "content": ""}}, 0), **more}
        elif echo or tokens or more:
            yield {**self._choice(said(echo), 0, tokens), **more}
        if first is not None:
            yield self._choice(said(first), self.stream.decoded)
        async for text in self._texts:
            yield self._choice(said(text), self.stream.decoded)
        choice = self._choice({"delta": {}} if self._chat else said(""), len(self.stream.tokens))
        yield {**choice, "finish_reason": self.stream.finish_reason}

    def _choice(self, said: dict[str, Any], end: int, before: _Tokens | None = None) -> Any:
        """Return a choice with the fields ``said`` and the tokens that were not returned before.

        These are the tokens of ``before``, such as an echoed prompt, and the generated ones up to
        ``end``.
        """
        tokens = self.stream.tokens[self._sent : end]
        entries = self._logprobs.tokens[self._sent : end]
        self._sent = end
        choice = {"index": self.index, **said, "logprobs": None, "finish_reason": None}
        if self._logprobs.top is not None and (tokens or before):
            new = zip(tokens, entries, self._offsets(tokens), strict=True)
            choice["logprobs"] = self._listed([*(before or ()), *new], self._logprobs.top)
        if self.asked.return_token_ids:
            choice["token_ids"] = tokens
        return choice

    def _echo(self) -> tuple[str, _Tokens]:
        """Return the text and the tokens of the prompt if the answer repeats them."""
        asked, ids, tokens = self.asked, self.stream.prompt, []
        if not (isinstance(asked, Completion) and asked.echo):
            return "", []
        text: Any = self.prompt
        if not isinstance(text, str):
            text = self.engine.tokenizer.decode(ids, skip_special_tokens=True)
        if asked.logprobs is not None:
            entries = [None, *(self._logprobs.prompt.get(i) for i in range(1, len(ids)))]
            tokens = list(zip(ids, entries, self._offsets(ids), strict=True))
        self._offset, self._plain = len(text), TextStream(self.engine.tokenizer)
        return text, tokens

    def _offsets(self, tokens: Sequence[int]) -> list[int]:
        """Return the number of characters before each of the next tokens."""
        found = []
        for token in tokens:
            found.append(self._offset)
            self._offset += 0 if self._chat else len(self._plain.feed([token]))
        return found

    async def _of_prompt(self) -> dict[str, Any]:
        """Return the fields about the prompt that the request asks for."""
        asked, ids, found = self.asked, self.stream.prompt, {}
        if asked.return_token_ids:
            found["prompt_token_ids"] = ids
        if isinstance(asked, Completion) and asked.prompt_logprobs is not None:
            prompt = self._logprobs.prompt  # incomplete after a disconnect
            entries = [prompt[i] for i in range(1, len(ids)) if i in prompt]
            # Another thread converts the entries, because there may be many.
            ranked = await asyncio.to_thread(list, map(self._ranked, entries))
            found["prompt_logprobs"] = [None, *ranked]
        return found

    def _ranked(self, entry: TokenLogprob) -> dict[str, Any]:
        """Return the entry's most likely tokens and its own token in vLLM's format, by token id."""
        top = entry.top[: getattr(self.asked, "prompt_logprobs", 0)]
        every = {token: (value, rank) for rank, (token, value) in enumerate(top, 1)}
        every[entry.token] = entry.value, entry.rank
        text = self.engine.token_text
        return {
            str(token): {"logprob": _finite(value), "rank": rank, "decoded_token": text(token)}
            for token, (value, rank) in every.items()
        }

    def _listed(self, tokens: _Tokens, top: int) -> dict[str, Any]:
        """Return log-probabilities in OpenAI's format for chats, or for completions."""
        text = self.engine.token_text
        if self._chat:
            content = [self._named(e.token, e.value, e.top) for _, e, _ in tokens if e]
            return {"content": content, "refusal": None}
        return {
            "tokens": [text(token) for token, _, _ in tokens],
            "token_logprobs": [e and _finite(e.value) for _, e, _ in tokens],
            "top_logprobs": [e and self._best(e, top) for _, e, _ in tokens] if top else None,
            "text_offset": [offset for _, _, offset in tokens],
        }

    def _named(self, token: int, value: float, top: Any = None) -> dict[str, Any]:
        text = self.engine.token_text(token)
        found = None if text == f"token_id:{token}" else list(text.encode())
        best = {} if top is None else {"top_logprobs": [self._named(*each) for each in top]}
        return {"token": text, "logprob": _finite(value), "bytes": found, **best}

    def _best(self, entry: TokenLogprob, top: int) -> dict[str, float]:
        """Return by text the log-probabilities of the most likely tokens and the entry's token."""
        found: dict[str, float] = {}
        for token, value in dict([*entry.top[:top], (entry.token, entry.value)]).items():
            text = self.engine.token_text(token)
            found[f"token_id:{token}" if text in found else text] = _finite(value)
        return found


def _finite(value: float) -> float:
    """Return a log-probability as a number of JSON: at least -9999, as in vLLM.

    Raises:
        ValueError: If the value is NaN.
    """
    if value != value:
        raise ValueError("logprobs: expected finite values, found nan: the adapter overflows")
    return max(value, -9999.0)


@contextlib.contextmanager
def cancelled_on_errors(streams: Sequence[RequestStream]) -> Iterator[None]:
    """Cancel the requests if the ``with`` block raises an error."""
    try:
        yield
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise


async def sized(
    asked: Chat | Completion, engine: Engine, prompts: list[Prompt], top: int
) -> list[Any]:
    """Return the token ids of prompts, for a response with ``top`` log-probabilities per token.

    Raises:
        ValueError: If the response would contain too many log-probabilities.
    """
    count, ids = asked.n or 1, await engine.encode_all(prompts)
    values = sum(map(len, ids)) * count * (top + 1)
    expected = f"at most {_MOST_VALUES} log-probabilities of prompts (tokens x (top + 1))"
    own = getattr(asked, "prompt_logprobs", None) is not None
    field = "prompt_logprobs" if own else "logprobs"
    require(values <= _MOST_VALUES, "begin", field, expected, values)
    return ids


def _head(asked: Chat | Completion, choices: Sequence[Choice]) -> dict[str, Any]:
    head = {"id": choices[0].stream.request_id, "created": int(time.time()), "model": asked.model}
    head["adapter_generation"] = choices[0].stream.generation
    return {**head, "object": _OBJECTS[type(asked)][bool(asked.stream)]}


def _usage(choices: Sequence[Choice]) -> dict[str, int]:
    usages = [choice.stream.usage for choice in choices]
    found = {name: sum(usage[name] for usage in usages) for name in usages[0]}
    found["prompt_tokens"] //= choices[0].asked.n or 1  # a prompt counts once for all its answers
    return {**found, "total_tokens": found["prompt_tokens"] + found["completion_tokens"]}


async def whole(asked: Chat | Completion, choices: Sequence[Choice]) -> dict[str, Any]:
    """Wait for the last token of each choice, and return the complete response to a request."""
    found = await asyncio.gather(*(choice.whole() for choice in choices))
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
        parts = [choice.parts() for choice in choices]
        with cancelled_on_errors([choice.stream for choice in choices]):
            async for part in parts[0] if len(parts) == 1 else _merged(parts):
                yield f"data: {json.dumps({**head, 'choices': [part]})}\n\n"
        if asked.usage_wanted:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': _usage(choices)})}\n\n"
    except Exception as error:
        yield f"data: {failed(error)}\n\n"
    yield "data: [DONE]\n\n"


async def _merged(parts: Sequence[AsyncIterator[dict[str, Any]]]) -> AsyncIterator[dict[str, Any]]:
    """Yield the items of several iterators, each as soon as it is available."""
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
