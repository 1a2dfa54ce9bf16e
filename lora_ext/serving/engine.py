"""What a server runs on: one model, the adapters of a folder, and a bounded number of requests."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_ext._checks import require
from lora_ext.pool import AdapterFolder, AdapterPool, UnknownAdapterError

from .attaching import attach
from .continuous import unfinished
from .sampling import Sampling
from .streams import RequestStream

_TRIES = 8  # somebody may unload an adapter between its load and its pin


class QueueFullError(RuntimeError):
    """As many requests as the engine takes wait or run."""


class Engine:
    """Continuous batching over a pool that is loaded from a folder at first use.

    Attaches the model and makes its manager, which runs inside ``with engine:``.

    Args:
        model: of transformers, with ``generate_batch``, on its device.
        tokenizer: of the model.
        folder: where adapters are. Nothing outside it is read.
        max_requests: that wait or run; each may have an adapter of its own.
        max_rank: of an adapter. The pool has room for ``max_requests`` of rank 16.
        context: tokens of prompt and answer of one request. The cache has room for four such, and
            for 256 tokens of each request.
        page_size, max_batch_tokens: of transformers' ``ContinuousBatchingConfig``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folder: str | os.PathLike[str],
        *,
        max_requests: int = 64,
        max_rank: int = 64,
        context: int = 4096,
        page_size: int = 64,
        max_batch_tokens: int = 512,
    ):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.model, self.tokenizer, self.max_requests = model, tokenizer, max_requests
        self.context = min(context, model.config.get_text_config().max_position_embeddings)
        self.pool = AdapterPool(model, max_requests, max_rank, pages=2 * max_requests)
        self.folder = AdapterFolder(self.pool, folder)
        ends = model.generation_config.eos_token_id
        self.manager = attach(model, self.pool).init_continuous_batching(
            GenerationConfig(
                do_sample=False, eos_token_id=tokenizer.eos_token_id if ends is None else ends
            ),
            ContinuousBatchingConfig(
                page_size=page_size,
                num_blocks=-(-max(4 * self.context, 256 * max_requests) // page_size),
                max_batch_tokens=max_batch_tokens,
            ),
        )
        self._counts = Counter(requests_total=0, tokens_total=0, cancelled_total=0)
        self._preparing = 0
        self._encoding = asyncio.Lock()  # tokenizers are not made for threads

    def __enter__(self) -> Engine:
        with torch.inference_mode():  # the manager's thread takes it over
            self.manager.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the manager's thread, and with an error the requests that it has."""
        self.manager.stop(hard_stop=True)

    @property
    def healthy(self) -> bool:
        """Whether requests are answered."""
        return self.manager.is_running()

    @property
    def requests(self) -> int:
        """How many wait or run."""
        return self._preparing + unfinished(self.manager)

    async def begin(
        self,
        messages: Sequence[Mapping[str, str]],
        adapter_name: str | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        *,
        allow_base: bool = False,
    ) -> RequestStream:
        """Put a chat into the next batches, with its adapter pinned, and loaded where it is not.

        Args:
            messages: what the tokenizer's chat template takes.
            adapter_name: None is the base model.
            max_new_tokens: default is what is left of the context, at most 256.
            sampling: None takes the largest logit.
            allow_base: the base model serves a chat without the invocation of its activated
                adapter.

        Raises:
            QueueFullError: too many requests. ValueError: a chat that the template does not take,
                that lacks the invocation, or too many tokens. UnknownAdapterError: no such
                adapter. PoolFullError: no room for it. And what :meth:`AdapterPool.load` finds in
                its files.
        """
        if self.requests >= self.max_requests:
            raise QueueFullError(f"begin: expected at most {self.max_requests} requests at a time")
        self._preparing += 1
        try:
            async with self._encoding:
                ids = await asyncio.to_thread(self.encode, messages)
            room = self.context - len(ids)
            new = max(1, min(256, room)) if max_new_tokens is None else max_new_tokens
            expected = f"at most {self.context} tokens of prompt and answer"
            require(new <= room, "begin", "max_new_tokens", expected, f"{len(ids)} and {new}")
            how = {"max_new_tokens": new, "sampling": sampling, "allow_base": allow_base}
            for left in reversed(range(_TRIES)):
                if adapter_name is not None and adapter_name not in self.pool:
                    await asyncio.to_thread(self.folder.ready, adapter_name)
                try:
                    return RequestStream(
                        self.manager, ids, adapter_name=adapter_name, ended=self._count, **how
                    )
                except UnknownAdapterError:
                    if not left:
                        raise
            raise AssertionError("the last try returns or raises")
        finally:
            self._preparing -= 1

    def _count(self, stream: RequestStream) -> None:
        self._counts.update(
            requests_total=1,
            tokens_total=len(stream.tokens),
            cancelled_total=int(stream.cancelled and not stream.stopped),
        )

    def stats(self) -> dict[str, int]:
        """Numbers for a monitor: what has ended, what runs, and the pool."""
        pool = {f"pool_{k}": v for k, v in self.pool.stats().items() if isinstance(v, int)}
        return {**self._counts, "requests": self.requests, **pool}

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a chat, up to where the answer begins. A tokenizer without a chat template gets
        the contents, a line each."""
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            return self.tokenizer("\n".join(said["content"] for said in messages)).input_ids
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            return self.tokenizer(text, add_special_tokens=False).input_ids
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(
                f"begin: messages: the chat template does not take them: {error}"
            ) from None
