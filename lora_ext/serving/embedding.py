"""Vectors of texts, each with its adapter: what waits is computed in one forward."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import choice, require
from lora_ext.pool import AdapterFolder, AdapterPool, UnknownAdapterError

from .attaching import attach
from .engine import QueueFullError, StoppedError
from .metrics import Load

POOLINGS = ("cls", "mean", "lasttoken")
_TRIES = 8  # somebody may unload an adapter between its load and its forward


class _Waiting(NamedTuple):
    ids: list[list[int]]
    name: str | None
    vectors: asyncio.Future[Tensor]


class Embedder:
    """A model of vectors over a pool that is loaded from a folder at first use.

    Args:
        model: of transformers, with a ``last_hidden_state``, on its device.
        tokenizer: of the model.
        folder: where adapters are. Nothing outside it is read.
        pooling: one vector of a text's tokens: the first one's, their mean, or the last one's.
        normalize: whether vectors have length 1.
        max_requests: that wait or run. max_rank: of an adapter.
        context: tokens of a text. max_batch_tokens: of one forward, with padding; a request whose
            texts are more has a forward of its own.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folder: str | os.PathLike[str],
        *,
        pooling: str = "mean",
        normalize: bool = True,
        max_requests: int = 64,
        max_rank: int = 64,
        context: int = 4096,
        max_batch_tokens: int = 4096,
    ):
        self.pooling, self.normalize = choice("Embedder", "pooling", pooling, POOLINGS), normalize
        self.tokenizer, self.max_requests = tokenizer, max_requests
        self.max_batch_tokens = max_batch_tokens
        config = model.config.get_text_config()
        self.dimensions = config.hidden_size
        self.context = min(context, config.max_position_embeddings)
        self.pool = AdapterPool(model, max_requests, max_rank, pages=2 * max_requests)
        self.folder = AdapterFolder(self.pool, folder)
        self.model = attach(model, self.pool)
        self._counts = Counter(requests_total=0, tokens_total=0, cancelled_total=0)
        self._waiting: list[_Waiting] = []
        self._running: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None
        self._stopped = False
        self._encoding = asyncio.Lock()  # tokenizers are not made for threads

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True

    @property
    def healthy(self) -> bool:
        """Whether requests are answered."""
        return not self._stopped

    @property
    def requests(self) -> int:
        """How many wait or run."""
        return len(self._waiting) + len(self._running)

    def interrupt(self) -> None:
        """Take no more requests, and refuse those that wait or run. To be called in the event loop
        that they began in."""
        self._stopped = True
        for each in (*self._waiting, *self._running):
            if not each.vectors.done():
                each.vectors.set_exception(StoppedError("embed: the server stops"))

    async def embed(
        self, texts: Sequence[str | list[int]], adapter_name: str | None = None
    ) -> tuple[Tensor, int]:
        """Vectors of texts, in a forward with other requests that wait.

        Args:
            texts: each a text, or its tokens. adapter_name: None is the base model.

        Returns:
            ``(N, D)`` float32 on the CPU, and how many tokens the texts have.

        Raises:
            QueueFullError: too many requests. StoppedError: after :meth:`interrupt`. ValueError:
                no tokens, too many, or one that the model lacks. UnknownAdapterError: no such
                adapter. PoolFullError: no room for it. And what :meth:`AdapterPool.load` finds.
        """
        if self.requests >= self.max_requests:
            raise QueueFullError(f"embed: expected at most {self.max_requests} requests at a time")
        async with self._encoding:
            ids = await asyncio.to_thread(self._encode, texts)
        if self._stopped:
            raise StoppedError("embed: the server stops, and takes no more requests")
        each = _Waiting(ids, adapter_name, asyncio.get_running_loop().create_future())
        self._waiting.append(each)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._work())
        vectors, tokens = await each.vectors, sum(map(len, ids))
        self._counts.update(requests_total=1, tokens_total=tokens)
        return vectors, tokens

    def stats(self) -> dict[str, int]:
        """Numbers for a monitor: what has ended, what runs, and the pool."""
        pool = {f"pool_{k}": v for k, v in self.pool.stats().items() if isinstance(v, int)}
        return {**self._counts, "requests": self.requests, **pool}

    def load(self) -> Load:
        """What it has to do, as routers of requests read it."""
        running, waiting = ([r.name for r in each] for each in (self._running, self._waiting))
        return Load(running, waiting, self.pool.max_slots, 0.0)

    def _encode(self, texts: Sequence[str | list[int]]) -> list[list[int]]:
        size = self.model.config.get_text_config().vocab_size
        ids = [self.tokenizer(t).input_ids if isinstance(t, str) else t for t in texts]
        for i, one in enumerate(ids):
            expected = f"1 to {self.context} tokens"
            require(0 < len(one) <= self.context, "embed", f"input[{i}]", expected, len(one))
            wrong = [token for token in one if not 0 <= token < size]
            require(not wrong, "embed", f"input[{i}]", f"tokens in [0, {size})", f"{wrong[:3]}")
        return ids

    async def _work(self) -> None:
        """Take what waits, as much as a forward may have, until nothing does."""
        while self._waiting:
            batch, rows, widest = self._running, 0, 0
            while self._waiting:
                ids = self._waiting[0].ids
                rows, widest = rows + len(ids), max(widest, *map(len, ids))
                if batch and rows * widest > self.max_batch_tokens:
                    break
                batch.append(self._waiting.pop(0))
            await self._answer([each for each in batch if await self._ready(each)])
            batch.clear()

    async def _ready(self, each: _Waiting) -> bool:
        """Whether its adapter is there; a request whose adapter fails has that for its answer."""
        try:
            if each.name is not None and each.name not in self.pool:
                await asyncio.to_thread(self.folder.ready, each.name)
            return True
        except Exception as error:
            _end(each, error)
            return False

    async def _answer(self, batch: list[_Waiting]) -> None:
        for left in reversed(range(_TRIES)):
            try:
                vectors = await asyncio.to_thread(self._forward, batch) if batch else None
            except UnknownAdapterError as error:  # of an adapter that went meanwhile
                if left:
                    batch = [each for each in batch if await self._ready(each)]
                    continue
                vectors = error
            except Exception as error:
                vectors = error
            start = 0
            for each in batch:
                stop = start + len(each.ids)
                _end(each, vectors[start:stop] if isinstance(vectors, Tensor) else vectors)
                start = stop
            return

    @torch.inference_mode()
    def _forward(self, batch: Sequence[_Waiting]) -> Tensor:
        ids = [one for each in batch for one in each.ids]
        names = [each.name for each in batch for _ in each.ids]
        lengths = torch.tensor([len(one) for one in ids])
        tokens = torch.zeros(len(ids), int(lengths.max()), dtype=torch.int64)
        for row, one in zip(tokens, ids, strict=True):
            row[: len(one)] = torch.tensor(one)
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(self.model.device)
        out = self.model(
            input_ids=tokens.to(self.model.device), attention_mask=mask.long(), adapter_names=names
        )
        states = out.last_hidden_state.float()  # (N, T, D)
        if self.pooling == "cls":
            vectors = states[:, 0]
        elif self.pooling == "lasttoken":
            vectors = states[torch.arange(len(ids)), lengths - 1]
        else:
            vectors = (states * mask[..., None]).sum(1) / lengths.to(states)[:, None]
        if self.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return vectors.cpu()


