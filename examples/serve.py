"""A server of one file: OpenAI's chat completions, where ``model`` names an adapter or the base.

`pip install lora_ext[serve]`, then `python examples/serve.py --model DIR --adapters DIR`."""

import argparse
import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ext.pool import PoolFullError, UnknownAdapterError
from lora_ext.serving.engine import Engine, QueueFullError
from lora_ext.serving.metrics import CONTENT_TYPE, prometheus
from lora_ext.serving.sampling import Sampling

CODES = {ValidationError: 422, UnknownAdapterError: 404, FileNotFoundError: 404}
CODES |= {PoolFullError: 429, QueueFullError: 429, ValueError: 400, NotImplementedError: 400}
CODES |= {RuntimeError: 500, HTTPException: 500, ClientDisconnect: 400}
Stop = Annotated[str, Field(min_length=1, max_length=256)]
STRICT = ConfigDict(extra="forbid", strict=True, populate_by_name=True)  # other fields are refused
Message = create_model("Message", __config__=STRICT, role=(str, ...), content=(str, ...))
Load = create_model("Load", __config__=STRICT, lora_name=(str, ...), lora_path=(str | None, None))


class Chat(BaseModel, **STRICT):
    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: dict[Literal["include_usage"], bool | None] | None = None
    max_tokens: int | None = Field(None, ge=1, alias="max_completion_tokens")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: Literal[1] | None = None


def make_app(engine: Engine, base: str, max_body: int) -> FastAPI:
    async def read(kind: type[BaseModel], request: Request) -> Any:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > max_body:
                raise HTTPException(413, f"body: expected at most {max_body} bytes")
        return kind.model_validate_json(body)

    def refuse(_: Request, error: Any) -> JSONResponse:
        code = next(code for kind, code in CODES.items() if isinstance(error, kind))
        code = getattr(error, "status_code", code)
        refused[code] += 1
        told = getattr(error, "detail", None) or str(error.args[0] if error.args else error)
        more = {"Retry-After": "1"} if code == 429 else getattr(error, "headers", None)
        return JSONResponse({"error": {"message": told, "code": code}}, code, more)

    app, refused = FastAPI(exception_handlers=dict.fromkeys(CODES, refuse)), Counter()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Any:
        chat = await read(Chat, request)
        if chat.stream_options and not chat.stream:
            raise ValueError("stream_options: expected beside stream: true, found without it")
        name, said = None if chat.model == base else chat.model, chat.model_dump()["messages"]
        heat = (1.0 if x is None else x for x in (chat.temperature, chat.top_p))
        stream = await engine.begin(said, name, chat.max_tokens, Sampling(*heat, chat.seed))
        stream.until_gone(request.receive)
        texts = stream.texts(engine.tokenizer, chat.stop or ())
        head = {"id": stream.request_id, "created": int(time.time()), "model": chat.model}
        head["object"] = "chat.completion.chunk" if chat.stream else "chat.completion"
        head |= {"usage": None} if (chat.stream_options or {}).get("include_usage") else {}

        async def events() -> Any:
            def event(reason: str | None = None, **delta: str) -> str:
                choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
                return f"data: {json.dumps({**head, 'choices': choices})}\n\n"

            try:
                yield event(role="assistant", content="")
                async for text in texts:
                    yield event(content=text)
                yield event(stream.finish_reason)
                if "usage" in head:
                    yield f"data: {json.dumps({**head, 'choices': [], 'usage': stream.usage})}\n\n"
            except RuntimeError as error:  # of the generation, behind a status of 200
                yield f"data: {refuse(request, error).body.decode()}\n\n"
            yield "data: [DONE]\n\n"

        if chat.stream:
            return StreamingResponse(events(), media_type="text/event-stream")
        message = {"role": "assistant", "content": "".join([text async for text in texts])}
        choices = [{"index": 0, "message": message, "finish_reason": stream.finish_reason}]
        return {**head, "choices": choices, "usage": stream.usage}

    @app.get("/v1/models")
    def models() -> Any:
        data = [{"id": base, "object": "model", "owned_by": "lora_ext", "created": 0}]
        data += [{**data[0], "id": name, "parent": base} for name in engine.pool.names]
        return {"object": "list", "data": data}

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Any:
        asked = await read(Load, request)
        if asked.lora_name == base:
            raise ValueError(f"lora_name: expected another than the base model's, found {base!r}")
        await asyncio.to_thread(engine.folder.load, asked.lora_name, asked.lora_path)
        return {"loaded": asked.lora_name}

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Any:
        asked = await read(Load, request)
        await asyncio.to_thread(engine.folder.unload, asked.lora_name)
        return {"unloaded": asked.lora_name}

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(prometheus(engine.stats(), refused), media_type=CONTENT_TYPE)

    @app.api_route("/health", methods=["GET", "HEAD"])
    def health() -> JSONResponse:
        return JSONResponse({"healthy": engine.healthy}, 200 if engine.healthy else 503)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder of transformers")
    parser.add_argument("--adapters", type=Path, required=True, help="the folder of all adapters")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="which by default nobody else reaches")
    parser.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    with Engine(model, AutoTokenizer.from_pretrained(args.model), args.adapters) as engine:
        app = make_app(engine, args.model.resolve().name, args.max_body)
        uvicorn.run(app, host=args.host, port=args.port, timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
