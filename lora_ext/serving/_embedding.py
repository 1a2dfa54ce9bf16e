"""Embeddings of texts with adapters; one forward computes the vectors of several requests."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_ext._checks import choice, require
from lora_ext.pool import PoolFullError, UnknownAdapterError
from lora_ext.rows import Entry, Name, _entries

from ._engine import ServedPool, StoppedError
from ._metrics import Load
from .attaching import attach

POOLINGS = ("cls", "mean", "lasttoken")
#: Model types in the file names ``sentence_<type>_config.json``, in the order of the search.
_KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
# Maximum number of attempts to compute a batch. An attempt fails if an adapter is unloaded between
# its load and the forward.
_TRIES = 8


@dataclass(eq=False)
class _Waiting:
    ids: list[list[int]]
    name: Entry
    vectors: asyncio.Future[Tensor]
    since: float = field(default_factory=time.monotonic)
    tries: int = _TRIES


@dataclass(frozen=True)
class Preparation:
    """Preparation of a text before it is tokenized, as in sentence-transformers.

    Args:
        prompt: prefix of every text.
        max_length: maximum number of tokens; longer texts are truncated. None uses the tokenizer's
            limit. A smaller context of the embedder or the model takes precedence.
        lower_case: whether to convert the text to lower case.
    """

    prompt: str = ""
    max_length: int | None = None
    lower_case: bool = False

    def tokens(self, tokenizer: Any, text: str, context: int) -> list[int]:
        """Return the token ids of a text, at most ``context``."""
        text = (self.prompt + text).strip()
        text = text.lower() if self.lower_case else text
        own = tokenizer.model_max_length if self.max_length is None else self.max_length
        return tokenizer(text, truncation=True, max_length=min(own, context)).input_ids


class Embedder(ServedPool):
    """Embedding model with the adapters in a folder, each loaded at its first use.

    Args:
        model: a transformers model whose output has a ``last_hidden_state``, already on its device.
        tokenizer: tokenizer of the model.
        folder: folder of the adapters. Nothing outside it is read.
        pooling: how the vector of a text is computed from its tokens' hidden states: "cls" for the
            first state, "mean" for the mean, or "lasttoken" for the last state.
        normalize: whether to divide vectors by their Euclidean norm.
        max_requests: maximum number of waiting and running requests.
        max_rank: largest rank of an adapter.
        lora_dtype, max_loaded_bytes, host_cache_bytes: see :class:`Engine`.
        max_wait_s: time in seconds for which later requests may overtake a request whose adapter
            does not fit into the pool together with the adapters of a forward. After this time, the
            next forward computes the oldest request.
        context: maximum number of tokens of a text.
        max_batch_tokens: maximum number of tokens in a forward, including padding. A longer text is
            computed in a separate forward.
        preparation: preparation of texts. If None, texts are passed to the tokenizer unchanged.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folder: str | os.PathLike[str],
        *,
        pooling: str = "mean",
        normalize: bool = True,
        context: int = 4096,
        max_batch_tokens: int = 4096,
        preparation: Preparation | None = None,
        **limits: Any,
    ):
        self.pooling, self.normalize = choice("Embedder", "pooling", pooling, POOLINGS), normalize
        super().__init__(model, tokenizer, folder, **limits)
        self.max_batch_tokens, self.preparation = max_batch_tokens, preparation
        self.dimensions = model.config.get_text_config().hidden_size
        self.context = min(context, _positions(model))
        if preparation is not None and preparation.max_length is not None:
            self.context = min(self.context, preparation.max_length)
        self.model = attach(model, self.pool)
        self._waiting: list[_Waiting] = []
        self._running: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True

    @property
    def healthy(self) -> bool:
        """True until :meth:`interrupt` is called or the ``with`` block ends."""
        return not self._stopped

    @property
    def requests(self) -> int:
        """Number of requests that are being tokenized, are waiting or are running."""
        return self._preparing + len(self._waiting) + len(self._running)

    def interrupt(self) -> None:
        """Reject new requests, and end all waiting and running ones with StoppedError.

        Call this method in the event loop in which the requests were started.
        """
        self._stopped = True
        for each in (*self._waiting, *self._running):
            if not each.vectors.done():
                each.vectors.set_exception(StoppedError("embed: the server is stopping"))

    async def embed(
        self, texts: Sequence[str | list[int]], adapter_name: Entry = None
    ) -> tuple[Tensor, int]:
        """Compute the vectors of texts, in one forward with other waiting requests if possible.

        Args:
            texts: N texts, each a string or a list of token ids.
            adapter_name: name of the adapter, or None for the base model; or ``(name, weight)``, or
                a mixture ``{name: weight, ...}``.

        Returns:
            The vectors, ``(N, D)`` finite float32 on the CPU, and the total number of tokens in the
            texts.

        Raises:
            QueueFullError: If there are ``max_requests`` requests already.
            StoppedError: After :meth:`interrupt`.
            ValueError: If there is no text; if a text has no tokens, too many tokens or an unknown
                token; or if a vector is not finite, for example because an adapter overflows.
            UnknownAdapterError: If the folder has no such adapter.
            PoolFullError: If the pool has no room for the adapter.

        Errors of :meth:`AdapterPool.load` are raised, too.
        """
        require(len(texts) > 0, "embed", "input", "at least one text", "none")
        with self._prepared("embed"):
            adapter_name = self._used(adapter_name, "embed: adapter_name")
            async with self._encoding:
                ids = await asyncio.to_thread(self._encode, texts)
        if self._stopped:
            raise StoppedError("embed: the server is stopping")
        each = _Waiting(ids, adapter_name, asyncio.get_running_loop().create_future())
        self._waiting.append(each)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._work())
        vectors, tokens = await each.vectors, sum(map(len, ids))
        self._counts.update(requests_total=1, tokens_total=tokens)
        return vectors, tokens

    def load(self) -> Load:
        """Return the load, for routers that choose a server for each request."""
        running, waiting = (
            [_name(r.name) for r in each] for each in (self._running, self._waiting)
        )
        return Load(running, waiting, self.max_requests, 0.0)

    def _encode(self, texts: Sequence[str | list[int]]) -> list[list[int]]:
        size = self.model.config.get_text_config().vocab_size
        ids: list[list[int]] = []
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                one = text
            elif self.preparation is None:
                one = self.tokenizer(text).input_ids
            else:
                one = self.preparation.tokens(self.tokenizer, text, self.context)
            expected = f"1 to {self.context} tokens"
            require(0 < len(one) <= self.context, "embed", f"input[{i}]", expected, len(one))
            wrong = [token for token in one if not 0 <= token < size]
            require(not wrong, "embed", f"input[{i}]", f"token ids in [0, {size})", f"{wrong[:3]}")
            ids.append(one)
        return ids

    async def _work(self) -> None:
        """Compute batches until no request is waiting."""
        while self._waiting:
            with contextlib.ExitStack() as pins:
                await self._fill(pins)
                if self._running:
                    await self._answer([*self._running])
            self._running.clear()

    async def _fill(self, pins: contextlib.ExitStack) -> None:
        """Move waiting requests that fit into one forward to the batch, and pin their adapters.

        The batch contains the oldest request, unless this request fails.
        """
        batch, rows, widest, i = self._running, 0, 0, 0
        while i < len(self._waiting):
            each = self._waiting[i]
            width = max(widest, *map(len, each.ids))
            if batch and (rows + len(each.ids)) * width > self.max_batch_tokens:
                break
            try:
                acquire: Any = functools.partial(asyncio.to_thread, self.pool.acquire, [each.name])
                pins.enter_context(await self._loaded(_name(each.name), acquire))
            except Exception as error:
                if batch and isinstance(error, PoolFullError) and not error.final:
                    if time.monotonic() - each.since >= self._max_wait_s:
                        break
                    i += 1
                    continue
                if isinstance(error, PoolFullError) and isinstance(_name(each.name), tuple):
                    error.final = True  # nothing else is pinned
                _end(self._waiting.pop(i), error)
            else:
                batch.append(self._waiting.pop(i))
                rows, widest = rows + len(each.ids), width

    async def _answer(self, batch: list[_Waiting]) -> None:
        """Compute a batch and set its results.

        After an error the two halves of the batch are computed separately, so that only the faulty
        request fails.
        """
        try:
            vectors = await asyncio.to_thread(self._forward, batch)
        except Exception as error:
            if isinstance(error, UnknownAdapterError) and all(each.tries for each in batch):
                for each in batch:  # an adapter was unloaded meanwhile
                    each.tries -= 1
                    self._running.remove(each)
                self._waiting[:0] = batch
                return
            if len(batch) > 1:
                half = len(batch) // 2
                await self._answer(batch[:half])
                await self._answer(batch[half:])
                return
            vectors = error
        start = 0
        for each in batch:
            stop = start + len(each.ids)
            _end(each, vectors[start:stop] if isinstance(vectors, Tensor) else vectors)
            start = stop

    def _forward(self, batch: Sequence[_Waiting]) -> Tensor:
        """Return the vectors ``(N, D)`` of a batch; texts of similar length share a forward."""
        texts = [(one, each.name) for each in batch for one in each.ids]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i][0]))
        parts: list[Tensor] = []
        start = 0
        while start < len(order):
            if self._stopped:
                raise StoppedError("embed: the server is stopping")
            rows = max(1, self.max_batch_tokens // len(texts[order[start]][0]))
            parts.append(self._vectors([texts[i] for i in order[start : start + rows]]))
            start += rows
        return torch.cat(parts)[torch.tensor(order).argsort()]

    @torch.inference_mode()
    def _vectors(self, texts: Sequence[tuple[list[int], Entry]]) -> Tensor:
        ids, names = [one for one, _ in texts], [name for _, name in texts]
        lengths = torch.tensor([len(one) for one in ids])
        tokens = pad_sequence([torch.tensor(one) for one in ids], batch_first=True)
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
        if self.normalize:  # in float64, because squares overflow in float32
            vectors = nn.functional.normalize(vectors.double(), dim=-1).float()
        return vectors.cpu()


def _name(entry: Entry) -> Name | None:
    return _entries.name_of(_entries.members_of(entry, "embed: adapter_name"))


def _positions(model: Any) -> int:
    """Return the maximum number of tokens for which a model has position embeddings.

    In RoBERTa and similar models, positions begin after the index of the padding token.
    """
    most = model.config.get_text_config().max_position_embeddings
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            most = min(most, module.num_embeddings - padding - 1)
    return most


def _end(each: _Waiting, answer: Tensor | Exception) -> None:
    if not each.vectors.done():  # its client may have disconnected
        if isinstance(answer, Tensor) and not answer.isfinite().all():
            source = "the base model" if each.name is None else f"adapter {each.name!r:.200}"
            answer = ValueError(
                f"embed: model: expected finite vectors, found NaN or inf: {source} overflows"
            )
        if isinstance(answer, Tensor):
            each.vectors.set_result(answer)
        else:
            each.vectors.set_exception(answer)


def pooling_of(folder: str | os.PathLike[str]) -> tuple[str, bool] | None:
    """Read from a sentence-transformers folder the pooling and whether vectors are normalised.

    Returns:
        The pooling, as for :class:`Embedder`, and True if vectors are normalised; or None if the
        folder has a different format.

    Raises:
        ValueError: If the folder lists modules other than a transformer, a pooling and a
            normalisation, or if :class:`Embedder` does not support its pooling.
    """
    parts = _read(Path(folder) / "modules.json")
    if parts is None:
        return None
    kinds = [str(part["type"]).rpartition(".")[2] for part in parts]
    expected = "Transformer, Pooling and optionally Normalize"
    known = kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
    require(known, "modules.json", "type", expected, ", ".join(kinds))
    config = _read(Path(folder) / parts[1]["path"] / "config.json") or {}
    wanted = [k.removeprefix("pooling_mode_") for k, v in config.items() if v is True]
    wanted = [
        k.removesuffix("_token").removesuffix("_tokens") for k in wanted if k != "include_prompt"
    ]
    if isinstance(config.get("pooling_mode"), str):
        wanted = [config["pooling_mode"]]
    fits = len(wanted) == 1 and wanted[0] in POOLINGS
    require(fits, "Pooling", "config.json", f"one of {', '.join(POOLINGS)}", ", ".join(wanted))
    return wanted[0], "Normalize" in kinds


def preparation_of(folder: str | os.PathLike[str]) -> Preparation | None:
    """Read the preparation of texts from a folder in the format of sentence-transformers.

    Returns:
        The preparation, or None if the folder has a different format.

    Raises:
        ValueError: If the default prompt is not among the prompts, or if the pooling excludes the
            tokens of the prompt.
    """
    parts = _read(Path(folder) / "modules.json")
    if parts is None:
        return None
    first, pooling = (Path(folder) / part["path"] for part in parts[:2])
    found = (_read(first / f"sentence_{kind}_config.json") for kind in _KINDS)
    config = next(filter(None, found), {})
    prompts = _read(Path(folder) / "config_sentence_transformers.json") or {}
    name, listed = prompts.get("default_prompt_name"), prompts.get("prompts") or {}
    if name is not None:
        where = "config_sentence_transformers.json"
        expected = f"one of {sorted(listed)}"
        require(name in listed, where, "default_prompt_name", expected, f"{name!r:.200}")
        counted = (_read(pooling / "config.json") or {}).get("include_prompt", True)
        expected = f"true, as the folder has the default prompt {name!r:.200}"
        require(counted, "Pooling", "include_prompt", expected, counted)
    prompt = "" if name is None else listed[name]
    return Preparation(prompt, config.get("max_seq_length"), bool(config.get("do_lower_case")))


def _read(file: Path) -> Any:
    """Return the content of a JSON file, or None if the file is missing."""
    return json.loads(file.read_text()) if file.is_file() else None
