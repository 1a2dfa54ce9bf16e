"""Bodies of requests, with the fields of OpenAI's API that the server accepts.

Unknown fields are rejected. Fields that do not affect the response, such as ``user``, are accepted
and ignored. A field of OpenAI's or vLLM's API that would affect the response but is not supported,
such as ``presence_penalty``, is accepted only with a value that has no effect. All optional fields
may be null, as in OpenAI's API.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from fastapi import HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lora_ext.serving import Logprobs, Sampling, read_format, refuse_old_names

_MAX_ANSWERS = 128  # maximum number of answers to one prompt, as in OpenAI's API
_MAX_MEMBERS = 64  # maximum number of adapters in a mixture
_MAX_ERRORS = 4  # maximum number of errors of one request that a message describes

Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]
Tokens: TypeAlias = Annotated[list[int], Field(min_length=1)]
TokenText: TypeAlias = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Top: TypeAlias = Annotated[int, Field(ge=0, le=20)]
Empty: TypeAlias = Annotated[list[Any], Field(max_length=0)]
Texts: TypeAlias = (
    str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1, max_length=2048)]
)
Prompt: TypeAlias = str | list[int] | list[dict[str, Any]]


def _by_name(*groups: tuple[tuple[Any, ...], str]) -> dict[str, tuple[Any, ...]]:
    return {name: values for values, names in groups for name in names.split()}


# Fields that are accepted only with null or with the listed values, which have no effect.
_NEUTRAL = _by_name(
    ((0,), "presence_penalty frequency_penalty priority routed_experts_prompt_start"),
    ((1,), "best_of length_penalty stream_interval"),
    ((-1,), "thinking_token_budget"),
    ((False,), "use_beam_search ignore_eos include_stop_str_in_output watermarking"),
    ((False,), "return_tokens_as_token_ids return_prompt_text"),
    ((True,), "skip_special_tokens spaces_between_special_tokens"),
    ((False, True), "return_token_offsets return_mm_kwargs"),
    (([],), "logits_processors bad_words"),
    (({},), "kv_transfer_params ec_transfer_params vllm_xargs repetition_detection"),
    (("left", "right"), "truncation_side"),
    ((), "truncate_prompt_tokens cache_salt allowed_token_ids logprob_token_ids"),
)
_NEUTRAL_IN_CHATS = _NEUTRAL | _by_name(
    ((False,), "echo continue_final_message add_special_tokens"),
    ((True,), "add_generation_prompt"),
    ((False, True), "include_reasoning parallel_tool_calls"),
    (([],), "tools functions documents"),
    (({},), "chat_template_kwargs media_io_kwargs mm_processor_kwargs"),
    (("none", "auto"), "tool_choice function_call"),
    (("auto", "default"), "service_tier"),
    (("in_memory", "24h"), "prompt_cache_retention"),
    (("medium",), "verbosity"),
    ((["text"],), "modalities"),
    ((), "audio prediction web_search_options moderation reasoning_effort chat_template suffix"),
    ((), "prompt_logprobs"),
)
_NEUTRAL_IN_COMPLETIONS = _NEUTRAL | _by_name(
    (("",), "suffix"), ((True,), "add_special_tokens"), ((), "prompt_embeds")
)


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
    reasoning: None = None
    reasoning_content: None = None

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
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class Member(_Asked):
    """Adapter of a request with its scale, as in llama.cpp's server."""

    id: Annotated[int, Field(ge=0)] | str
    scale: Annotated[float, Field(allow_inf_nan=False)]


class _ForModel(_Asked):
    """Common fields of requests to a model."""

    model: str
    lora: Annotated[list[Member], Field(max_length=_MAX_MEMBERS)] | None = None
    user: str | None = None  # without effect