def _end(each: _Waiting, answer: Tensor | Exception | None) -> None:
    if not each.vectors.done():  # its client may have gone
        if isinstance(answer, Tensor):
            each.vectors.set_result(answer)
        elif answer is not None:
            each.vectors.set_exception(answer)


def pooling_of(folder: str | os.PathLike[str]) -> tuple[str, bool] | None:
    """Pooling and whether vectors are normalised, of a folder as sentence-transformers saves it;
    None of another one.

    Raises:
        ValueError: parts or poolings other than one of :class:`Embedder`'s.
    """
    listed = Path(folder) / "modules.json"
    if not listed.is_file():
        return None
    parts = json.loads(listed.read_text())
    kinds = [str(part["type"]).rpartition(".")[2] for part in parts]
    expected = "Transformer, Pooling and perhaps Normalize"
    known = kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
    require(known, "modules.json", "type", expected, ", ".join(kinds))
    config = json.loads((Path(folder) / parts[1]["path"] / "config.json").read_text())
    wanted = [k.removeprefix("pooling_mode_") for k, v in config.items() if v is True]
    wanted = [
        k.removesuffix("_token").removesuffix("_tokens") for k in wanted if k != "include_prompt"
    ]
    if isinstance(config.get("pooling_mode"), str):
        wanted = [config["pooling_mode"]]
    fits = len(wanted) == 1 and wanted[0] in POOLINGS
    require(fits, "Pooling", "config.json", f"one of {', '.join(POOLINGS)}", ", ".join(wanted))
    return wanted[0], "Normalize" in kinds
