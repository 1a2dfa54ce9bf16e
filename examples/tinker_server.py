"""A server of Tinker's API on one machine, with many tenants on one base model.

`pip install lora_ext[tenants]`, then `python examples/tinker_server.py --model DIR --store DIR`.
The unmodified SDK trains and samples on it, where `TINKER_BASE_URL` is its address and
`TINKER_API_KEY` begins with `tml-`. docs/tenants.md says more."""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from tinker_wire import MIME, prompt_of, read_request, written_result, written_samples
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ext.tenants import QueueFullError, Sampler, Service, Tenant

try:
    import zstandard
except ImportError:  # the client is told to send bodies as they are
    zstandard = None

PATIENCE, SILENCE, KEPT = 25.0, 120.0, 4096  # seconds; seconds; answers
GAP = 10.0  # seconds after which a call that never came is not waited for
MAX_BODY = 1 << 28


@dataclass(eq=False)
class Model:
    """A training client's model: its calls run by their numbers, in whatever order they come."""

    tenant: Tenant
    key: str
    session: str
    next: int = 1
    waiting: dict[int, tuple[str, Callable[[], Any], float]] = field(default_factory=dict)
    promised: dict[int, str] = field(default_factory=dict)


class Api:
    """State and rules of the server, apart from its routes."""

    def __init__(self, service: Service, base: str):
        self.service, self.base = service, base
        self.lock = threading.RLock()
        self.sessions: dict[str, float] = {}
        self.models: dict[str, Model] = {}
        self.samplers: dict[str, tuple[str, Sampler]] = {}
        self.futures: OrderedDict[str, tuple[str, Future[Any]]] = OrderedDict()
        self.asked: dict[tuple[str, int], dict[str, Any]] = {}

    def promise(self, key: str, future: Future[Any] | None = None) -> tuple[str, Future[Any]]:
        name, future = uuid.uuid4().hex, future or Future()
        with self.lock:
            self.futures[name] = key, future
            while len(self.futures) > KEPT and next(iter(self.futures.values()))[1].done():
                self.futures.popitem(last=False)
        return name, future

    def at_once(self, key: str, action: Callable[[], Any]) -> dict[str, Any]:
        """A promise of something that runs on a thread of its own."""
        name, future = self.promise(key)
        threading.Thread(target=_settle, args=(future, action), daemon=True).start()
        return {"request_id": name}

    def model(self, key: str, name: str) -> Model:
        found = self.models.get(name)
        if found is None or found.key != key:
            raise HTTPException(410, f"model_id: expected a model of this key, found {name!r:.200}")
        return found

    def in_order(
        self, key: str, name: str, seq: int | None, begin: Callable[[Tenant], Any], told: Any
    ) -> dict[str, Any]:
        """A promise of a call of a model; the same number again is the same call."""
        with self.lock:
            model = self.model(key, name)
            if seq is not None and seq in model.promised:
                return {"request_id": model.promised[seq]}
            request, future = self.promise(key)

            def start() -> None:
                _passed(begin(model.tenant), future, told)

            try:
                if seq is None or seq < model.next:
                    start()
                else:
                    model.waiting[seq] = request, start, time.monotonic()
                    self.pump(model, seq)
            except BaseException as error:
                del self.futures[request]
                if isinstance(error, QueueFullError):
                    raise  # it comes again under its number
                if seq is not None:  # refused, and so done with
                    model.promised[seq] = self.promise(key, _failed(error))[0]
                raise
            if seq is not None:
                model.promised[seq] = request
            return {"request_id": request}

    def pump(self, model: Model, asking: int | None = None) -> None:
        """Begin the calls whose turn it is; what the asking one raises goes to its caller."""
        while model.waiting:
            first = min(model.waiting)
            request, start, since = model.waiting[first]
            if first > model.next and time.monotonic() - since < GAP:
                return
            try:
                start()
            except QueueFullError:
                if first == asking:
                    del model.waiting[first]
                    raise
                return  # it was promised: later
            except Exception as error:
                del model.waiting[first]
                model.next = first + 1
                if first == asking:
                    raise
                self.futures[request][1].set_exception(error)
                continue
            del model.waiting[first]
            model.next = first + 1

    def pump_all(self) -> None:
        with self.lock:
            for model in self.models.values():
                self.pump(model)

    def end(self, session: str, wait: bool = False) -> None:
        """Drop what a session's models wait for, and keep their adapters."""
        with self.lock:
            self.sessions.pop(session, None)
            gone = {n: m for n, m in self.models.items() if m.session == session}
            for name in gone:
                del self.models[name]
            for name in [n for n in self.samplers if n.startswith(f"{session}:")]:
                del self.samplers[name]
            for asked in [a for a in self.asked if a[0].startswith(f"{session}:")]:
                del self.asked[asked]
        for name, model in gone.items():
            model.tenant.close(wait, save_as=folder(model.key, name, "weights", "last"))

    def new_model(self, key: str, asked: dict[str, Any]) -> dict[str, Any]:
        name, session = f"{asked['session_id']}:train:{asked['model_seq_id']}", asked["session_id"]
        self.alive(session)
        if "path" in asked:  # of load_weights
            path, optimizer = parsed(key, asked["path"]), bool(asked.get("optimizer", True))
        else:
            self.check_base(asked.get("base_model"))
        lora = asked.get("lora_config") or {}

        def make() -> dict[str, Any]:
            if name not in self.models:
                if "path" in asked:
                    tenant = self.service.load(path)
                    if not optimizer:
                        tenant.restore(path, optimizer=False)
                else:
                    rank, seed = lora.get("rank", 32), lora.get("seed") or 0
                    tenant = self.service.create(rank, seed, targets=self.targets(lora))
                self.models[name] = Model(tenant, key, session)
            kind = "load_weights" if "path" in asked else "create_model"
            return {"type": kind, "model_id": name, "path": asked.get("path")}

        return self.at_once(key, make)

    def targets(self, lora: dict[str, Any]) -> list[str]:
        """Linear layers by what the client wants to train. The head is not: it may be tied."""
        found = []
        for name, module in self.service.model.named_modules():
            inside = name.partition(".base_layer")[0].partition(".lora_")[0]
            if (
                isinstance(module, torch.nn.Linear)
                and module is not self.service.model.get_output_embeddings()
            ):
                attention = "att" in inside.rpartition(".")[0].rpartition(".")[2]
                if lora.get("train_attn" if attention else "train_mlp", True):
                    found.append(inside)
        return sorted(set(found))

    def check_base(self, name: Any) -> None:
        if name != self.base and not (isinstance(name, str) and _same(name, self.base)):
            raise ValueError(f"base_model: expected {self.base!r}, found {name!r:.200}")

    def alive(self, session: str) -> None:
        if session not in self.sessions:
            raise HTTPException(
                410, f"session_id: expected a session that lives, found {session!r:.200}"
            )

    def sampler(self, key: str, asked: dict[str, Any]) -> Sampler:
        if asked.get("model_path"):
            return self.service.sampler(parsed(key, asked["model_path"]))
        self.check_base(asked.get("base_model"))
        return self.service.sampler()

    def sample(self, key: str, asked: dict[str, Any]) -> dict[str, Any]:
        session, seq = asked.get("sampling_session_id"), asked.get("seq_id")
        with self.lock:
            if (
                again := self.asked.get((session or "", seq if seq is not None else -1))
            ) and seq is not None:
                return again
        for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
            if asked.get(name):
                raise ValueError(f"{name}: expected 0, found {asked[name]}")
        if session:
            owner, sampler = self.samplers.get(session, (None, None))
            if sampler is None or owner != key:
                raise HTTPException(
                    410, f"sampling_session_id: expected one of this key, found {session!r:.200}"
                )
        else:
            sampler = self.sampler(key, asked)
        prompt, how, count = (
            prompt_of(asked["prompt"]),
            asked.get("sampling_params") or {},
            asked.get("num_samples", 1),
        )
        stop = how.get("stop")
        room = sampler.context - len(prompt)
        settings = {
            k: how[k] for k in ("temperature", "top_p", "top_k", "seed") if how.get(k) is not None
        }
        if settings.get("seed", 0) >= 1 << 63:
            settings["seed"] -= 1 << 64
        most = how.get("max_tokens") or max(1, room)
        begun = sampler.begin(prompt, most, count, stop=() if stop is None else stop, **settings)
        wants = asked.get("prompt_logprobs")

        def told() -> bytes:
            of_prompt = sampler.logprobs(prompt) if wants else None
            return written_samples([each.result() for each in begun], of_prompt)

        answer = self.at_once(key, told)
        answer["sample_sequence_ids"] = [uuid.uuid4().hex for _ in range(count)]
        if session and seq is not None:
            self.asked[session, seq] = answer
        return answer