class _Generates(_ForModel):
    """Common fields of requests for chats and completions."""

    #: Default of ``max_tokens``; None selects the default of :meth:`Engine.begin`.
    default_max_tokens: ClassVar[int | None] = None
    #: Accepted values of each field that is not supported, by name. These values have no effect.
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = _NEUTRAL
    n: int | None = Field(None, ge=1, le=_MAX_ANSWERS)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logit_bias: dict[TokenText, Annotated[float, Field(ge=-100, le=100)]] | None = None
    top_k: int | None = Field(None, ge=-1)  # from here to min_tokens, as in vLLM
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    stop_token_ids: Annotated[list[int], Field(max_length=1024)] | None = None
    min_tokens: int | None = Field(None, ge=0)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None  # as in vLLM
    adapter_generation: int | None = Field(None, ge=0)
    return_token_ids: bool | None = None  # as in vLLM
    # Fields that do not affect the response.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    request_id: str | None = None
    session_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        refuse_old_names(body)
        most = body.get("max_tokens")
        known = {**cls.neutral, **({} if most is None else {"max_completion_tokens": (most,)})}
        for name in known.keys() & body.keys():
            found, values = body[name], (None, *known[name])
            kinds = {isinstance(value, bool) for value in (found, *values[1:])}
            if found is not None and (found not in values or len(kinds) > 1):  # 1 is not true
                expected = " or ".join(map(json.dumps, values))
                raise ValueError(f"{name}: expected {expected}, found {json.dumps(found)[:100]}")
        return {name: value for name, value in body.items() if name not in known}

    @field_validator("n", mode="before")
    @classmethod
    def _whole(cls, n: Any) -> Any:
        return int(n) if isinstance(n, float) and n.is_integer() else n

    @property
    def usage_wanted(self) -> bool:
        """True if the stream must end with an event that contains the usage (token counts)."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def record(self) -> Logprobs:
        """Return an empty record for the log-probabilities that the request requires."""
        raise NotImplementedError

    @property
    def limit(self) -> str:
        """Name of the field that limits the number of new tokens."""
        both = self.max_tokens, self.max_completion_tokens
        return "max_completion_tokens" if both[0] is None and both[1] else "max_tokens"

    def settings(self, number: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of :meth:`Engine.begin` except the prompt and the adapter.

        Args:
            number: index of the answer to the prompt; as in vLLM, it is added to the seed.

        Raises:
            ValueError: If fields contradict each other.
        """
        if self.usage_wanted and not self.stream:
            found = f"stream={self.stream}"
            raise ValueError(f"stream_options: expected null unless stream is true, found {found}")
        form = read_format(self.response_format, self.structured_outputs)
        for name in ("stop", "stop_token_ids", "min_tokens"):
            if form is not None and (found := getattr(self, name)):
                expected = "null with response_format or structured_outputs"
                raise ValueError(f"{name}: expected {expected}, found {found!r:.200}")
        temperature, top_p = (1.0 if x is None else x for x in (self.temperature, self.top_p))
        most = self.max_tokens or self.max_completion_tokens or self.default_max_tokens
        most = 1 if self.max_tokens == 0 else most  # a forward of the prompt alone yields one token
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        penalty = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        more = self.top_k or -1, self.min_p or 0.0, penalty, bias, self.min_tokens or 0
        seed = None if self.seed is None else self.seed + number
        sampling = Sampling(temperature, top_p, seed, *more)
        form = None if self.max_tokens == 0 else form
        how = {"sampling": sampling, "form": form, "max_new_tokens": most}
        how |= {"generation": self.adapter_generation, "logprobs": self.record()}
        return {**how, "stop_token_ids": self.stop_token_ids or ()}


class Chat(_Generates):
    """Body of ``POST /v1/chat/completions``."""

    neutral = _NEUTRAL_IN_CHATS
    messages: list[Message] = Field(min_length=1)
    store: bool | None = None
    metadata: dict[str, str] | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None

    def record(self) -> Logprobs:
        """Return an empty record for the log-probabilities that the request requires."""
        top = self.top_logprobs
        if top and not self.logprobs:
            raise ValueError(f"top_logprobs: expected 0 unless logprobs is true, found {top}")
        return Logprobs((top or 0) if self.logprobs else None)

    def prompts(self) -> list[Prompt]:
        """Return the chat, as the only prompt for :meth:`Engine.begin`."""
        return [[message.said() for message in self.messages]]


class Completion(_Generates):
    """Body of ``POST /v1/completions``. The prompt is one or several texts, or their tokens."""

    default_max_tokens: ClassVar[int | None] = 16  # as in OpenAI's API
    neutral = _NEUTRAL_IN_COMPLETIONS
    text: Texts = Field(alias="prompt")
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: Top | None = None
    prompt_logprobs: Top | None = None  # as in vLLM

    def record(self) -> Logprobs:
        """Return an empty record for the log-probabilities that the request requires."""
        if self.max_tokens == 0 and not self.echo:
            found = self.max_tokens
            raise ValueError(f"max_tokens: expected at least 1 without echo, found {found}")
        tops = self.prompt_logprobs, self.logprobs if self.echo else None
        return Logprobs(self.logprobs, max((t for t in tops if t is not None), default=None))

    def prompts(self) -> list[Prompt]:
        """Return the prompts for :meth:`Engine.begin`."""
        return _separate(self.text)


class Embedding(_ForModel):
    """Body of ``POST /v1/embeddings``. The input is one or several texts, or their tokens."""

    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None

    def texts(self) -> list[str | list[int]]:
        """Return the texts, or their tokens, for :meth:`Embedder.embed`."""
        return _separate(self.input)


def _separate(given: Any) -> list[Any]:
    """Return the texts of a field as a list. A text given as tokens is one item."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


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
        if one["type"] == "value_error" and not one["loc"]:  # the message names the field
            lines.append(one["msg"].removeprefix("Value error, "))
            continue
        # Parts with brackets are names of validators and types, not of fields.
        place = ".".join(x for x in map(str, one["loc"]) if not set("[(") & set(x)) or "body"
        value = f", found {one['input']!r:.100}" if one["type"] != "missing" and one["loc"] else ""
        lines.append(f"{place}: {one['msg']}{value}")
    more = f"; and {len(found) - _MAX_ERRORS} more" if len(found) > _MAX_ERRORS else ""
    return "; ".join(dict.fromkeys(lines)) + more
