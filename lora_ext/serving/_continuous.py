"""Continuous batching of transformers on an attached model: every request has its adapter.

The way of a request:

1. ``add_request`` pins its adapter; the version that is there is the one that it ends with.
2. A step packs tokens of many requests into one row; a block around it says whose each token is,
   and attention takes them apart again. What an activated adapter's request has before its start
   is the base model's.
3. Blocks of keys and values that requests share are told apart by adapter, from its start on.
4. A request may choose its tokens in a way of its own (``_sampling.py``, ``_constraining.py``).
5. The pin goes when the result is delivered, or the request is cancelled.

Methods of a manager, and of what it makes, are wrapped on the instance; no class is touched.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_ext.layers import requests_apart
from lora_ext.pool import Lease, PoolFullError
from lora_ext.rows import Names, _context, last_start, packed_block

from ._constraining import (
    RequestConstraint,
    Standing,
    constrained,
    drawn,
    request_constraint,
    standing,
)
from ._metrics import Load
from ._names import CallNames, NamedPrompt, named_prompts, not_invoked
from ._sampling import Sampling

if TYPE_CHECKING:
    from lora_ext.control import Constraint, Guide, Matched

_OWN = "_lora_ext_requests"
_CHILD = "__child#"  # what transformers appends to the id of a request that it forks
_DIGITS = 4  # tokens that carry an adapter's number; a page holds at least as many
_NOT_GIVEN: Any = object()

#: Managers of attached models that run. Compiled forwards are guarded by it.
managers = 0
_count = threading.Lock()
_all: weakref.WeakSet[AdapterRequests] = weakref.WeakSet()


@dataclass
class _Request:
    name: str | None
    lease: Lease
    start: int = 0  # tokens before it are the base model's
    sampling: Sampling | None = None
    generator: torch.Generator | None = None
    constraint: RequestConstraint | None = None
    logprobs: list[float] | None = None
    cancelled: bool = False

    @property
    def number(self) -> int:
        """Of the adapter's version; 0 is the base model."""
        return self.lease.residents[0].serial if self.lease.residents else 0

    def runs(self, past: int, length: int) -> list[tuple[str | None, int, int]]:
        """Name, slot and number of the tokens of a step, ``length`` of them after ``past``."""
        base = max(0, min(length, self.start - past))
        parts = (None, -1, base), (self.name, self.lease[0], length - base)
        return [part for part in parts if part[2]]


