"""Routes of OpenAI's API."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from lora_ext._checks import renamed, require
from lora_ext.pool import PoolFullError, UnknownAdapterError
from lora_ext.serving import (
    CONTENT_TYPE,
    Embedder,
    Engine,
    GenerationGoneError,
    QueueFullError,
    RequestStream,
    StoppedError,
    prometheus,
)

from ._answers import Choice, cancelled_on_errors, embeddings, events, sized, whole
from ._requests import Chat, Completion, Embedding, Load, Unload, read_body, told

Body = TypeVar("Body", bound=BaseModel)
# Name of a request's field for a mixture of adapters, by the name of the engine's argument.
_OF_MIXTURES = {"adapter_name": "lora", "names": "lora"}
_MAX_CHANGES = 8  # changes of an adapter after which a request of several prompts is refused

#: Status code of a response by type of error. The first type that matches is used.
_CODES: dict[type[Exception], int] = {
    ValidationError: 422,
    UnknownAdapterError: 404,
    FileNotFoundError: 404,
    PoolFullError: 429,
    QueueFullError: 429,
    StoppedError: 503,
    GenerationGoneError: 409,
    ValueError: 400,
    NotImplementedError: 400,
    RuntimeError: 500,
    HTTPException: 500,
    ClientDisconnect: 400,
}


class _Refusals:
    """Error handler that returns responses in OpenAI's format and counts them by status code."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def __call__(self, request: Request, error: Exception) -> Response:
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), 500)
        code = 400 if getattr(error, "final", False) else getattr(error, "status_code", code)
        headers = {"Retry-After": "1"} if code == 429 else getattr(error, "headers", None)
        if code == 405 and request.method == "OPTIONS":
            allowed = (headers or {}).get("Allow", "")
            return Response(status_code=204, headers={"Allow": f"{allowed}, OPTIONS"})
        self.counts[code] += 1
        words = getattr(error, "detail", None) or str(error.args[0] if error.args else error)
        if isinstance(error, ValidationError):
            words = told(error)
        elif isinstance(error, UnknownAdapterError):
            words = f"{'lora_name' if 'lora' in request.url.path else 'model'}: {words}"
        return JSONResponse({"error": {"message": words, "code": code}}, code, headers)


def make_app(
    engine: Engine | Embedder,
    base: str,
    max_body: int = 1 << 20,
    origins: Sequence[str] = (),
) -> FastAPI:
    """Return a FastAPI application with OpenAI's API for an engine. You can add routes to it.

    Args:
        engine: running engine. The API has chats and completions for an :class:`Engine`, and
            embeddings for an :class:`Embedder`.
        base: name of the base model in requests. Every other name is the name of an adapter in the
            engine's folder.
        max_body: maximum size of a request's body in bytes.
        origins: origins of web pages that may send requests (CORS).

    Returns:
        The application, for uvicorn or another ASGI server.
    """
    refuse = _Refusals()
    handlers: Any = dict.fromkeys(_CODES, refuse)
    app = FastAPI(title="lora_ext", exception_handlers=handlers)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        )

    async def read(kind: type[Body], request: Request) -> Body:
        return kind.model_validate_json(await read_body(request, max_body))

    _add_answers(app, engine, base, read, refuse)
    _add_models(app, engine, base, read)
    if isinstance(engine, Engine):
        _add_trainers(app, engine)

    @app.get("/metrics")
    def metrics() -> Response:
        page = prometheus(engine.stats(), refuse.counts, engine.load())
        return PlainTextResponse(page, media_type=CONTENT_TYPE)

    @app.api_route("/health", methods=["GET", "HEAD"])
    def health() -> Response:
        return JSONResponse({"healthy": engine.healthy}, 200 if engine.healthy else 503)

    return app


async def _started(begins: Iterable[Awaitable[RequestStream]]) -> list[RequestStream]:
    """Start requests and return them; if one is refused, cancel the others and raise its error."""
    tasks = [asyncio.ensure_future(each) for each in begins]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for each in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(each, RequestStream):
                each.cancel()
        raise


async def _while_connected(work: Any, request: Request) -> Any:
    """Await a coroutine and return its result; cancel it if the client disconnects."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    both = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not both[0].done():
            raise ClientDisconnect
        return both[0].result()
    finally:
        for each in both:
            each.cancel()


def _adapter(
    engine: Engine | Embedder, base: str, asked: Chat | Completion | Embedding
) -> str | dict[str, float] | None:
    """Return a request's adapter name, its mixture (scales by name), or None for the base model."""
    if asked.lora is None:
        return None if asked.model == base else asked.model
    if asked.model != base:
        expected = f"expected null unless model is the base model {base!r}"
        raise ValueError(f"lora: {expected}, found model {asked.model!r:.200}")
    numbered = any(isinstance(each.id, int) for each in asked.lora)
    known, found = engine.folder.names() if numbered else [], dict[str, float]()
    for i, each in enumerate(asked.lora):
        name = each.id if isinstance(each.id, str) else "".join(known[each.id :][:1])
        if name not in engine.folder:
            expected = "expected a name or a number in /lora-adapters"
            raise HTTPException(404, f"lora.{i}.id: {expected}, found {each.id!r:.200}")
        if name in found:
            expected = "expected each adapter once"
            raise HTTPException(422, f"lora.{i}.id: {expected}, found {name!r:.200} again")
        found[name] = each.scale
    return found or None


