"""Bodies of requests, with the fields of OpenAI's API that the server accepts.

Unknown fields are rejected. Fields that do not affect the response, such as ``user``, are accepted
and ignored. A field that would affect the response but is not supported, such as
``presence_penalty``, is accepted only with its default value, which has no effect. All optional
fields may be null, as in OpenAI's API.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from fastapi import HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_ext.serving import Sampling, read_format, refuse_old_names

_MAX_ERRORS = 4  # maximum number of errors of one request that a message describes

Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]
Tokens: TypeAlias = Annotated[list[int], Field(min_length=1)]
Zero: TypeAlias = Annotated[float, Field(ge=0, le=0)]
Empty: TypeAlias = Annotated[list[Any], Field(max_length=0)]
Prompt: TypeAlias = str | list[int] | list[dict[str, Any]]


class _Asked(BaseModel):
    """JSON object in the body of a request; unknown fields and wrong types raise an error."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)


class Text(_Asked):
    """Text as a part of the content of a chat message."""

    type: Literal["text"]
    text: str


class Message(_Asked):
    """Message of a chat.

    Some fields are accepted only with null or an empty list, because clients send the messages of
    earlier responses with all their fields.
    """

    role: str
    content: str | Annotated[list[Text], Field(min_length=1)]
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: Empty | None = None
    function_call: None = None
    tool_calls: Empty | None = None

    def said(self) -> dict[str, str]:
        """Return the message as a chat template expects it; its parts are joined by newlines."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **named}


class StreamOptions(_Asked):
    """Value of the field ``stream_options``."""

    include_usage: bool | None = None


class _Generates(_Asked):
    """Common fields of requests for chats and completions."""

    #: Default of ``max_tokens``; None is the default of :meth:`Engine.begin`.
    default_max_tokens: ClassVar[int | None] = None

    model: str
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None  # as in vLLM
    adapter_generation: int | None = Field(None, ge=0)
    # Fields that do not affect the response.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Fields that are accepted only with a value that has no effect.
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _names(cls, body: Any) -> Any:
        if isinstance(body, dict):
            refuse_old_names(body)
        return body

    @property
    def usage_wanted(self) -> bool:
        """True if the stream must end with an event that contains the usage (token counts)."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of :meth:`Engine.begin` except the prompt and the adapter.

        Raises:
            ValueError: If fields contradict each other.
        """
        if self.stream_options and not self.stream:
            found = f"stream={self.stream}"
            raise ValueError(f"stream_options: expected only with stream=True, found {found}")
        form = read_format(self.response_format, self.structured_outputs)
        if form is not None and self.stop:
            expected = "none with a required format, which it could cut off"
            raise ValueError(f"stop: expected {expected}, found {self.stop!r:.200}")
        temperature, top_p = (1.0 if x is None else x for x in (self.temperature, self.top_p))
        most = self.default_max_tokens if self.max_tokens is None else self.max_tokens
        sampling = Sampling(temperature, top_p, self.seed)
        how = {"sampling": sampling, "form": form, "max_new_tokens": most}
        return {**how, "generation": self.adapter_generation}


class Chat(_Generates):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, alias="max_completion_tokens")
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    parallel_tool_calls: bool | None = None  # no effect, because there are no tools
    tools: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    modalities: list[Literal["text"]] | None = None
    functions: Empty | None = None
    function_call: Literal["none", "auto"] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    def prompt(self) -> Prompt:
        """Return the prompt for :meth:`Engine.begin`."""
        return [message.said() for message in self.messages]


class Completion(_Generates):
    """Body of ``POST /v1/completions``. The prompt is one text, or the tokens of one text."""

    default_max_tokens: ClassVar[int | None] = 16  # as in OpenAI's API

    text: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1, max_length=1)] = (
        Field(alias="prompt")
    )
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None

    def prompt(self) -> Prompt:
        """Return the prompt for :meth:`Engine.begin`."""
        given = self.text
        nested = isinstance(given, list) and given and not isinstance(given[0], int)
        return given[0] if nested else given  # pyright: ignore[reportReturnType]


class Embedding(_Asked):
    """Body of ``POST /v1/embeddings``. The input is one or several texts, or their tokens."""

    model: str
    input: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None

    def texts(self) -> list[str | list[int]]:
        """Return the texts, or their tokens, for :meth:`Embedder.embed`."""
        given = self.input
        alone = isinstance(given, str) or isinstance(given[0], int)
        return [given] if alone else given  # pyright: ignore[reportReturnType]


class Load(_Asked):
    """Body of ``POST /v1/load_lora_adapter``, with vLLM's fields."""

    lora_name: str
    lora_path: str | None = None
    # Fields without effect: every load replaces the adapter for later requests, and reads it once.
    load_inplace: bool | None = None
    is_3d_lora_weight: Literal[False] | None = None


class Unload(_Asked):
    """Body of ``POST /v1/unload_lora_adapter``, with vLLM's fields."""

    lora_name: str
    lora_int_id: int | None = None


async def read_body(request: Request, most: int) -> bytes:
    """Read the body of a request; raise an HTTPException 413 if it exceeds ``most`` bytes."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise HTTPException(413, f"body: expected at most {most} bytes, found more")
    return bytes(body)


def told(error: ValidationError) -> str:
    """Return one line that describes the errors in a body, with the name of each field."""
    found = error.errors(include_url=False, include_context=False)
    lines = []
    for one in found[:_MAX_ERRORS]:
        place = ".".join(map(str, one["loc"])) or "body"
        value = f", found {one['input']!r:.100}" if one["type"] != "missing" and one["loc"] else ""
        lines.append(f"{place}: {one['msg']}{value}")
    more = f"; and {len(found) - _MAX_ERRORS} more" if len(found) > _MAX_ERRORS else ""
    return "; ".join(lines) + more
