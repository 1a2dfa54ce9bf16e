"""Routes of Tinker's API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from operator import methodcaller
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from lora_ext._checks import instance, number, renamed, require
from lora_ext.pool import PoolFullError
from lora_ext.tenants import QueueFullError, Sampler, Service, Tenant

from .._requests import read_body
from ._api import Api, folder, parsed
from ._promises import Answer, GoneError
from ._wire import MIME, read_request, written_result

try:
    import zstandard  # pyright: ignore[reportMissingImports]
except ImportError:  # The response of client/config then asks clients not to compress bodies.
    zstandard = None

PATIENCE = 25.0  # seconds that a request waits for a result before the client must try again
SILENCE = 120.0  # seconds without a heartbeat after which a session ends
MAX_BODY = 1 << 28  # bytes
_OF_LOSSES = {"loss": "loss_fn", "config": "loss_fn_config"}
_OF_LOSSES |= {"tokens": "model_input", "inputs": "loss_fn_inputs"}

#: Names of the fields in JSON bodies by type. A field with the value null is treated as missing.
_KINDS: dict[type, str] = {
    str: "session_id model_id base_model path model_path tinker_path sampling_session_id "
    "request_id kind",
    int: "seq_id model_seq_id sampling_session_seq_id",
    dict: "lora_config adam_params sampling_params prompt",
    bool: "optimizer overwrite prompt_logprobs",
}

#: POST routes that are methods of ``_Routes`` with the same name.
_POSTS = """create_session session_heartbeat create_model unload_model get_info weights_info
    save_weights save_weights_for_sampler load_weights optim_step create_sampling_session asample"""

_CODES = {ValueError: 400, KeyError: 400, TypeError: 400, GoneError: 410}
_WORDS = {str: "a string", int: "an integer", dict: "an object", bool: "true or false"}
_CODES |= {QueueFullError: 429, PoolFullError: 429}


def make_app(service: Service, base: str, keys: set[str] | None) -> FastAPI:
    """Return a FastAPI application with Tinker's API for a service.

    Args:
        service: service that trains and samples.
        base: name of the base model in requests.
        keys: accepted API keys; None accepts every key.

    Raises:
        TypeError: If an argument has the wrong type; the message names it.
    """
    instance("make_app", "service", service, Service)
    instance("make_app", "base", base, str)
    if keys is not None:  # With a str, `in` would also accept a part of a key.
        instance("make_app", "keys", keys, (set, frozenset))
    api = _Routes(service, base)
    app = FastAPI(lifespan=lambda _: _life(api))

    def error_answer(_: Request, error: Exception) -> JSONResponse:
        code = next(code for kind in type(error).__mro__ if (code := _CODES.get(kind)))  # pyright: ignore[reportArgumentType]
        words = f"{error.args[0]}: expected a value, found none"  # for a KeyError: a missing field
        words = words if type(error) is KeyError else api.words_of(error)
        return JSONResponse({"error": words, "category": "user"}, code)

    for kind in _CODES:
        app.add_exception_handler(kind, error_answer)

    @app.middleware("http")
    async def check_key(request: Request, go_on: Any) -> Any:
        key = request.headers.get("x-api-key", "")
        if keys is not None and key not in keys:
            return JSONResponse({"error": "X-API-Key: expected one of --keys"}, 401)
        request.state.key = key
        return await go_on(request)

    def post(path: str, function: Callable[[str, Answer], Any]) -> None:
        """Add a POST route that returns the result of ``function(key, body)``, run in a thread."""

        async def run(request: Request) -> Any:
            return await asyncio.to_thread(function, request.state.key, await _read(request))

        app.add_api_route(f"/api/v1/{path}", run, methods=["POST"])

    for name in _POSTS.split():
        post(name, getattr(api, name))
    for path in ("client/dynamic_config", "cancel_future", "telemetry"):
        post(path, lambda key, asked: {"status": "accepted"})
    post("client/config", api.config)
    _add_others(app, api)
    return app


@contextlib.asynccontextmanager
async def _life(api: Api) -> AsyncIterator[None]:
    async def watch() -> None:
        while True:
            await asyncio.sleep(min(1.0, SILENCE / 4))
            for session in await asyncio.to_thread(api.pass_time, SILENCE):
                await asyncio.to_thread(api.end, session)

    task = asyncio.create_task(watch())
    yield
    task.cancel()
    for session in list(api.sessions):
        api.end(session, wait=True)


async def _read(request: Request) -> Answer:
    """Parse the JSON body of a request, and return the fields that are not null."""
    try:
        asked = json.loads(await read_body(request, MAX_BODY) or b"{}")
    except RecursionError:
        raise ValueError("body: expected JSON nested less deeply, found too many levels") from None
    if not isinstance(asked, dict):
        raise ValueError(f"body: expected a JSON object, found {type(asked).__name__}")
    for kind, names in _KINDS.items():
        for name in names.split():
            found = asked.get(name)
            fits = found is None or type(found) is kind
            require(fits, "body", name, _WORDS[kind], f"{found!r:.200}")
    return {name: value for name, value in asked.items() if value is not None}


class _Routes(Api):
    """Handlers of the routes in ``_POSTS``, which take a JSON body.

    The arguments of a handler are the API key and the fields of the body.
    """

    def config(self, key: str, asked: Answer) -> Answer:
        """Return the settings that clients must use."""
        off = ("pjwt_auth_enabled", "sample_use_retrieve_futures", "custom_loss_server_side")
        return {"proto_compress_fwdbwd": zstandard is not None, **dict.fromkeys(off, False)}

    def session_heartbeat(self, key: str, asked: Answer) -> Answer:
        self.alive(key, asked["session_id"]).beat = time.monotonic()
        return {"type": "session_heartbeat"}

    def unload_model(self, key: str, asked: Answer) -> Answer:
        name = asked["model_id"]
        session, model = self.model(key, name)
        session.models.pop(name, None)

        def unload() -> Answer:
            model.tenant.close()
            return {"model_id": name, "type": "unload_model"}

        return self.promises.at_once(key, unload)

    def get_info(self, key: str, asked: Answer) -> Answer:
        name, base = asked["model_id"], self.base
        rank = self.model(key, name)[1].tenant.rank
        arch = self.service.model.config.model_type
        data = {"arch": arch, "model_name": base, "tokenizer_id": base}
        found = {"type": "get_info", "model_id": name, "model_data": data}
        return {**found, "is_lora": True, "lora_rank": rank, "model_name": base}

    def weights_info(self, key: str, asked: Answer) -> Answer:
        where = parsed(key, asked["tinker_path"], "tinker_path")
        _, saved = self.service.store.read("weights_info", where)
        trained = {"train_unembed": False, "train_mlp": True, "train_attn": True}
        return {"base_model": self.base, "is_lora": True, "lora_rank": saved.config.r, **trained}

    def _saved(self, key: str, asked: Answer, kind: str, done: str) -> Answer:
        name, model = asked.get("path") or uuid.uuid4().hex, asked["model_id"]
        where = folder(key, model, kind, name)
        target = self.service.store.folder("save", where)
        if asked.get("overwrite") is False and target.exists():
            raise ValueError(f"path: expected a new name, or overwrite=true, found {name!r:.200}")
        answer = {"type": done, "path": f"tinker://{model}/{kind}/{name}"}
        begin = methodcaller("save", where, wait=False)
        return self.in_order(key, asked, begin, lambda _: answer)

    def save_weights(self, key: str, asked: Answer) -> Answer:
        return self._saved(key, asked, "weights", "save_weights")

    def save_weights_for_sampler(self, key: str, asked: Answer) -> Answer:
        if asked.get("path"):
            return self._saved(key, asked, "sampler_weights", "save_weights_for_sampler")
        session, mode = self.model(key, asked["model_id"])[0], asked.get("kind") or "snapshot"
        owner = asked["model_id"].partition(":")[0]
        name = f"{owner}:sample:{asked.get('sampling_session_seq_id')}"

        def told(sampler: Sampler) -> Answer:
            session.keep(name, sampler)
            return {"type": "save_weights_for_sampler", "sampling_session_id": name}

        return self.in_order(key, asked, lambda tenant: tenant.sampler(mode, wait=False), told)

    def load_weights(self, key: str, asked: Answer) -> Answer:
        path, optimizer = parsed(key, asked["path"]), bool(asked.get("optimizer", True))
        if not asked.get("model_id"):
            return self.create_model(key, asked)
        answer = {"type": "load_weights", "path": asked["path"], "model_id": asked["model_id"]}
        begin = methodcaller("restore", path, optimizer, wait=False)
        return self.in_order(key, asked, begin, lambda _: answer)

    def optim_step(self, key: str, asked: Answer) -> Answer:
        adam = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}
        adam |= {k: v for k, v in (asked.get("adam_params") or {}).items() if v is not None}
        decay, clip = adam.get("weight_decay", 0.0), adam.get("grad_clip_norm") or None
        for name in ("beta1", "beta2"):
            number("optim_step", name, adam[name], 0, below=1)
        how = adam["learning_rate"], (adam["beta1"], adam["beta2"]), adam["eps"], decay, clip

        def begin(tenant: Tenant) -> Any:
            with renamed("optim_step", lr="learning_rate", max_grad_norm="grad_clip_norm"):
                return tenant.optim_step(*how)

        return self.in_order(key, asked, begin, lambda result: {"metrics": result.metrics})

    def create_sampling_session(self, key: str, asked: Answer) -> Answer:
        session = self.alive(key, asked["session_id"])
        name = f"{asked['session_id']}:sample:{asked['sampling_session_seq_id']}"
        if name not in session.samplers:
            session.keep(name, self.sampler(key, asked))
        return {"type": "create_sampling_session", "sampling_session_id": name}


def _add_others(app: FastAPI, api: Api) -> None:
    """Add the routes without a JSON body, and those whose response may be bytes."""

    @app.post("/api/v1/sessions/{session}/finish")
    def finish(session: str, request: Request) -> Answer:
        api.alive(request.state.key, session)
        api.end(session)
        return {}

    @app.get("/api/v1/healthz")
    def healthz() -> Answer:
        return {"status": "ok"}

    @app.get("/api/v1/get_server_capabilities")
    def capabilities() -> Answer:
        most = {"model_name": api.base, "max_context_length": api.service.max_tokens}
        return {"supported_models": [most]}

    @app.post("/api/v1/forward_backward")
    @app.post("/api/v1/forward")
    async def forward_backward(request: Request) -> Any:
        body = await read_body(request, MAX_BODY)
        if request.headers.get("content-encoding") == "zstd":
            if zstandard is None:
                remedy = "run `pip install zstandard` on the server"
                raise HTTPException(415, f"content-encoding: expected none, found zstd; {remedy}")
            try:
                body = zstandard.ZstdDecompressor().stream_reader(body).read(MAX_BODY + 1)
            except zstandard.ZstdError as error:
                raise ValueError(f"body: expected valid zstd data: {error}") from None
            if len(body) > MAX_BODY:
                raise HTTPException(413, f"body: expected at most {MAX_BODY} bytes, found more")
        asked, data, options = read_request(body)

        def begin(tenant: Tenant) -> Any:
            call = tenant.forward if asked.forward_only else tenant.forward_backward
            with renamed("forward_backward", **_OF_LOSSES):
                return call(data, asked.loss_fn or "cross_entropy", options)

        # A missing number is 0 in protobuf. Tinker's SDK counts from 1.
        where = request.state.key, {"model_id": asked.model_id, "seq_id": asked.seq_id or None}
        return await asyncio.to_thread(api.in_order, *where, begin, written_result)

    @app.get("/api/v1/samplers/{name}")
    def sampler(name: str, request: Request) -> Answer:
        try:
            api.samplers(request.state.key, name)
        except GoneError as error:
            raise HTTPException(404, str(error)) from None
        return {"sampler_id": name, "base_model": api.base}

    @app.post("/api/v1/retrieve_future")
    async def retrieve_future(request: Request) -> Any:
        name = (await _read(request))["request_id"]
        future = api.promises.get(request.state.key, name)
        try:
            found = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), PATIENCE)
        except asyncio.TimeoutError:
            return {"type": "try_again", "request_id": name, "queue_state": "active"}
        except Exception as error:
            kind = "user" if isinstance(error, ValueError) else "server"
            return {"error": api.words_of(error), "category": kind}
        return Response(found, media_type=MIME) if isinstance(found, bytes) else found