def _add_answers(
    app: FastAPI, engine: Engine | Embedder, base: str, read: Any, refuse: _Refusals
) -> None:
    """Add the routes for chats, completions and embeddings."""

    async def generate(asked: Chat | Completion, request: Request) -> Any:
        if not isinstance(engine, Engine):
            raise ValueError(f"model: expected a text generator, found embedding model {base!r}")
        name = await asyncio.to_thread(_adapter, engine, base, asked)
        most, count = engine.max_requests, asked.n or 1
        prompts, field = asked.prompts(), "messages" if isinstance(asked, Chat) else "prompt"
        total, limited = len(prompts) * count, field if count == 1 else "n"
        expected = f"at most {most} prompts{'' if count == 1 else ' times n'}"
        require(total <= most, "begin", limited, expected, total)
        fields = {"max_new_tokens": asked.limit, "input_ids": field, **_OF_MIXTURES}
        sent, top = prompts, asked.record().prompt_top
        if top is not None:
            with renamed("begin", **fields):
                sent = await _while_connected(sized(asked, engine, prompts, top), request)
        for _ in range(_MAX_CHANGES):
            jobs = [(prompt, asked.settings(i)) for prompt in sent for i in range(count)]
            with renamed("begin", **fields):
                begins = (engine.begin(prompt, name, **how) for prompt, how in jobs)
                streams = await _while_connected(_started(begins), request)
            if len({stream.version for stream in streams}) == 1:
                break
            for stream in streams:  # the adapter changed meanwhile, so begin all prompts again
                stream.cancel()
        else:
            expected = "expected an adapter that does not change while its requests start"
            raise GenerationGoneError(f"model: {expected}, found {_MAX_CHANGES} changes")
        of_each = zip(range(total), streams, strict=True)
        choices = [Choice(asked, engine, prompts[i // count], each, i) for i, each in of_each]
        with cancelled_on_errors(streams):
            streams[0].until_gone(request.receive, streams[1:])
            if not asked.stream:
                return await asyncio.to_thread(JSONResponse, await whole(asked, choices))
        parts = events(asked, choices, lambda e: bytes(refuse(request, e).body).decode())
        return StreamingResponse(parts, media_type="text/event-stream")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        return await generate(await read(Chat, request), request)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Any:
        return await generate(await read(Completion, request), request)

    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Any:
        asked = await read(Embedding, request)
        if not isinstance(engine, Embedder):
            raise ValueError(f"model: expected an embedding model, found text generator {base!r}")
        if asked.dimensions not in (None, engine.dimensions):
            expected = f"expected {engine.dimensions}, the size of the vectors"
            raise ValueError(f"dimensions: {expected}, found {asked.dimensions}")
        name = await asyncio.to_thread(_adapter, engine, base, asked)
        with renamed("embed", **_OF_MIXTURES):
            vectors, tokens = await engine.embed(asked.texts(), name)
        return embeddings(asked, vectors, tokens)


def _add_trainers(app: FastAPI, engine: Engine) -> None:
    """Add the routes of vLLM that a trainer uses between two versions of its adapter."""

    @app.get("/server_info")
    def info() -> Any:
        model = {"dtype": str(engine.model.dtype), "max_model_len": engine.context}
        lora = {"max_loras": engine.max_requests, "max_lora_rank": engine.pool.max_rank}
        parts = {"model_config": model, "lora_config": lora}
        return {"vllm_config": {**parts, "parallel_config": {"data_parallel_size": 1}}}

    @app.get("/get_world_size")
    def world() -> Any:
        return {"world_size": 1}

    @app.get("/is_paused")
    def paused() -> Any:
        return {"is_paused": engine.paused}

    @app.post("/pause")
    def pause(mode: str | None = None) -> Any:  # vLLM's default, "abort", is not supported
        if mode != "keep":
            raise ValueError(f"mode: expected 'keep', found {mode!r:.200}")
        engine.pause()
        return {"status": "paused"}

    @app.post("/resume")
    def resume() -> Any:
        engine.resume()
        return {"status": "resumed"}


def _add_models(app: FastAPI, engine: Engine | Embedder, base: str, read: Any) -> None:
    """Add the routes that list, load and unload adapters."""

    def entry(name: str) -> dict[str, Any]:
        fixed = {"id": name, "object": "model", "owned_by": "lora_ext", "created": 0}
        found = {"max_model_len": engine.context, "parent": None if name == base else base}
        return {**fixed, **found, "adapter_generation": engine.pool.generation(name)}

    def listed() -> list[dict[str, Any]]:
        return [*map(entry, dict.fromkeys([base, *engine.pool.names, *engine.folder.names()]))]

    @app.get("/lora-adapters")
    def adapters() -> Any:  # as in llama.cpp's server; a request without `lora` applies none
        named = enumerate(engine.folder.names())
        return [{"id": i, "path": name, "scale": 0.0} for i, name in named]

    @app.get("/v1/models")
    def models() -> Any:
        return {"object": "list", "data": listed()}

    @app.get("/v1/models/{name}")
    def model(name: str) -> Any:
        for each in listed():
            if each["id"] == name:
                return each
        raise UnknownAdapterError(f"expected a name in /v1/models, found {name!r:.200}")

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Any:
        asked = await read(Load, request)
        if asked.lora_name == base:
            raise ValueError(f"lora_name: expected an adapter, found the base model {base!r}")
        with renamed("load_lora_adapter", name="lora_name", path="lora_path"):
            found = await asyncio.to_thread(engine.folder.load, asked.lora_name, asked.lora_path)
        return {"loaded": asked.lora_name, "adapter_generation": found}

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Any:
        asked = await read(Unload, request)
        await asyncio.to_thread(engine.folder.unload, asked.lora_name)
        return {"unloaded": asked.lora_name}
