"""Continuous batching of transformers on an attached model, with one adapter per request.

The steps of a request:

1. ``add_request`` pins the adapter. The request uses this version of the adapter until it ends.
2. A step packs tokens of many requests into one row. A block around the step assigns an adapter to
   each token, and attention keeps the requests separate. Tokens before the start of an activated
   adapter (the position at which it begins) use the base model.
3. Requests share pages of keys and values. A page with tokens that an adapter has computed is
   shared only by requests with the same version of this adapter.
4. A request may have its own sampling and constraint (``_sampling.py``, ``_constraining.py``), and
   record log-probabilities. If it records those of the prompt, its steps also compute logits of
   prompt tokens, and it reads no shared pages, because shared pages have no logits.
5. The adapter is unpinned when the result is delivered or the request is cancelled.

The methods of a manager and of its objects are wrapped on the instances; no class is changed.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_ext._checks import renamed, require
from lora_ext.layers import requests_apart
from lora_ext.pool import Lease, PoolFullError, serials
from lora_ext.rows import Entry, Members, Names, _context, _entries, _generation, last_start

from ._constraining import (
    NO_LOGPROBS,
    RequestConstraint,
    Standing,
    constrained,
    drawn,
    limits_of,
    request_constraint,
)
from ._metrics import Load
from ._names import CallNames, NamedPrompt, named_prompts, not_invoked
from ._sampling import OVERFLOWS, Logprobs, Sampling, logprobs_of

if TYPE_CHECKING:
    from lora_ext.control import Constraint, Guide, Matched

_KEY = "_lora_ext_requests"  # attribute of a manager that contains its AdapterRequests
_FORK_SUFFIX = "__child#"  # transformers appends this and a number to the id of a forked request
_MARKED_TOKENS = 4  # number of marked tokens per page (`_marked_tokens`), and minimum page size
_NOT_GIVEN: Any = object()
_INIT = "init_continuous_batching"

_Method = Callable[..., Any]

#: Number of running managers of attached models in this process. Compiled forwards depend on it.
running_managers = 0
_managers_lock = threading.Lock()
_all: weakref.WeakSet[AdapterRequests] = weakref.WeakSet()


@dataclass
class _Request:
    """Request that was added and has not ended. Requests forked from it share this object.

    Attributes:
        members: the adapter, or the adapters of a mixture, with weights; empty for the base model.
        lease: lease that pins the adapter.
        start: number of tokens at the beginning of the prompt that use the base model.
        sampling, generator, constraint: how tokens are chosen; each is None if the request does not
            set it.
        processors: transformers' logits processors for the settings in ``sampling``.
        logprobs: record of log-probabilities, or None.
        cancelled: True after ``cancel_request``.
    """

    members: Members
    lease: Lease
    start: int = 0
    sampling: Sampling | None = None
    generator: torch.Generator | None = None
    processors: Any = None
    constraint: RequestConstraint | None = None
    logprobs: Logprobs | None = None
    cancelled: bool = False

    @property
    def generation(self) -> int | None:
        """Generation of the pinned adapter in the pool; None for the base model and a mixture."""
        return (self.lease.residents[0].generation or None) if self.lease.residents else None

    @property
    def version(self) -> int:
        """Number that identifies the pinned adapters' version and weights; 0 for the base model."""
        if not self.lease.residents:
            return 0
        serial = self.lease.residents[0].serial
        weights = tuple(weight for _, weight in self.members)
        return serial if {*weights} == {1.0} else weighted_serial(serial, weights)

    def runs(self, past: int, length: int) -> list[tuple[Members, int, int]]:
        """Split ``length`` tokens after the first ``past`` tokens into runs with one adapter each.

        A run is a triple: the adapters with their weights, the slot and the number of tokens.
        """
        base = max(0, min(length, self.start - past))
        parts = ((), -1, base), (self.members, self.lease[0], length - base)
        return [part for part in parts if part[2]]