class AdapterRequests:
    """The adapters of a manager's requests.

    Args:
        manager: transformers' ``ContinuousBatchingManager`` of an attached model.
        names: of the calls of the model.

    Raises:
        NotImplementedError: tensor parallelism, compiled steps, or a transformers whose manager is
            another one.
    """

    def __init__(self, manager: Any, names: CallNames):
        self.manager, self.names, self.pool = manager, names, names.pool
        self._requests: dict[str, _Request] = {}
        self._freed = threading.Condition(threading.RLock())
        self._last: tuple[Any, _context.Block] | None = None  # the block of the last step
        self._running = False
        self.computed = 0  # tokens that steps have read, shared ones not counted
        self._drawing: list[tuple[int, _Request]] = []  # rows of the step's logits, and whose
        self._telling: list[tuple[int, _Request]] = []  # likewise, of those that want to know
        self._constrained: list[Standing] = []
        self._wrapped: list[tuple[Any, str]] = []
        self._wrapped_in_processor: list[tuple[Any, str]] = []
        _check_settings(manager)
        own = self._wrapped
        for name in ("add_request", "add_requests", "cancel_request", "start", "stop", "destroy"):
            self._wrap(own, manager, name, getattr(self, name))
        self._wrap(own, manager, "_create_batch_processor", self._create_batch_processor)
        self._wrap(own, manager, "_generation_step", self._step)
        for name in ("deliver", "deliver_batch"):
            self._wrap(own, manager.output_router, name, self._deliver)
        if manager.batch_processor is not None:
            self._watch(manager.batch_processor)
        manager.__dict__[_OWN] = self
        _all.add(self)
        weakref.finalize(self, _release, self._requests).atexit = False

    def remove(self) -> None:
        """Give the manager its own methods back."""
        for thing, name in (*self._wrapped, *self._wrapped_in_processor):
            thing.__dict__.pop(name, None)
        self.manager.__dict__.pop(_OWN, None)
        self._release_all()
        _all.discard(self)

    def _wrap(
        self, done: list[tuple[Any, str]], thing: Any, name: str, wrapper: Callable[..., Any]
    ) -> None:
        original = getattr(thing, name, None)
        if original is None:
            import transformers

            self.remove()
            raise NotImplementedError(
                f"init_continuous_batching: expected {type(thing).__name__}.{name} as in "
                f"transformers 5.24, found none in {transformers.__version__}"
            )
        thing.__dict__[name] = functools.partial(wrapper, original)
        done.append((thing, name))

    # ---------------------------------------------------------------------------------------------
    # Requests come and go

    def add_request(
        self,
        original: Callable[..., Any],
        input_ids: Sequence[int],
        request_id: str | None = None,
        *args: Any,
        adapter_name: str | None = _NOT_GIVEN,
        sampling: Sampling | None = None,
        constraint: Constraint | Matched | None = None,
        guide: Guide | None = None,
        allow_base: bool = False,
        logprobs: list[float] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The manager's own, with a pinned adapter and a way and constraint of its own for tokens.

        A pool without room raises :class:`~lora_ext.pool.PoolFullError`, and a prompt without the
        invocation of its activated adapter ValueError, unless ``allow_base``: then the base model
        serves it. ``logprobs`` is given the log-probability of each new token under the model,
        whatever way it was chosen in.
        """
        prompt = input_ids if isinstance(input_ids, NamedPrompt) else None
        if sampling is not None and self.manager.continuous_batching_config.return_logprobs:
            raise NotImplementedError(
                "add_request: sampling: expected None beside return_logprobs, which tells the "
                f"probabilities of the manager's own tokens, found {sampling}"
            )
        if prompt is not None:
            adapter_name, allow_base = prompt.adapter, prompt.allow_base
        elif adapter_name is _NOT_GIVEN:
            (adapter_name,) = self.names.of_requests("add_request", None, 1)
        if request_id is None:
            with self.manager._request_lock:
                request_id = f"req_{self.manager._request_counter}"
                self.manager._request_counter += 1
        try:
            if len(input_ids) == 0:  # it would end the thread that serves all others
                raise ValueError("add_request: input_ids: expected at least one token, found none")
            own = request_constraint(self.manager, constraint, guide, sampling, args, kwargs)
            request = self._pinned(adapter_name, wait=prompt is not None)
            begun = self._begun(request, request_id, list(map(int, input_ids)), allow_base)
            begun.sampling, begun.constraint, begun.logprobs = sampling, own, logprobs
            begun.generator = sampling and sampling.generator(self.manager.model.device)
            self._begin(request_id, begun)
            try:
                accepted = original(input_ids, request_id, *args, **kwargs)
            except BaseException:
                self._end(request_id)
                raise
        except BaseException as error:
            if prompt is not None:
                prompt.errors.append(error)
            raise
        if accepted is None:
            self._end(request_id)
        return accepted

    def add_requests(
        self,
        original: Callable[..., Any],
        inputs: Sequence[Sequence[int]],
        *args: Any,
        adapter_names: Names = None,
        allow_base: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The manager's own, a name per request. Where the pool is full it waits for requests that
        run."""
        if not all(isinstance(prompt, NamedPrompt) for prompt in inputs):
            names = self.names.of_requests("add_requests", adapter_names, len(inputs))
            inputs = named_prompts(inputs, names, allow_base)
        return original(inputs, *args, **kwargs)

    def _pinned(self, name: str | None, wait: bool) -> _Request:
        """A request with its adapter pinned; ``wait``: for room in the pool, while others run."""
        with self._freed:
            while True:
                try:
                    return _Request(name, self.pool.acquire([name]))
                except PoolFullError:
                    if not (wait and self._requests and self.manager.is_running()):
                        raise
                self._freed.wait(1.0)

    def _begun(
        self, request: _Request, request_id: str, prompt: list[int], allow_base: bool
    ) -> _Request:
        """The same with its start; or one of the base model, for a prompt without invocation.

        Raises:
            ValueError: no invocation, and the base model is not to serve it.
        """
        for invocation in filter(None, request.lease.invocations):
            (start,) = last_start(torch.tensor([prompt]), invocation)
            if start is not None:
                request.start = start
                continue
            request.lease.__exit__()
            if not allow_base:
                raise not_invoked(f"add_request: request {request_id!r}", request.name, invocation)
            return _Request(None, self.pool.acquire([None]))
        return request

    def _begin(self, request_id: str, request: _Request) -> None:
        with self._freed:
            if request_id in self._requests:
                request.lease.__exit__()
                raise ValueError(
                    "add_request: request_id: expected one that is not in use, found "
                    f"{request_id!r}"
                )
            self._requests[request_id] = request

    def _end(self, request_id: str) -> None:
        with self._freed:
            first = self._first(request_id)
            if first not in self._requests or self._has_others(first, request_id):
                return
            self._requests.pop(first).lease.__exit__()
            self._freed.notify_all()

    def _first(self, request_id: str) -> str:
        """The request that was forked into this one."""
        return request_id if request_id in self._requests else request_id.rpartition(_CHILD)[0]

    def _has_others(self, first: str, request_id: str) -> bool:
        processor = self.manager.batch_processor
        if self.manager.num_return_sequences == 1 or processor is None:
            return False
        scheduler = processor.scheduler
        known = {*scheduler.active_requests, *scheduler.waiting_requests} - {request_id}
        return any(self._first(other) == first for other in known)

    def _release_all(self) -> None:
        with self._freed:
            _release(self._requests)
            self._freed.notify_all()

    def _deliver(self, original: Callable[..., Any], outputs: Any) -> None:
        for output in outputs if isinstance(outputs, list) else [outputs]:  # of deliver_batch
            if output.is_finished():
                self._end(output.request_id)
        original(outputs)

    def cancel_request(self, original: Callable[[str], None], request_id: str) -> None:
        """The manager's own."""
        with self._freed:
            if request_id in self._requests:
                self._requests[request_id].cancelled = True
        original(request_id)

    def _clear_cancelled_requests(self, original: Callable[[], list[Any]]) -> list[Any]:
        with self._freed:  # the loop forgets a cancellation that is there before its request
            again = [each for each, request in self._requests.items() if request.cancelled]
        for request_id in again:
            self.manager.batch_processor.scheduler.set_request_cancellation(request_id)
        cancelled = original()
        for state in cancelled:
            self._end(state.request_id)
        return cancelled

    def start(self, original: Callable[[], None]) -> None:
        """The manager's own."""
        original()
        self._runs(True)

    def _runs(self, now: bool) -> None:
        global managers
        with _count:
            managers += now - self._running
            self._running = now

    def stop(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """The manager's own; requests that it has forgotten are pinned no more."""
        original(*args, **kwargs)
        if not self.manager.is_running():
            self._runs(False)
            self._release_all()
        if self.manager.batch_processor is None:
            self._wrapped_in_processor.clear()

    def destroy(self, original: Callable[[], None]) -> None:
        """The manager's own, which does not stop a manager that was never started."""
        original()
        if not self.manager.is_running():
            self._release_all()

    # ---------------------------------------------------------------------------------------------
    # Steps

    def _create_batch_processor(self, original: Callable[[], Any]) -> Any:
        processor = original()
        self._watch(processor)
        return processor

    def _watch(self, processor: Any) -> None:
        if (processor.cache, "search_prefix_match") in self._wrapped_in_processor:
            return
        own = self._wrapped_in_processor = []
        self._wrap(own, processor.cache, "search_prefix_match", self._search_prefix_match)
        self._wrap(own, processor.cache, "mark_complete_blocks", self._mark_finished)
        for allocator in processor.cache.cache_allocators.values():
            self._wrap(own, allocator, "mark_complete_blocks", self._mark_complete_blocks)
        scheduler = processor.scheduler
        self._wrap(own, scheduler, "clear_cancelled_requests", self._clear_cancelled_requests)
        self._wrap(own, processor.model_runner, "_sample", self._sample)

    def _step(self, original: Callable[[], None]) -> None:
        processor, model = self.manager.batch_processor, self.manager.model
        batch = processor.inputs_and_outputs.requests_in_batch
        kept = None
        if processor.model_runner.supports_logits_to_keep(model):
            kept = [i for i, request in enumerate(batch) if request.has_new_token]
            kept += [0] * (len(batch) - len(kept))  # transformers reads the first token for them
        requests = [self._request(each.state.request_id) for each in batch]
        new = [request for request, each in zip(requests, batch, strict=True) if each.has_new_token]
        self._drawing = [(row, each) for row, each in enumerate(new) if each.sampling is not None]
        self._telling = [(row, each) for row, each in enumerate(new) if each.logprobs is not None]
        self._constrained = standing([e.state for e in batch if e.has_new_token], new)
        runs, ends = [], []
        for request, each in zip(requests, batch, strict=True):
            past = each.state.position_offset - each.query_length  # it has been advanced already
            runs += request.runs(past, each.query_length)
            ends.append(len(runs) - 1)
        kept = None if kept is None else [ends[i] for i in kept]
        key = runs, kept
        if self._last is None or self._last[0] != key:  # decoding asks for the same rows again
            names, slots, lengths = zip(*runs, strict=True)
            block = packed_block(
                self.names.handle, self.pool.max_slots, names, slots, lengths, kept
            )
            self._last = key, block
        self.computed += sum(each.query_length for each in batch)
        with _context.entered(self._last[1]), requests_apart():
            original()

    def _sample(
        self, original: Callable[..., None], scores: Tensor, output_ids: Tensor, *args: Any
    ) -> None:
        told = scores
        apart, left = drawn(scores, self._constrained)
        scores = constrained(scores, left)
        original(scores, output_ids, *args)
        for row, request in self._drawing:
            assert request.sampling is not None
            if row in apart:
                output_ids[0, row] = apart[row]
            else:
                output_ids[0, row] = request.sampling.draw(scores[0, row], request.generator)
        for row, request in self._telling:
            assert request.logprobs is not None
            logprobs = told[0, row : row + 1].float().log_softmax(-1)
            request.logprobs.append(float(logprobs[0, output_ids[0, row]]))

    def _request(self, request_id: str) -> _Request:
        with self._freed:
            return self._requests[self._first(request_id)]

    # ---------------------------------------------------------------------------------------------
    # Shared prefixes

    def _search_prefix_match(
        self, original: Callable[..., int], request_id: str, prompt_ids: list[int]
    ) -> int:
        return original(request_id, self._marked(request_id, prompt_ids))

    def _mark_complete_blocks(
        self, original: Callable[..., None], request_id: str, token_ids: list[int], *args: Any
    ) -> None:
        original(request_id, self._marked(request_id, token_ids), *args)

    def _mark_finished(
        self, original: Callable[..., None], state: Any, complete_blocks: dict[str, int]
    ) -> None:
        """The manager's own, and also of the step in which a request ends: it passes that over for
        the sake of steps that overlap, which ours do not."""
        cache = self.manager.batch_processor.cache
        if state.status.name != "FINISHED" or not cache.allow_block_sharing:
            return original(state, complete_blocks)
        tokens = state.initial_tokens + state.generated_tokens
        for name, count in (complete_blocks or {}).items():
            if state.request_id in cache.cache_allocators[name].block_table:
                cache.cache_allocators[name].mark_complete_blocks(state.request_id, tokens, count)
        return None

    def _marked(self, request_id: str, tokens: list[int]) -> list[int]:
        """A prompt's tokens with a mark in bits that no token has, as a page is found by a hash of
        its tokens and of those before. The mark lies in the page in which the adapter begins, and
        tells its version and the place: equal tokens of that page may begin at different ones.
        Where it has no room, the tokens before that page, which are the base model's."""
        request, result = self._request(request_id), list(tokens)
        caches = self.manager.batch_processor.cache.cache_allocators.values()
        size = min(cache.tokens_per_page for cache in caches)
        page = request.start // size * size
        if request.number == 0 or len(result) < page + _DIGITS:
            return result  # the page, if there is one, is not complete
        bits = (self.manager.model.config.get_text_config().vocab_size - 1).bit_length()
        number = request.number * size + request.start % size
        for i in range(page, page + _DIGITS):
            number, digit = divmod(number, 1 << (31 - bits))
            result[i] = int(result[i]) + (digit << bits)  # a tensor would change in place
        return result[:page] if number else result


def _release(requests: dict[str, _Request]) -> None:
    """Unpin them; also those of a manager that is gone."""
    while requests:
        requests.popitem()[1].lease.__exit__()


def follow(manager: Any, names: CallNames) -> None:
    """Give a manager of an attached model adapters for its requests, once."""
    if _OWN not in manager.__dict__:
        AdapterRequests(manager, names)


def _check_settings(manager: Any) -> None:
    """Refuse what would run a step without its block; switch off what would replay an old one."""
    config = manager.continuous_batching_config
    refused = {
        "tensor parallelism": manager.distributed_helper.tp_size > 1,
        "varlen_compile_config": config.varlen_compile_config is not None,
        "decode_compile_config": config.decode_compile_config is not None,
    }
    for what, found in refused.items():
        if found:
            if manager._original_attn_impl is not None:
                manager.model.set_attn_implementation(manager._original_attn_impl)
            raise NotImplementedError(
                f"init_continuous_batching: expected an attached model without {what}, found it: "
                "the rows of a step would not find their adapters"
            )
    config.use_cuda_graph, config.use_async_batching = (False, False), False


def unfinished(manager: Any) -> int:
    """How many requests of an attached model's manager wait or run: each pins its adapter."""
    return len(manager.__dict__[_OWN]._requests)


def load_of(manager: Any) -> Load:
    """What an attached model's manager has to do."""
    own: AdapterRequests = manager.__dict__[_OWN]
    processor = manager.batch_processor
    active = list(processor.scheduler.active_requests) if processor is not None else []
    with own._freed:
        running = {own._first(each) for each in active}
        names = {each: request.name for each, request in own._requests.items()}
    return Load(
        running=[name for each, name in names.items() if each in running],
        waiting=[name for each, name in names.items() if each not in running],
        most_adapters=own.pool.max_slots,
        cache=0.0 if processor is None else _used_share(processor.cache),
    )


def _used_share(cache: Any) -> float:
    """Return the share of a cache that requests hold.

    Pages that are kept for later requests with the same prefix do not count, because any other
    request can replace them.
    """
    allocators = cache.cache_allocators.values()
    kept = sum(len(each.ledger.cached_blocks) * each.bytes_per_block for each in allocators)
    total = cache.num_sectors * cache.bytes_per_sector
    return max(0, total - cache.compute_free_capacity(relative=False) - kept) / total


def computed_tokens(manager: Any) -> int:
    """How many tokens the steps of an attached model's manager have read so far; those of pages
    that were there already are not among them."""
    return manager.__dict__[_OWN].computed


def requests_of(model: nn.Module) -> list[AdapterRequests]:
    """Those of the managers that a model, or a part of it, has."""
    parts = set(model.modules())
    return [requests for requests in list(_all) if requests.manager.model in parts]
