"""A server of one file: OpenAI's chat completions, where ``model`` names an adapter or the base.

`pip install lora_ext[serve]`, then `python examples/serve.py --model DIR --adapters DIR`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
)

import lora_ext
from lora_ext.interop.continuous import unfinished
from lora_ext.interop.sampling import Sampling
from lora_ext.interop.streams import RequestStream, TextStream
from lora_ext.pool import PoolFullError, UnknownAdapterError

QUEUE = 64  # requests that wait or run; more get 429
SLOTS, MAX_RANK = 64, 64  # adapters at once, and their largest rank
CONTEXT, PAGE = 4096, 64  # tokens of prompt and answer; the cache holds four such requests
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Message(Strict):
    role: str
    content: str


class Chat(Strict):
    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool = False
    max_tokens: Annotated[int, Field(ge=1)] = 256
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    n: Literal[1] = 1
    user: str = ""


class Load(Strict):
    lora_name: str
    lora_path: str


class Unload(Strict):
    lora_name: str


class Engine:
    """A model with its adapters, and the requests in progress."""

    def __init__(self, model: Path, adapters: Path):
        self.base, self.root = model.resolve().name, adapters.resolve(strict=True)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.context = min(CONTEXT, self.model.config.get_text_config().max_position_embeddings)
        self.pool = lora_ext.AdapterPool(self.model, SLOTS, MAX_RANK, pages=2 * SLOTS)
        lora_ext.attach(self.model, self.pool)
        self.paths: dict[str, Path] = {}  # of adapters in the pool
        self.loading, self.encoding = asyncio.Lock(), asyncio.Lock()
        self.preparing, self.counts = 0, Counter()
        end = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        self.ends = set(end if isinstance(end, list) else [end])
        self.manager = self.model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=list(self.ends)),
            ContinuousBatchingConfig(
                page_size=PAGE, num_blocks=4 * -(-CONTEXT // PAGE), max_batch_tokens=512
            ),
        )

    def folder(self, path: str) -> Path:
        """A folder below --adapters; neither it nor a file in it leads out of there."""
        try:
            found = (self.root / path).resolve()
            files = [found, *(f.resolve() for f in found.glob("*"))]
        except (OSError, RuntimeError, ValueError):
            raise HTTPException(400, f"lora_path: no path: {path!r:.200}") from None
        if found == self.root or not all(f.is_relative_to(self.root) for f in files):
            raise HTTPException(400, f"lora_path: {path!r:.200} is not below --adapters")
        if not found.is_dir():
            raise HTTPException(404, f"lora_path: no folder {path!r:.200} below --adapters")
        return found

    async def load(self, name: str, path: Path, again: bool = False) -> None:
        if name == self.base:
            raise HTTPException(400, f"lora_name: {name!r:.200} is the base model")
        async with self.loading:
            if name in self.pool and not again:
                return
            change = self.pool.update if name in self.pool else self.pool.load
            try:
                await asyncio.to_thread(change, name, path)
            except PoolFullError as error:
                raise HTTPException(429, str(error), {"Retry-After": "1"}) from None
            except (ValueError, NotImplementedError, OSError) as error:
                raise HTTPException(400, str(error)) from None
            self.paths[name] = path

    def path_of(self, name: str) -> Path:
        try:
            if Path(name).name == name:
                return self.paths.get(name) or self.folder(name)
        except HTTPException:
            pass
        raise HTTPException(404, f"model: {name!r:.200} is neither the base nor an adapter")