class AdapterRequests:
    """Requests of one manager with their adapters, stored as an attribute of the manager.

    State: ``_requests`` maps ids to requests. It is guarded by the condition ``_unpinned``, which
    is notified when a request ends. Only the manager's thread uses the other attributes:
    ``_choosing`` lists the requests that get a new token in the current step, in the order of the
    step's logits. ``_constrained`` contains an entry for each of these that has a constraint.
    ``_processed`` contains (row, processors, tokens) for each of these that has processors.
    ``_reading`` has an entry for each prompt token whose log-probability is recorded: the record,
    the index in the step of the preceding token (whose logits predict this token), the position in
    the prompt, and the id. ``_last`` is the key of the last step (its runs) and the step's block.

    Args:
        manager: transformers' ``ContinuousBatchingManager`` of an attached model.
        names: object that chooses the adapter names of the model's calls.

    Attributes:
        computed: number of tokens computed so far, excluding tokens read from shared pages.
        paused: True between :meth:`pause` and :meth:`resume`.

    Raises:
        NotImplementedError: If the manager uses tensor parallelism or compiled steps, or if the
            installed version of transformers lacks a method that has to be wrapped.
    """

    def __init__(self, manager: Any, names: CallNames):
        config = manager.continuous_batching_config
        refused = {
            "tensor parallelism": manager.distributed_helper.tp_size > 1,
            "varlen_compile_config": config.varlen_compile_config is not None,
            "decode_compile_config": config.decode_compile_config is not None,
        }
        if found := [what for what, wanted in refused.items() if wanted]:
            if manager._original_attn_impl is not None:
                manager.model.set_attn_implementation(manager._original_attn_impl)
            raise NotImplementedError(
                f"{_INIT}: expected an attached model without {found[0]}, found one with it: the "
                "tokens of a step could not be assigned to their adapters"
            )
        # With either option, a step could run inside the `adapters` block of an earlier step.
        config.use_cuda_graph, config.use_async_batching = (False, False), False
        self.manager, self.names, self.pool = manager, names, names.pool
        self._requests: dict[str, _Request] = {}
        self._unpinned = threading.Condition(threading.RLock())
        self._last: tuple[Any, _context.Block] | None = None
        self._running = False
        self.computed = 0
        self.paused, self._held = False, threading.Event()
        self.freed: Callable[[], object] = int  # called when the last pin of an adapter is removed
        self._choosing: list[tuple[Any, _Request]] = []  # with the manager's states
        self._constrained: list[Standing] = []
        self._processed: list[tuple[int, Any, Tensor]] = []
        self._reading: list[tuple[Logprobs, int, int, int]] = []
        self._wrap(self._manager_methods())
        if manager.batch_processor is not None:
            self._wrap(self._processor_methods(manager.batch_processor))
        manager.__dict__[_KEY] = self
        _all.add(self)
        weakref.finalize(self, _unpin_all, self._requests).atexit = False

    # ---------------------------------------------------------------------------------------------
    # Wrapped methods: owner, name, and a function that receives the original and its arguments

    def _manager_methods(self) -> Iterator[tuple[Any, str, _Method]]:
        manager = self.manager
        for name in ("add_request", "add_requests", "cancel_request", "start", "stop"):
            yield manager, name, getattr(self, name)
        yield manager, "destroy", self.stop  # called even if the manager was never started
        yield manager, "_create_batch_processor", self._create_batch_processor
        yield manager, "_generation_step", self._generation_step
        yield manager.output_router, "deliver", self._deliver
        yield manager.output_router, "deliver_batch", self._deliver

    def _processor_methods(self, processor: Any) -> Iterator[tuple[Any, str, _Method]]:
        cache = processor.cache
        yield cache, "search_prefix_match", self._search_prefix_match
        yield cache, "mark_complete_blocks", self._mark_finished_blocks
        for allocator in cache.cache_allocators.values():
            yield allocator, "mark_complete_blocks", self._mark_complete_blocks
        yield processor.scheduler, "clear_cancelled_requests", self._clear_cancelled_requests
        yield processor.scheduler, "has_pending_requests", self._has_pending_requests
        yield processor.model_runner, "compute_batch", self._compute_batch
        yield processor.model_runner, "_sample", self._sample

    def _wrap(self, methods: Iterator[tuple[Any, str, _Method]]) -> None:
        for owner, name, wrapper in methods:
            original = getattr(owner, name, None)
            if original is None:
                import transformers

                self.remove()
                expected = f"a method {type(owner).__name__}.{name} as in transformers 5.24"
                found = f"none in transformers {transformers.__version__}"
                raise NotImplementedError(f"{_INIT}: expected {expected}, found {found}")
            owner.__dict__[name] = functools.partial(wrapper, original)

    def remove(self) -> None:
        """Restore the manager's methods, and unpin all adapters."""
        processor = self.manager.batch_processor
        methods = [*self._manager_methods()]
        methods += [] if processor is None else self._processor_methods(processor)
        for owner, name, _ in methods:
            owner.__dict__.pop(name, None)
        self.manager.__dict__.pop(_KEY, None)
        self._end_all()
        _all.discard(self)

    def _create_batch_processor(self, original: Callable[[], Any]) -> Any:
        processor = original()
        if "search_prefix_match" not in processor.cache.__dict__:
            self._wrap(self._processor_methods(processor))
        return processor

    # ---------------------------------------------------------------------------------------------
    # Start and end of requests

    def add_request(
        self,
        original: _Method,
        input_ids: Sequence[int],
        request_id: str | None = None,
        *args: Any,
        adapter_name: Entry = _NOT_GIVEN,
        sampling: Sampling | None = None,
        constraint: Constraint | Matched | None = None,
        guide: Guide | None = None,
        allow_base: bool = False,
        logprobs: Logprobs | None = None,
        pinned: Callable[[int | None, int], object] = lambda *_: None,
        **kwargs: Any,
    ) -> Any:
        """Pin the adapter of a request, and add the request with its sampling and constraint.

        With ``allow_base``, a prompt without the invocation of its activated adapter uses the base
        model. The log-probability of each new token under the model is appended to ``logprobs``.
        Before the request is added, ``pinned`` is called with the adapter's generation (None for
        the base model) and version. If the call raises, the request is not added.

        Raises:
            PoolFullError: If the pool has no room for the adapter.
            ValueError: If the prompt lacks the invocation, or another argument is invalid.
        """
        prompt = input_ids if isinstance(input_ids, NamedPrompt) else None
        alone = sampling is None or not self.manager.continuous_batching_config.return_logprobs
        require(alone, "add_request", "sampling", NO_LOGPROBS, sampling, NotImplementedError)
        if prompt is not None:
            adapter_name, allow_base = prompt.adapter, prompt.allow_base
        elif adapter_name is _NOT_GIVEN:
            (adapter_name,) = self.names.of_requests("add_request", None, 1)
        request_id = self._new_id() if request_id is None else request_id
        try:
            if len(input_ids) == 0:  # an error in the manager's thread would end all requests
                raise ValueError("add_request: input_ids: expected at least one token, found none")
            built = request_constraint(self.manager, constraint, guide, sampling, args, kwargs)
            tokens = list(map(int, input_ids))
            _, ends = limits_of(self.manager, args, kwargs)
            device = self.manager.model.device
            processors = sampling and sampling.processors(len(tokens), ends, device)
            lease = self._lease(adapter_name, wait=prompt is not None)
            request = self._started_request(adapter_name, lease, request_id, tokens, allow_base)
            request.sampling, request.constraint, request.logprobs = sampling, built, logprobs
            request.generator = sampling and sampling.generator(device)
            request.processors = processors
            with self._unpinned:
                if request_id in self._requests:
                    request.lease.__exit__()
                    raise ValueError(
                        "add_request: request_id: expected an id that is not in use, found "
                        f"{request_id!r}"
                    )
                self._requests[request_id] = request
            accepted = None
            try:
                pinned(request.generation, request.version)
                accepted = original(input_ids, request_id, *args, **kwargs)
            finally:
                if accepted is None:
                    self._end(request_id)
        except BaseException as error:
            if prompt is not None:
                prompt.errors.append(error)
            raise
        return accepted

    def add_requests(
        self,
        original: _Method,
        inputs: Sequence[Sequence[int]],
        *args: Any,
        adapter_names: Names = None,
        allow_base: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Add requests, each with an adapter name. While the pool is full, wait for room."""
        if not all(isinstance(prompt, NamedPrompt) for prompt in inputs):
            names = self.names.of_requests("add_requests", adapter_names, len(inputs))
            inputs = named_prompts(inputs, names, allow_base)
        return original(inputs, *args, **kwargs)

    def _new_id(self) -> str:
        """Return a new id in the form of the ids that the manager generates."""
        with self.manager._request_lock:
            self.manager._request_counter += 1
            return f"req_{self.manager._request_counter - 1}"

    def _lease(self, name: Entry, wait: bool) -> Lease:
        """Return a lease of an adapter; if ``wait``, wait for room in the pool if requests run."""
        with self._unpinned:
            while True:
                try:
                    with renamed("add_request", names="adapter_name"):
                        return self.pool.acquire([name])
                except PoolFullError:
                    if not (wait and self._requests and self.manager.is_running()):
                        raise
                self._unpinned.wait(1.0)

    def _started_request(
        self, name: Entry, lease: Lease, request_id: str, prompt: list[int], allow_base: bool
    ) -> _Request:
        """Return a request that owns the lease, with the start of its adapter in the prompt.

        The start is 0 for an ordinary adapter. For an activated adapter it is the position of the
        last occurrence of the adapter's invocation. If the prompt does not contain the invocation,
        the adapter is unpinned, and with ``allow_base`` the request uses the base model.

        Raises:
            ValueError: If the prompt has no invocation and ``allow_base`` is False.
        """
        # The lease has at most one invocation, which is empty for an ordinary adapter.
        members = _entries.members_of(name, "add_request: adapter_name")
        for invocation in filter(None, lease.invocations):
            (start,) = last_start(torch.tensor([prompt]), invocation)
            if start is not None:
                return _Request(members, lease, start)
            lease.__exit__()
            if not allow_base:
                raise not_invoked(f"add_request: request {request_id!r}", name, invocation)
            return _Request((), self.pool.acquire([None]))
        return _Request(members, lease)

    def _end(self, request_id: str) -> None:
        """Unpin a request's adapter, unless another fork of the request is still running."""
        with self._unpinned:
            root = self._root_id(request_id)
            if root not in self._requests:
                return
            processor = self.manager.batch_processor
            if self.manager.num_return_sequences != 1 and processor is not None:
                scheduler = processor.scheduler
                others = {*scheduler.active_requests, *scheduler.waiting_requests} - {request_id}
                if any(self._root_id(other) == root for other in others):
                    return
            lease = self._requests.pop(root).lease
            lease.__exit__()
            self._unpinned.notify_all()
        if not all(resident.pins for resident in lease.residents):
            self.freed()

    def _root_id(self, request_id: str) -> str:
        """Return the id of the request from which ``request_id`` was forked, or ``request_id``."""
        known = request_id in self._requests
        return request_id if known else request_id.rpartition(_FORK_SUFFIX)[0]

    def _end_all(self) -> None:
        with self._unpinned:
            _unpin_all(self._requests)
            self._unpinned.notify_all()
        self.freed()

    def _deliver(self, original: _Method, outputs: Any) -> None:
        for output in outputs if isinstance(outputs, list) else [outputs]:  # one, or a batch
            if output.is_finished():
                self._end(output.request_id)
        original(outputs)

    def cancel_request(self, original: Callable[[str], None], request_id: str) -> None:
        """Cancel a request, even if the manager has not read it yet."""
        with self._unpinned:
            if request_id in self._requests:
                self._requests[request_id].cancelled = True
        original(request_id)

    def _clear_cancelled_requests(self, original: Callable[[], list[Any]]) -> list[Any]:
        with self._unpinned:  # the manager ignored cancellations of requests it had not read yet
            again = [each for each, request in self._requests.items() if request.cancelled]
        for request_id in again:
            self.manager.batch_processor.scheduler.set_request_cancellation(request_id)
        cancelled = original()
        for state in cancelled:
            self._end(state.request_id)
        return cancelled

    def start(self, original: Callable[[], None]) -> None:
        """Start the manager."""
        original()
        self._count_as(running=True)

    def stop(self, original: _Method, *args: Any, **kwargs: Any) -> None:
        """Stop or destroy the manager; if it is no longer running, unpin all adapters."""
        original(*args, **kwargs)
        if not self.manager.is_running():
            self._count_as(running=False)
            self._end_all()

    def _count_as(self, running: bool) -> None:
        global running_managers
        with _managers_lock:
            running_managers += running - self._running
            self._running = running

    # ---------------------------------------------------------------------------------------------
    # Pauses: the manager still adds and cancels requests, but computes no step

    def pause(self) -> None:
        """Wait for the end of the current step; no other step is computed until :meth:`resume`."""
        self._held.clear()
        self.paused = True
        self.manager._wake_up_loop.set()
        while self.paused and self.manager.is_running() and not self._held.wait(0.1):
            pass

    def resume(self) -> None:
        """End a pause; do nothing if the manager is not paused."""
        self.paused = False
        self.manager._wake_up_loop.set()

    def _has_pending_requests(self, original: Callable[[], bool]) -> bool:
        if self.paused:  # the manager's thread calls this method between two steps
            self._held.set()
            return False
        return original()

    # ---------------------------------------------------------------------------------------------
    # Steps

    def _generation_step(self, original: Callable[[], None]) -> None:
        processor, model = self.manager.batch_processor, self.manager.model
        batch = processor.inputs_and_outputs.requests_in_batch
        runs: list[tuple[Members, int, int]] = []
        ends: list[int] = []
        self._choosing = []
        self._constrained = []
        self._processed = []
        self._reading = []
        read_runs: list[int] = []  # the run of each preceding token in _reading
        count = 0
        for each in batch:
            request = self._request(each.state.request_id)
            # The manager has already added this step's tokens to the offset.
            past = each.state.position_offset - each.query_length
            first = len(runs)
            runs += request.runs(past, each.query_length)
            ends.append(len(runs) - 1)
            record, tokens = request.logprobs, each.state.initial_tokens
            if record is not None and record.prompt_top is not None:
                # The prompt of a preempted request ends with tokens that were generated before.
                length = each.state._true_initial_tokens or len(tokens)
                for i in range(past, min(past + each.query_length, length - 1)):
                    if i + 1 not in record.prompt:
                        self._reading.append((record, count + i - past, i + 1, int(tokens[i + 1])))
                        read_runs.append(first if i < request.start else ends[-1])
            count += each.query_length
            if each.has_new_token:
                if request.processors:
                    ids = torch.tensor([tokens + each.state.generated_tokens])
                    self._processed.append((len(self._choosing), request.processors, ids))
                if request.constraint is not None:
                    sampling = request.sampling
                    standing = Standing(
                        place=len(self._choosing),
                        row=request.constraint.row(each.state),
                        temperature=request.constraint.temperature,
                        whole=sampling is not None and sampling.draws_from_all,
                        generator=request.generator,
                    )
                    self._constrained.append(standing)
                self._choosing.append((each.state, request))
        kept = None  # the run of each token that the head receives; None: it receives all tokens
        if processor.model_runner.supports_logits_to_keep(model):
            kept = [end for end, each in zip(ends, batch, strict=True) if each.has_new_token]
            # The input of the head has one token per request of the batch. transformers pads this
            # input with the first token of the row, and ignores the logits of the padding.
            kept += ends[:1] * (len(batch) - len(kept)) + read_runs
        key = runs, kept
        if self._last is None or self._last[0] != key:  # consecutive decode steps have equal keys
            pool = self.names.handle, self.pool.max_slots
            self._last = key, _generation.packed_block(*pool, runs, kept)
        self.computed += count
        with _context.entered(self._last[1]), requests_apart():
            original()

    def _compute_batch(self, original: _Method, model: Any, batch_data: dict[str, Any]) -> None:
        """Compute the logits of the new tokens, followed by those of recorded prompt tokens."""
        if self._reading:
            places = batch_data["logits_indices"]
            more = places.new_tensor([row for _, row, _, _ in self._reading])
            batch_data["logits_indices"] = torch.cat([places, more])
        original(model, batch_data)

    def _sample(
        self, original: Callable[..., None], logits: Tensor, output_ids: Tensor, *args: Any
    ) -> None:
        scores = logits[:, : logits.shape[1] - len(self._reading)]
        if self._processed:
            scores = scores.clone()
            for row, processors, ids in self._processed:
                scores[0, row] = processors(ids.to(scores.device), scores[0, row : row + 1])[0]
        apart, left = drawn(scores, self._constrained)
        masked = constrained(scores, left)
        original(masked, output_ids, *args)
        for row, (_, request) in enumerate(self._choosing):
            if row in apart:
                output_ids[0, row] = apart[row]
            elif request.sampling is not None:
                output_ids[0, row] = request.sampling.draw(masked[0, row], request.generator)
        finite = logits[0, : len(self._choosing)].amax(-1).isfinite().tolist()
        for (state, request), good in zip(self._choosing, finite, strict=True):
            if not good:
                name = _entries.name_of(request.members)
                state.error = f"model: {OVERFLOWS} with adapter {name!r:.200}"
        self._record(logits[0], output_ids[0])

    def _record(self, logits: Tensor, output_ids: Tensor) -> None:
        """Record the log-probabilities of a step's new tokens and prompt tokens."""
        records = [request.logprobs for _, request in self._choosing]
        new = {i: each for i, each in enumerate(records) if each and each.top is not None}
        read = self._reading
        rows = [*new, *range(len(logits) - len(read), len(logits))]
        if not rows:
            return
        tokens = output_ids[list(new)].tolist() + [token for _, _, _, token in read]
        tops = [each.top for each in new.values()] + [record.prompt_top for record, *_ in read]
        found = iter(logprobs_of(logits, rows, tokens, max(filter(None, tops), default=0)))
        for record, entry in zip(new.values(), found, strict=False):
            record.tokens.append(entry._replace(top=entry.top[: record.top]))
        for (record, _, position, _), entry in zip(read, found, strict=True):
            record.prompt[position] = entry

    def _request(self, request_id: str) -> _Request:
        with self._unpinned:
            return self._requests[self._root_id(request_id)]

    # ---------------------------------------------------------------------------------------------
    # Shared pages: the manager finds them by a hash of their tokens and of all previous tokens

    def _search_prefix_match(
        self, original: Callable[..., int], request_id: str, prompt_ids: list[int]
    ) -> int:
        logprobs = self._request(request_id).logprobs
        if logprobs is not None and logprobs.prompt_top is not None:
            return 0  # shared pages have no logits
        return original(request_id, self._marked_tokens(request_id, prompt_ids))

    def _mark_complete_blocks(
        self, original: Callable[..., None], request_id: str, token_ids: list[int], *args: Any
    ) -> None:
        original(request_id, self._marked_tokens(request_id, token_ids), *args)

    def _mark_finished_blocks(
        self, original: Callable[..., None], state: Any, complete_blocks: dict[str, int]
    ) -> None:
        """Let later requests share the pages (keys and values) of a request's last step, too.

        The manager itself does not share these pages, because its steps may overlap. With adapters,
        steps never overlap.
        """
        cache = self.manager.batch_processor.cache
        if state.status.name != "FINISHED" or not cache.allow_block_sharing:
            return original(state, complete_blocks)
        tokens = state.initial_tokens + state.generated_tokens
        for name, count in (complete_blocks or {}).items():
            if state.request_id in cache.cache_allocators[name].block_table:
                cache.cache_allocators[name].mark_complete_blocks(state.request_id, tokens, count)
        return None

    def _marked_tokens(self, request_id: str, tokens: list[int]) -> list[int]:
        """Return a request's tokens, marked with its adapter, for the lookup of shared pages.

        The manager lets requests with equal tokens share pages. A page with keys and values of an
        adapter must be shared only by requests with the same version and the same start of the
        adapter. These two numbers are combined into one number, the mark. The bits of the mark are
        written to the first tokens of the page in which the adapter begins, above the bits that
        token ids use. Earlier pages are computed by the base model and are not marked. Later pages
        need no mark, as their hash covers all tokens before them.

        If the mark has more bits than are free in these tokens, only the tokens before this page
        are returned, so only pages of the base model are shared.
        """
        request, result = self._request(request_id), list(tokens)
        caches = self.manager.batch_processor.cache.cache_allocators.values()
        size = min(cache.tokens_per_page for cache in caches)
        page = request.start // size * size
        if request.version == 0 or len(result) < page + _MARKED_TOKENS:
            return result  # the base model, or an incomplete page, which is never shared
        bits = (self.manager.model.config.get_text_config().vocab_size - 1).bit_length()
        mark = request.version * size + request.start % size
        for i in range(page, page + _MARKED_TOKENS):
            mark, digit = divmod(mark, 1 << (31 - bits))  # keeps marked tokens below 2^31
            result[i] = int(result[i]) + (digit << bits)  # int: += would change a tensor in place
        return result[:page] if mark else result

    @property
    def unfinished(self) -> int:
        """Number of waiting and running requests, each of which pins its adapter."""
        return len(self._requests)

    def pins_adapters(self) -> bool:
        """Return whether a waiting or running request pins an adapter."""
        with self._unpinned:
            return any(request.lease.residents for request in self._requests.values())

    def load(self, most_adapters: int) -> Load:
        """Return the load of the manager; ``most_adapters`` is copied to the result."""
        processor = self.manager.batch_processor
        active = list(processor.scheduler.active_requests) if processor is not None else []
        with self._unpinned:
            running = {self._root_id(each) for each in active}
            names = {k: _entries.name_of(each.members) for k, each in self._requests.items()}
        share = 0.0
        if processor is not None:
            cache = processor.cache
            # Cached pages that no request uses are not counted, because they can be overwritten.
            allocators = cache.cache_allocators.values()
            kept = sum(len(each.ledger.cached_blocks) * each.bytes_per_block for each in allocators)
            total = cache.num_sectors * cache.bytes_per_sector
            share = max(0, total - cache.compute_free_capacity(relative=False) - kept) / total
        return Load(
            running=[name for each, name in names.items() if each in running],
            waiting=[name for each, name in names.items() if each not in running],
            most_adapters=most_adapters,
            cache=share,
        )


@functools.lru_cache(4096)
def weighted_serial(serial: int, weights: tuple[float, ...]) -> int:
    """Return a number that identifies an adapter or mixture with these weights.

    The number differs from all serial numbers of adapters. If the cache has dropped it, later
    requests with the same weights get a new number and share no pages with earlier requests.
    """
    return next(serials)


def _unpin_all(requests: dict[str, _Request]) -> None:
    while requests:
        requests.popitem()[1].lease.__exit__()


def add_adapters_to(manager: Any, names: CallNames) -> None:
    """Make an attached model's manager support adapters per request; later calls do nothing."""
    if _KEY not in manager.__dict__:
        AdapterRequests(manager, names)


def adapter_requests(manager: Any) -> AdapterRequests:
    """Return the :class:`AdapterRequests` of an attached model's manager."""
    return manager.__dict__[_KEY]


def requests_of(model: nn.Module) -> list[AdapterRequests]:
    """Return the :class:`AdapterRequests` of all managers of a model and of its submodules."""
    parts = set(model.modules())
    return [requests for requests in list(_all) if requests.manager.model in parts]
