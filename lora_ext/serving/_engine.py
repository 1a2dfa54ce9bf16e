"""Engine of a server: one model, the adapters in a folder, and a limited number of requests."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import os
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from lora_ext._checks import integer, require
from lora_ext.pool import AdapterFolder, AdapterPool, PoolFullError, UnknownAdapterError
from lora_ext.rows import Entry, Name, _entries, last_start

from ._constraining import limits_of
from ._continuous import adapter_requests
from ._formats import Format
from ._metrics import Load
from ._sampling import Logprobs, Sampling
from ._streams import RequestStream, check_generation
from .attaching import attach

if TYPE_CHECKING:
    from lora_ext.control import Constraint

# Maximum number of attempts to start a request. An attempt fails if the adapter is unloaded between
# its load and its pin.
_TRIES = 8
_RECHECK_SECONDS = 1.0  # a waiting request checks at this interval that the manager is running
_MAX_READ_PROMPTS = 16  # number of most recent prompts whose pages are assumed to be in the cache

T = TypeVar("T")
#: Prompt: messages of a chat, a text, or the token ids of a text.
Prompt: TypeAlias = Sequence[Mapping[str, str]] | str | Sequence[int]


class QueueFullError(RuntimeError):
    """Error for a request that exceeds the maximum number of waiting and running requests."""


class StoppedError(RuntimeError):
    """Error for a request to an engine that is stopping."""


class ServedPool:
    """Base class of engines: a pool that loads adapters from a folder, and counts of requests.

    Attributes:
        pool: the :class:`AdapterPool` of the model.
        folder: the :class:`lora_ext.pool.AdapterFolder` that loads adapters into the pool.
        tokenizer, max_requests: arguments of the engine; :class:`Engine` describes the others.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folder: str | os.PathLike[str],
        *,
        max_requests: int = 64,
        max_rank: int = 64,
        lora_dtype: torch.dtype | None = None,
        max_loaded_bytes: int | None = None,
        host_cache_bytes: int = 1 << 30,
        max_wait_s: float = 3.0,
    ):
        self.tokenizer, self.max_requests = tokenizer, max_requests
        self._max_wait_s = max_wait_s
        limits: dict[str, Any] = {"max_bytes": max_loaded_bytes}
        for name, value in (("max_requests", max_requests), ("max_rank", max_rank)):
            integer(type(self).__name__, name, value, 1)
        # The pool has room for an adapter of max_rank, or a mixture with as many pages, which needs
        # a slot for each of its adapters and one for itself. An empty slot is a row of the tables.
        pages = max(2 * max_requests, -(-max_rank // 8))  # a page has eight ranks
        slots = max(max_requests, min(pages + max_requests, _entries.MAX_MEMBERS + 1))
        limits |= {"host_cache_bytes": host_cache_bytes, "pages": pages, "dtype": lora_dtype}
        self.pool = AdapterPool(model, slots, max_rank, **limits)
        self.folder = AdapterFolder(self.pool, folder)
        self._counts = Counter(requests_total=0, tokens_total=0, cancelled_total=0)
        self._preparing = 0  # number of requests that are being tokenized
        self._stopped = False
        self._encoding = asyncio.Lock()  # tokenizers are not thread-safe

    @property
    def requests(self) -> int:
        """Number of requests that are being tokenized, are waiting or are running."""
        return self._preparing

    def stats(self) -> dict[str, int]:
        """Return the numbers of ended and current requests, and the pool's statistics."""
        pool = {f"pool_{k}": v for k, v in self.pool.stats().items() if isinstance(v, int)}
        pool["pool_cache_limit_bytes"] = self.pool.host_cache_bytes
        return {**self._counts, "requests": self.requests, **pool}

    @contextlib.contextmanager
    def _prepared(self, where: str) -> Iterator[None]:
        """Count a request as being tokenized inside the block.

        Raises:
            QueueFullError: If there are ``max_requests`` requests already.
        """
        if self.requests >= self.max_requests:
            raise QueueFullError(
                f"{where}: expected at most {self.max_requests} requests at a time, found "
                f"{self.requests + 1}"
            )
        self._preparing += 1
        try:
            yield
        except asyncio.CancelledError:
            self._counts.update(requests_total=1, cancelled_total=1)
            raise
        finally:
            self._preparing -= 1

    async def _load(self, name: Name | None) -> None:
        """Load the adapter or the adapters of a mixture, unless they are in the pool."""
        for each in name if isinstance(name, tuple) else (name,):
            if each is not None and each not in self.pool:
                await asyncio.to_thread(self.folder.ready, each)

    def _used(self, entry: Entry, where: str) -> Entry:
        """Return an entry without the names that have a weight of 0.

        Raises:
            UnknownAdapterError: If the folder has no adapter of one of these names.
            TypeError, ValueError: If the entry is invalid.
        """
        members = _entries.members_of(entry, where)
        for name in set(_entries.names_in(entry)).difference(name for name, _ in members):
            self.folder.check_exists(name)
        return _entries.spelled(members)

    async def _loaded(self, name: Name | None, pin: Callable[[], Awaitable[T]]) -> T:
        """Load the adapters of a name, call ``pin``, which pins them, and return its result.

        Both steps are repeated if an adapter was unloaded between its load and its pin.

        Raises:
            PoolFullError: If the adapters of a mixture evict each other.
        """
        left = _TRIES
        while True:
            await self._load(name)
            try:
                return await pin()
            except UnknownAdapterError as error:
                left -= 1
                if not left and isinstance(name, tuple):
                    expected = "expected a mixture whose adapters fit in the pool at the same time"
                    found = f"found {name!r:.200}: {error}"
                    raise PoolFullError(f"AdapterFolder: {expected}, {found}") from error
                if not left:
                    raise


class Engine(ServedPool):
    """Continuous batching with the adapters in a folder, each loaded at its first use.

    The constructor attaches the model and creates its continuous-batching manager. The manager runs
    inside ``with engine:``.

    Args:
        model: a transformers model with ``generate_batch``, already on its device.
        tokenizer: tokenizer of the model.
        folder: folder of the adapters. Nothing outside it is read.
        max_requests: maximum number of waiting and running requests; each may have a different
            adapter.
        max_rank: largest rank of an adapter, and largest sum of the ranks of a mixture. The pool
            has room for ``max_requests`` adapters of rank 16, or for one of rank ``max_rank``.
        lora_dtype: dtype of the pool's pages; see the argument ``dtype`` of :class:`AdapterPool`.
        max_loaded_bytes: maximum bytes of the adapters on the device, with their tables; None sets
            no further limit.
        host_cache_bytes: maximum bytes of evicted adapters in host memory. An adapter that does not
            fit is read from its folder again at its next use.
        max_wait_s: time in seconds after which a request that waits for room in the pool goes
            first: later requests of other adapters, even of loaded ones, then wait for it.
        context: maximum number of tokens in the prompt and answer of one request. The KV cache has
            room for four requests of this length, or for ``max_requests`` requests of 256 tokens if
            that is more.
        pack_base: see :func:`attach`.
        page_size, max_batch_tokens: see transformers' ``ContinuousBatchingConfig``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folder: str | os.PathLike[str],
        *,
        context: int = 4096,
        pack_base: bool | int | None = False,
        page_size: int = 64,
        max_batch_tokens: int = 512,
        **limits: Any,
    ):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        super().__init__(model, tokenizer, folder, **limits)
        self.model = model
        self.context = min(context, model.config.get_text_config().max_position_embeddings)
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        blocks = -(-max(4 * self.context, 256 * self.max_requests) // page_size)
        self.manager = attach(model, self.pool, pack_base=pack_base).init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=ends),
            ContinuousBatchingConfig(
                page_size=page_size, num_blocks=blocks, max_batch_tokens=max_batch_tokens
            ),
        )
        self._streams: set[RequestStream] = set()
        self._ahead = Ahead(page_size, lambda: self.healthy)
        self._turns = Turns(self._max_wait_s)
        self._requests = adapter_requests(self.manager)
        self._requests.freed = self._turns.free
        self._building = asyncio.Semaphore(2)
        self._vocabulary: Any = None
        self._token_texts: dict[int, str] = {}

    def __enter__(self) -> Engine:
        with torch.inference_mode():  # the manager's thread inherits inference mode
            self.manager.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the manager's thread, and end its requests with an error."""
        self.manager.stop(hard_stop=True)

    def interrupt(self) -> None:
        """Reject new requests, end the running ones, and let their iterators raise RuntimeError.

        Call this method in the event loop in which the requests were started.
        """
        self._stopped = True
        for stream in list(self._streams):
            stream.interrupt("the server is stopping")
        self._turns.wake()

    def pause(self) -> None:
        """Wait for the end of the current step, and compute no other step until :meth:`resume`.

        New requests are accepted and wait. Adapters can be loaded and unloaded, and requests can be
        cancelled. You can call this method from any thread.
        """
        self._requests.pause()

    def resume(self) -> None:
        """End a :meth:`pause`; do nothing if the engine is not paused."""
        self._requests.resume()

    @property
    def paused(self) -> bool:
        """True between :meth:`pause` and :meth:`resume`."""
        return self._requests.paused

    @property
    def healthy(self) -> bool:
        """True while the manager is running."""
        return self.manager.is_running()

    @property
    def requests(self) -> int:
        """Number of requests that are being tokenized, are waiting or are running."""
        return self._preparing + self._requests.unfinished

    async def begin(
        self,
        prompt: Prompt,
        adapter_name: Entry = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        *,
        allow_base: bool = False,
        form: Format | None = None,
        generation: int | None = None,
        logprobs: Logprobs | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> RequestStream:
        """Start a request: load its adapter if necessary, pin it, and add the prompt to the batch.

        An activated adapter applies from the last occurrence of its invocation (a token sequence)
        in the prompt. If other requests pin the pool's adapters, the request waits for room.

        Args:
            prompt: messages for the tokenizer's chat template, a text, or its token ids.
            adapter_name: name of the adapter, or None for the base model; or ``(name, weight)``, or
                a mixture ``{name: weight, ...}``.
            max_new_tokens: maximum number of tokens in the answer. The default is 256, or fewer if
                the prompt leaves less room in ``context``.
            sampling: sampling settings; None always chooses the token with the largest logit.
            allow_base: whether the base model answers if the prompt does not contain the activated
                adapter's invocation. If False, such a prompt raises ValueError.
            form: format of the answer. Its constraint is built in another thread and cached.
            generation: :meth:`generation <lora_ext.AdapterPool.generation>` that the adapter must
                have, or None for any. Must be None for the base model and for a mixture.
            logprobs: object that records the request's log-probabilities, or None. If it records
                the prompt, the request does not reuse keys and values of earlier requests.
            stop_token_ids: tokens that end the answer, in addition to the model's end tokens.

        Raises:
            QueueFullError: If there are ``max_requests`` requests already.
            StoppedError: After :meth:`interrupt`.
            GenerationGoneError: If the adapter has another generation.
            ValueError: If the chat template rejects the messages; if the invocation is missing; if
                the prompt has no tokens, too many tokens, or an unknown token; if ``form``,
                ``sampling`` or ``stop_token_ids`` is invalid; or if ``max_new_tokens`` is too small
                for ``form``.
            NotImplementedError: If ``form`` cannot be expressed as a constraint.
            UnknownAdapterError: If the folder has no such adapter.
            PoolFullError: If the pool has no room for the adapter although nothing is pinned.

        Errors of :meth:`AdapterPool.load` are raised, too.
        """
        members = _entries.members_of(adapter_name, "begin: adapter_name")
        with self._prepared("begin"), self._turns.take(_entries.name_of(members)) as turn:
            adapter_name = self._used(adapter_name, "begin: adapter_name")
            ids = await self._encoded(prompt)
            room = self.context - len(ids)
            require(room > 0, "begin", "input_ids", f"fewer than {self.context} tokens", len(ids))
            new = max(1, min(256, room)) if max_new_tokens is None else max_new_tokens
            expected = f"at most {self.context} tokens of prompt and answer together"
            require(new <= room, "begin", "max_new_tokens", expected, f"{len(ids)} + {new}")
            how = {"max_new_tokens": new, "sampling": sampling, "allow_base": allow_base}
            how |= {"adapter_name": adapter_name, "ended": self._count, "begun": self._ahead.ends}
            how |= {"generation": generation, "logprobs": logprobs}
            fits = generation is None or len(members) == 1
            expected = "None for the base model or a mixture"
            require(fits, "begin", "adapter_generation", expected, generation)
            if generation is not None:  # check it before the request waits
                with contextlib.suppress(PoolFullError):
                    await self._load(turn.name)
                check_generation(self.pool.generation(members[0][0]), generation)
            self._check_tokens(new, sampling, stop_token_ids)
            if stop_token_ids:
                _, ends = limits_of(self.manager, (), {})
                how["eos_token_id"] = [*ends, *stop_token_ids]
            if form is not None:
                how["constraint"] = await self._constraint(form)
            while True:
                await self._turns.wait(turn)
                pinned, freed = self._requests.pins_adapters(), self._turns.freed
                try:
                    return await self._loaded(turn.name, lambda: self._started(turn, ids, how))
                except PoolFullError as error:
                    late = self._requests.pins_adapters() or self._turns.freed != freed
                    if error.final or not (pinned or late):
                        error.final = error.final or len(members) > 1
                        raise
                    await self._turns.room(turn, freed)

    async def encode_all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the token ids of prompts, which may be passed to :meth:`begin`.

        Raises:
            QueueFullError: If there are ``max_requests`` requests already.
            ValueError: If the chat template rejects the messages, or a token id is unknown.
        """
        with self._prepared("begin"):
            return [await self._encoded(prompt) for prompt in prompts]

    async def _encoded(self, prompt: Prompt) -> list[int]:
        """Compute the token ids of a prompt in another thread."""
        async with self._encoding:
            job = asyncio.ensure_future(asyncio.to_thread(self.encode, prompt))
            try:
                return await asyncio.shield(job)
            finally:  # If this task is cancelled, the thread still uses the tokenizer.
                await asyncio.wait([job])

    async def _started(self, turn: Turn, ids: list[int], how: dict[str, Any]) -> RequestStream:
        """Pin the loaded adapter of a request, and add the request to the batch."""
        asked = self._asked(ids, how["adapter_name"], how["allow_base"])
        if how["logprobs"] is None or how["logprobs"].prompt_top is None:
            await self._ahead.wait(asked)
        await self._turns.wait(turn)
        if self._stopped:
            raise StoppedError("begin: the server is stopping")
        stream = RequestStream(self.manager, ids, **how)
        self._streams.add(stream)
        self._ahead.begins(stream, asked)
        return stream

    def _check_tokens(self, new: int, sampling: Sampling | None, stops: Sequence[int]) -> None:
        """Raise ValueError for an unknown token, or for ``min_tokens`` above ``new``."""
        size = self.model.get_output_embeddings().weight.shape[0]
        bias = sampling and sampling.logit_bias
        for name, given in (("stop_token_ids", stops), ("logit_bias", bias or ())):
            wrong = [token for token in given if not 0 <= token < size]
            require(not wrong, "begin", name, f"token ids in [0, {size})", f"{wrong[:3]}")
        least = sampling.min_tokens if sampling else 0
        require(least <= new, "begin", "min_tokens", f"at most {new}, the limit of tokens", least)

    def _asked(self, ids: list[int], entry: Entry, allow_base: bool) -> Asked:
        members = _entries.members_of(entry, "begin: adapter_name")
        start: int | None = 0 if members else None
        for name, _ in members if len(members) == 1 else ():  # a mixture has no activated adapter
            if invocation := self.pool.invocation(name):
                (start,) = last_start(torch.tensor([ids]), invocation)
                expected = f"the invocation {list(invocation)!r:.200} of adapter {name!r:.200}"
                fits = allow_base or start is not None
                require(fits, "begin", "input_ids", expected, "none in it")
        adapter = tuple((*member, self.pool.generation(member[0])) for member in members)
        return Asked(ids, adapter, len(ids) if start is None else start)

    async def _constraint(self, form: Format) -> Constraint:
        """Build a constraint in another thread; at most two are built at the same time."""
        from lora_ext.control import vocabulary_of

        async with self._building:
            if self._vocabulary is None:
                size = self.model.get_output_embeddings().weight.shape[0]
                ends = self.manager.generation_config.eos_token_id
                async with self._encoding:
                    self._vocabulary = await asyncio.to_thread(
                        vocabulary_of, "begin", self.tokenizer, size, ends
                    )
            return await asyncio.to_thread(form.constraint, self._vocabulary)

    def _count(self, stream: RequestStream) -> None:
        self._streams.discard(stream)
        gone = int(stream.cancelled and not stream.stopped)
        self._counts.update(requests_total=1, tokens_total=len(stream.tokens), cancelled_total=gone)

    def load(self) -> Load:
        """Return the load of the manager, for routers that choose a server for each request."""
        found = self._requests.load(self.max_requests)
        return found._replace(waiting=[*found.waiting, *self._turns.names])

    def token_text(self, token: int) -> str:
        """Return the text of a token, or ``token_id:N`` if this is empty or a partial character."""
        if token not in self._token_texts:
            text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            whole = bool(text) and "\N{REPLACEMENT CHARACTER}" not in text
            self._token_texts[token] = text if whole else f"token_id:{token}"
        return self._token_texts[token]

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt.

        The ids of a chat end with the template's generation prompt. If the tokenizer has no chat
        template, the contents of the messages are joined by newlines.
        """
        if isinstance(prompt, str):
            return self.tokenizer(prompt).input_ids
        if prompt and not isinstance(prompt[0], Mapping):
            size = self.model.config.get_text_config().vocab_size
            wrong = [token for token in prompt if not 0 <= token < size]  # pyright: ignore
            require(not wrong, "begin", "prompt", f"token ids in [0, {size})", f"{wrong[:3]}")
            return list(prompt)  # pyright: ignore[reportReturnType]
        from jinja2 import TemplateError

        messages: Any = prompt
        if self.tokenizer.chat_template is None:
            return self.tokenizer("\n".join(said["content"] for said in messages)).input_ids
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            return self.tokenizer(text, add_special_tokens=False).input_ids
        except (TemplateError, TypeError, KeyError) as error:
            words = f"begin: messages: the chat template does not accept the messages: {error}"
            raise ValueError(words) from None


# -------------------------------------------------------------------------------------------------
# Waiting for shared prompts. Requests whose prompts begin with the same tokens can share pages of
# keys and values, but only after these have been computed. If several such requests entered a batch
# together, each would compute the same pages. Later requests therefore wait here until the first
# request has its first token, and then use the pages of that request.
@dataclass(frozen=True)
class Asked:
    """Prompt tokens of a request, its adapter, and the position at which the adapter begins."""

    tokens: Sequence[int]
    adapter: tuple[Any, ...]  # names, weights and generations; empty for the base model
    start: int  # number of tokens that use the base model, before the adapter begins

    def shared(self, other: Asked, page: int) -> int:
        """Return the number of tokens in the pages that the two requests can share."""
        pairs = zip(self.tokens, other.tokens, strict=False)
        count = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if self.adapter != other.adapter:
            count = min(count, self.start, other.start)
        return count // page * page


class Ahead:
    """Prompts that a manager is computing or has computed.

    Args:
        page: number of tokens in a page of the cache.
        alive: function that returns whether the manager is running.
    """

    def __init__(self, page: int, alive: Callable[[], bool]):
        self._page, self._alive = page, alive
        self._reading: dict[Any, tuple[Asked, asyncio.Event]] = {}
        self._read: deque[Asked] = deque(maxlen=_MAX_READ_PROMPTS)

    async def wait(self, asked: Asked) -> None:
        """Wait while another request computes pages that this prompt can share."""
        while self._alive():
            known = max((asked.shared(other, self._page) for other in self._read), default=0)
            reading = self._reading.values()
            more = (event for other, event in reading if asked.shared(other, self._page) > known)
            if (first := next(more, None)) is None:
                return
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(first.wait(), _RECHECK_SECONDS)

    def begins(self, stream: Any, asked: Asked) -> None:
        """Record that the prompt of a stream is being computed."""
        self._reading[stream] = asked, asyncio.Event()

    def ends(self, stream: Any) -> None:
        """Record that a stream has its first token, or that it ended without a token."""
        if stream in self._reading:
            asked, event = self._reading.pop(stream)
            if stream.tokens:
                self._read.append(asked)
            event.set()


# -------------------------------------------------------------------------------------------------
# Waiting for room in the pool
@dataclass(eq=False)
class Turn:
    """Place of a request in the order of arrival."""

    name: Name | None
    number: int
    since: float = 0.0  # time at which the request began to wait for room
    again: asyncio.Event = field(default_factory=asyncio.Event)  # set if there may be room
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # set after success or failure


class Turns:
    """Order in which requests get room in a pool.

    A request without room waits until an adapter is unpinned, and then tries again. Meanwhile,
    requests for which there is room overtake it, but not after ``max_wait_s`` seconds.

    Args:
        max_wait_s: time in seconds for which later requests may overtake a waiting request.

    Attributes:
        freed: number of calls of :meth:`free`.
    """

    def __init__(self, max_wait_s: float):
        self.freed = 0
        self._max_wait_s, self._clock, self._numbers = max_wait_s, time.monotonic, itertools.count()
        self._waiting: list[Turn] = []  # in the order of arrival
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextlib.contextmanager
    def take(self, name: Name | None) -> Iterator[Turn]:
        """Yield a turn for a request with adapter ``name``; after the ``with`` block, wake requests
        that may have room then."""
        turn = Turn(name, next(self._numbers))
        try:
            yield turn
        finally:
            turn.gone.set()
            if turn in self._waiting:
                self._waiting.remove(turn)
                self.wake(1)
            for other in [each for each in self._waiting if each.name == name]:
                other.again.set()

    @property
    def names(self) -> list[Name | None]:
        """Adapter names of the requests that wait for room."""
        return [turn.name for turn in self._waiting]

    async def wait(self, turn: Turn) -> None:
        """Wait for earlier requests of other adapters that have waited ``max_wait_s`` for room."""
        while turn.name is not None:
            limit = self._clock() - self._max_wait_s
            first = next((other for other in self._waiting if other.since <= limit), turn)
            if first.number >= turn.number or first.name == turn.name:
                return
            await first.gone.wait()

    async def room(self, turn: Turn, freed: int) -> None:
        """Wait until there may be room for a request that has found no room.

        Args:
            turn: turn of the request.
            freed: value of :attr:`freed` before the request tried to get room.
        """
        self._loop = asyncio.get_running_loop()
        if turn not in self._waiting:
            turn.since = self._clock()
            bisect.insort(self._waiting, turn, key=lambda each: each.number)
        elif self.freed == freed:  # the request has tried again in vain; let the next one try
            for each in self._waiting[self._waiting.index(turn) + 1 :][:1]:
                each.again.set()
        if self.freed == freed:
            await turn.again.wait()
        turn.again.clear()

    def free(self) -> None:
        """Make the first waiting request try again. Any thread may call this method."""
        self.freed += 1
        if self._waiting and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                self._loop.call_soon_threadsafe(self.wake, 1)

    def wake(self, count: int | None = None) -> None:
        """Make the first ``count`` waiting requests try again; None means all."""
        for turn in self._waiting[:count]:
            turn.again.set()