def folder(key: str, model: str, kind: str, name: str) -> str:
    """Where a save lies in the store: what a key has saved it alone finds."""
    owner = hashlib.sha256(key.encode()).hexdigest()[:24]
    return os.path.join(owner, model.replace(":", "-"), kind, name)


def parsed(key: str, uri: Any) -> str:
    """The folder of `tinker://MODEL/weights/NAME`."""
    parts = uri.removeprefix("tinker://").split("/", 2) if isinstance(uri, str) else []
    if (
        len(parts) != 3
        or not uri.startswith("tinker://")
        or parts[1] not in ("weights", "sampler_weights")
    ):
        raise ValueError(f"path: expected tinker://MODEL/weights/NAME, found {uri!r:.200}")
    return folder(key, *parts)


def _same(first: str, second: str) -> bool:
    return os.path.isdir(first) and os.path.samefile(first, second)


def _settle(future: Future[Any], action: Callable[[], Any]) -> None:
    try:
        done = action()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(done)


def _passed(source: Future[Any], future: Future[Any], told: Callable[[Any], Any]) -> None:
    source.add_done_callback(lambda done: _settle(future, lambda: told(done.result())))


def _failed(error: BaseException) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def make_app(service: Service, base: str, keys: set[str] | None) -> FastAPI:
    api = Api(service, base)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async def watch() -> None:
            while True:
                await asyncio.sleep(1)
                api.pump_all()
                for session, beat in list(api.sessions.items()):
                    if time.monotonic() - beat > SILENCE:
                        await asyncio.to_thread(api.end, session)

        task = asyncio.create_task(watch())
        yield
        task.cancel()
        for session in list(api.sessions):
            api.end(session, wait=True)

    app = FastAPI(lifespan=lifespan)

    def refuse(_: Request, error: Exception) -> JSONResponse:
        code = 429 if isinstance(error, QueueFullError) else 400
        return JSONResponse({"error": str(error), "category": "user"}, code)

    for kind in (ValueError, QueueFullError, KeyError, TypeError):
        app.add_exception_handler(kind, refuse)

    @app.middleware("http")
    async def check_key(request: Request, go_on: Any) -> Any:
        key = request.headers.get("x-api-key", "")
        if keys is not None and key not in keys:
            return JSONResponse({"error": "X-API-Key: expected one of --keys"}, 401)
        request.state.key = key
        return await go_on(request)

    async def body_of(request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise HTTPException(413, f"body: expected at most {MAX_BODY} bytes")
        return bytes(body)

    def post(path: str, where: str = "/api/v1/") -> Any:
        """A route for `f(key, what the body says)`, on a thread of its own."""

        def decorate(function: Callable[[str, dict[str, Any]], Any]) -> Any:
            async def run(request: Request) -> Any:
                asked = json.loads(await body_of(request) or b"{}")
                return await asyncio.to_thread(function, request.state.key, asked)

            app.add_api_route(where + path, run, methods=["POST"])
            return function

        return decorate

    @post("client/config")
    def config(key: str, asked: dict[str, Any]) -> Any:
        return {
            "pjwt_auth_enabled": False,
            "proto_compress_fwdbwd": zstandard is not None,
            "sample_use_retrieve_futures": False,
            "custom_loss_server_side": False,
        }

    @post("client/dynamic_config")
    def dynamic_config(key: str, asked: dict[str, Any]) -> Any:
        return {}

    @post("create_session")
    def create_session(key: str, asked: dict[str, Any]) -> Any:
        name = uuid.uuid4().hex
        api.sessions[name] = time.monotonic()
        return {"type": "create_session", "session_id": name}

    @post("session_heartbeat")
    def session_heartbeat(key: str, asked: dict[str, Any]) -> Any:
        api.alive(asked["session_id"])
        api.sessions[asked["session_id"]] = time.monotonic()
        return {"type": "session_heartbeat"}

    @post("telemetry")
    def telemetry(key: str, asked: dict[str, Any]) -> Any:
        return {"status": "accepted"}

    @app.post("/api/v1/sessions/{session}/finish")
    def finish(session: str) -> Any:
        api.end(session)
        return {}

    @app.get("/api/v1/healthz")
    def healthz() -> Any:
        return {"status": "ok"}

    @app.get("/api/v1/get_server_capabilities")
    def capabilities() -> Any:
        most = {"model_name": base, "max_context_length": service.max_tokens}
        return {"supported_models": [most]}

    @post("create_model")
    def create_model(key: str, asked: dict[str, Any]) -> Any:
        return api.new_model(key, asked)

    @post("unload_model")
    def unload_model(key: str, asked: dict[str, Any]) -> Any:
        api.model(key, asked["model_id"])
        model = api.models.pop(asked["model_id"])
        return api.at_once(
            key,
            lambda: (
                {"model_id": asked["model_id"], "type": "unload_model"}
                if not model.tenant.close()
                else {}
            ),
        )

    @post("get_info")
    def get_info(key: str, asked: dict[str, Any]) -> Any:
        rank = api.model(key, asked["model_id"]).tenant.rank
        arch = service.model.config.model_type
        data = {"arch": arch, "model_name": base, "tokenizer_id": base}
        found = {"type": "get_info", "model_id": asked["model_id"], "model_data": data}
        return {**found, "is_lora": True, "lora_rank": rank, "model_name": base}

    @post("weights_info")
    def weights_info(key: str, asked: dict[str, Any]) -> Any:
        _, saved = service.store.read("weights_info", parsed(key, asked["tinker_path"]))
        trained = {"train_unembed": False, "train_mlp": True, "train_attn": True}
        return {"base_model": base, "is_lora": True, "lora_rank": saved.config.r, **trained}

    @app.post("/api/v1/forward_backward")
    @app.post("/api/v1/forward")
    async def forward_backward(request: Request) -> Any:
        body, key = await body_of(request), request.state.key
        if request.headers.get("content-encoding") == "zstd":
            if zstandard is None:
                raise HTTPException(415, "content-encoding: expected none; pip install zstandard")
            try:
                reader = zstandard.ZstdDecompressor().stream_reader(body)
                body = reader.read(MAX_BODY + 1)
            except zstandard.ZstdError as error:
                raise ValueError(f"body: expected zstd, found {error}") from None
            if len(body) > MAX_BODY:
                raise HTTPException(413, f"body: expected at most {MAX_BODY} bytes")
        asked, data, options = read_request(body)

        def begin(tenant: Tenant) -> Any:
            call = tenant.forward if asked.forward_only else tenant.forward_backward
            return call(data, asked.loss_fn or "cross_entropy", options)

        where = key, asked.model_id, asked.seq_id
        return await asyncio.to_thread(api.in_order, *where, begin, written_result)

    @post("optim_step")
    def optim_step(key: str, asked: dict[str, Any]) -> Any:
        adam = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}
        adam |= {k: v for k, v in (asked.get("adam_params") or {}).items() if v is not None}
        return api.in_order(
            key, asked["model_id"], asked.get("seq_id"),
            lambda tenant: tenant.optim_step(
                adam["learning_rate"], (adam["beta1"], adam["beta2"]), adam["eps"],
                adam.get("weight_decay", 0.0), adam.get("grad_clip_norm") or None,
            ),
            lambda result: {"metrics": result.metrics},
        )  # fmt: skip

    def saved(key: str, asked: dict[str, Any], kind: str) -> Any:
        name, model = asked.get("path") or uuid.uuid4().hex, asked["model_id"]
        where = folder(key, model, kind, name)
        target = service.store.folder("save", where)
        if asked.get("overwrite") is False and target.exists():
            raise ValueError(f"path: expected a new name, or overwrite, found {name!r:.200}")
        done = "save_weights" if kind == "weights" else "save_weights_for_sampler"
        answer = {"type": done, "path": f"tinker://{model}/{kind}/{name}"}

        def begin(tenant):
            return tenant.save(where, wait=False)

        return api.in_order(key, model, asked.get("seq_id"), begin, lambda _: answer)

    @post("save_weights")
    def save_weights(key: str, asked: dict[str, Any]) -> Any:
        return saved(key, asked, "weights")

    @post("save_weights_for_sampler")
    def save_weights_for_sampler(key: str, asked: dict[str, Any]) -> Any:
        if asked.get("path"):
            return saved(key, asked, "sampler_weights")
        model, mode = asked["model_id"], asked.get("kind") or "snapshot"
        name = f"{api.model(key, model).session}:sample:{asked.get('sampling_session_seq_id')}"

        def told(sampler: Sampler) -> Any:
            api.samplers[name] = key, sampler
            return {"type": "save_weights_for_sampler", "sampling_session_id": name}

        def begin(tenant):
            return tenant.sampler(mode, wait=False)

        return api.in_order(key, model, asked.get("seq_id"), begin, told)

    @post("load_weights")
    def load_weights(key: str, asked: dict[str, Any]) -> Any:
        if not asked.get("model_id"):
            return api.new_model(key, asked)
        path, optimizer = parsed(key, asked["path"]), bool(asked.get("optimizer", True))
        answer = {"type": "load_weights", "path": asked["path"], "model_id": asked["model_id"]}

        def begin(tenant):
            return tenant.restore(path, optimizer, wait=False)

        return api.in_order(key, asked["model_id"], asked.get("seq_id"), begin, lambda _: answer)

    @post("create_sampling_session")
    def create_sampling_session(key: str, asked: dict[str, Any]) -> Any:
        api.alive(asked["session_id"])
        name = f"{asked['session_id']}:sample:{asked['sampling_session_seq_id']}"
        if name not in api.samplers:
            api.samplers[name] = key, api.sampler(key, asked)
        return {"type": "create_sampling_session", "sampling_session_id": name}

    @app.get("/api/v1/samplers/{name}")
    def sampler(name: str, request: Request) -> Any:
        if api.samplers.get(name, (None,))[0] != request.state.key:
            raise HTTPException(404, f"sampler: expected one of this key, found {name!r:.200}")
        return {"sampler_id": name, "base_model": base}

    @post("asample")
    def asample(key: str, asked: dict[str, Any]) -> Any:
        return api.sample(key, asked)

    @post("cancel_future")
    def cancel_future(key: str, asked: dict[str, Any]) -> Any:
        return {}

    @app.post("/api/v1/retrieve_future")
    async def retrieve_future(request: Request) -> Any:
        name = (await request.json())["request_id"]
        key, future = api.futures.get(name, (None, None))
        if future is None or key != request.state.key:
            raise HTTPException(
                410, f"request_id: expected a promise of this server, found {name!r:.200}"
            )
        try:
            found = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), PATIENCE)
        except asyncio.TimeoutError:
            return {"type": "try_again", "request_id": name, "queue_state": "active"}
        except Exception as error:
            kind = "user" if isinstance(error, ValueError) else "server"
            return {"error": f"{error}", "category": kind}
        return Response(found, media_type=MIME) if isinstance(found, bytes) else found

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder of transformers")
    parser.add_argument("--store", type=Path, required=True, help="the folder of all saves")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="which by default nobody else reaches")
    parser.add_argument("--keys", type=Path, help="a file of keys, one a line; without it any")
    args = parser.parse_args()
    keys = None
    if args.keys is not None:
        keys = {line.strip() for line in args.keys.read_text().splitlines()} - {""}
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError, KeyError):
        tokenizer = None  # stops that are texts are refused
    with Service(model, store=args.store, tokenizer=tokenizer) as service:
        app = make_app(service, str(args.model), keys)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                host=args.host,
                port=args.port,
                log_level="warning",
                timeout_graceful_shutdown=5,
            )
        )
        begin = server.startup

        async def startup(*given: Any, **how: Any) -> None:
            await begin(*given, **how)
            if server.started:
                host, port = server.servers[0].sockets[0].getsockname()[:2]
                print(f"listening on http://{host}:{port}", flush=True)

        server.startup = startup
        server.run()


if __name__ == "__main__":
    main()
