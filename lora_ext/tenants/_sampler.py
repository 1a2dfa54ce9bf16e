"""Sampling from the adapters of tenants.

A second copy of the model's modules shares the weights of the trained model and is attached to an
adapter pool. Training and sampling therefore do not change each other's layers.
"""

from __future__ import annotations

import bisect
import copy
import functools
import math
import secrets
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import integer, renamed, require
from lora_ext.layers import LoraLayer, unwrap
from lora_ext.pool import AdapterPool, UnknownAdapterError
from lora_ext.rows import of_call
from lora_ext.serving import Logprobs, QueueFullError, Sampling, attach

from ._data import checked_tokens

MAX_RANK = 512  # maximum rank of the pool's adapters; pages without an adapter take no memory
_MOST = 1024  # maximum number of waiting samples of one adapter
_TRIES = 8  # attempts to load an adapter, since another load may evict it before it is used
_ERROR = "Sampler.sample"


@dataclass(frozen=True)
class Sample:
    """Sampled continuation of a prompt.

    Args:
        tokens: sampled tokens, including the end token if one was sampled.
        logprobs: log-probability of each sampled token under the model's distribution at
            temperature 1, without top-k or top-p.
        stop_reason: "stop" if an end token, or a token or text of ``stop``, ended the sample;
            "length" if ``max_tokens`` did.
    """

    tokens: list[int]
    logprobs: list[float]
    stop_reason: str


@dataclass(eq=False)
class _Asked:
    """Pending request to transformers' manager of continuous batching."""

    adapter: str | None
    future: Future[Any] = field(default_factory=Future)
    logprobs: Logprobs = field(default_factory=Logprobs)


class SamplingModel:
    """Second copy of the base model's modules, with the same weights, attached to a pool.

    The copy runs transformers' continuous batching.

    Args:
        model: base model of the service.
        context: maximum number of tokens of a prompt and its answer.
        max_adapters: maximum number of adapters in the pool.
        tokenizer: tokenizer that finds stop texts in the samples, or None.
    """

    def __init__(self, model: Any, context: int, max_adapters: int, tokenizer: Any):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.tokenizer = tokenizer
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or context
        self.context = min(context, most)
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.model = twin_of(model)
        ends = self.model.generation_config.eos_token_id
        self.ends: list[int] = [] if ends is None else [ends] if isinstance(ends, int) else ends
        self.pool = AdapterPool(self.model, max_adapters, MAX_RANK)
        attach(self.model, self.pool)
        page, tokens = 16, max(2 * self.context, 1024)
        self.manager = self.model.init_continuous_batching(
            GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1),
            ContinuousBatchingConfig(
                page_size=page, num_blocks=-(-tokens // page), max_batch_tokens=512
            ),
        )
        self.asked: dict[str, _Asked] = {}
        self._closed = False
        with torch.inference_mode():  # The manager's thread inherits inference mode.
            self.manager.start()
        self._thread = threading.Thread(target=self._deliver, daemon=True)
        self._thread.start()

    def ask(self, prompt: list[int], adapter: str | None, count: int, **how: Any) -> _Asked:
        """Add a request for ``count`` new tokens to the manager."""
        asked, name = _Asked(adapter), uuid.uuid4().hex
        self.asked[name] = asked
        how |= {"request_id": name, "adapter_name": adapter, "logprobs": asked.logprobs}
        try:
            accepted = self.manager.add_request(prompt, max_new_tokens=count, **how)
            require(accepted, _ERROR, "sampler", "a running manager", "it stopped", RuntimeError)
        except BaseException:
            self.asked.pop(name, None)  # `_fail` may have removed it already
            raise
        return asked

    def _deliver(self) -> None:
        while not self._closed:
            found = self.manager.get_result(timeout=0.5)
            if found is None:
                if not self.manager.is_running() and self.asked:
                    self._fail("the manager has stopped")
                continue
            if found.is_finished() and (asked := self.asked.pop(found.request_id, None)):
                # A request that overflows has an error, but not this status: see `_sample_of`.
                if found.status.name == "FAILED":
                    asked.future.set_exception(RuntimeError(f"{_ERROR}: {found.error}"))
                else:
                    asked.future.set_result(list(found.generated_tokens))

    def _fail(self, why: str) -> None:
        for name in list(self.asked):
            if asked := self.asked.pop(name, None):
                asked.future.set_exception(RuntimeError(f"{_ERROR}: {why}"))

    def prompt_logprobs(self, tokens: list[int], adapter: str | None) -> list[float]:
        """Return the log-probabilities, as in training, of all tokens after the first."""
        with torch.no_grad(), of_call(adapter, pool=self.pool):
            ids = torch.tensor([tokens], device=self.model.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()

    def close(self) -> None:
        """Stop the manager. The futures of pending requests raise RuntimeError."""
        self._closed = True
        self.manager.stop(hard_stop=True)
        self._thread.join()
        self._fail("the service is closed")


def twin_of(model: Any) -> Any:
    """Return a copy of a model's modules that shares the model's tensors and has no adapters."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = tensor
        packed = module.__dict__.get("_packed_weight")  # deepcopy would copy it, which takes memory
        if packed is not None:
            memo[id(packed)] = packed
    twin = copy.deepcopy(model, memo)
    if any(isinstance(module, LoraLayer) for module in twin.modules()):
        unwrap(twin)  # This makes the shared base parameters require gradients again.
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return twin.eval()


class Sampler:
    """Sampler of one adapter, or of the base model.

    Args:
        models: model that computes the samples.
        adapter: name of the adapter in the pool; None is the base model.
        load: function that loads the adapter again after the pool has evicted it.
        kept: whether the adapter stays in the pool when the sampler is deleted.

    Attributes:
        context: maximum number of tokens of a prompt and its answer.
    """

    def __init__(
        self,
        models: SamplingModel,
        adapter: str | None,
        load: Callable[[], Any] | None = None,
        kept: bool = False,
    ):
        self._models, self.adapter, self._load = models, adapter, load
        self.context, self._loading = models.context, threading.Lock()
        if adapter is not None and not kept:
            weakref.finalize(self, forget, models.pool, adapter).atexit = False

    def sample(
        self,
        tokens: Sequence[int] | Tensor,
        max_tokens: int,
        num_samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        seed: int | None = None,
        stop: Sequence[int | str] = (),
    ) -> list[Sample]:
        """Sample ``num_samples`` continuations of a prompt.

        Args:
            tokens: tokens of the prompt, at least one.
            max_tokens: maximum number of new tokens of a sample.
            num_samples: number of samples.
            temperature: divisor of the logits; 0 always chooses the most likely token.
            top_p: probability of the set of most likely tokens to sample from, see
                :class:`~lora_ext.serving._sampling.Sampling`.
            top_k: number of most likely tokens to sample from; -1 is all tokens.
            seed: seed that makes the samples reproducible. Sample ``i`` uses ``seed + i``.
            stop: tokens or texts that end a sample. The sample includes the token or text that
                ended it. The end tokens of the model also end a sample, unless ``stop`` is an empty
                list. With an empty list, every sample has ``max_tokens`` tokens.

        Returns:
            ``num_samples`` samples.

        Raises:
            ValueError: If an argument is invalid (the message names it), or if a log-probability is
                not finite because the adapter overflows.
            QueueFullError: If too many samples of the adapter are waiting.
        """
        begun = self.begin(tokens, max_tokens, num_samples, temperature, top_p, top_k, seed, stop)
        return [each.result() for each in begun]

    def begin(
        self,
        tokens: Sequence[int] | Tensor,
        max_tokens: int,
        num_samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        seed: int | None = None,
        stop: Sequence[int | str] = (),
    ) -> list[Future[Sample]]:
        """Start :meth:`sample` without waiting; return one future per sample."""
        models = self._models
        prompt = checked_tokens(_ERROR, "tokens", tokens, models.vocabulary).tolist()
        integer(_ERROR, "max_tokens", max_tokens, 1)
        room = models.context - len(prompt)
        expected = f"at most {models.context} tokens of prompt and answer"
        require(max_tokens <= room, _ERROR, "max_tokens", expected, f"{len(prompt)} + {max_tokens}")
        integer(_ERROR, "num_samples", num_samples, 1, _MOST)
        with renamed(_ERROR):
            Sampling(temperature, top_p, None, top_k)
        ends, texts = self._stops(stop)
        first = secrets.randbits(62) if seed is None else integer(_ERROR, "seed", seed)
        waiting = sum(each.adapter == self.adapter for each in list(models.asked.values()))
        expected, found = f"at most {_MOST} waiting samples per adapter", waiting + num_samples
        require(found <= _MOST, _ERROR, "queue", expected, found, QueueFullError)
        of_all = prompt, self.adapter, max_tokens
        begun = []
        for i in range(num_samples):
            mine = (first + i + (1 << 63)) % (1 << 64) - (1 << 63)
            how = {
                "sampling": Sampling(temperature, top_p, mine, top_k),
                "eos_token_id": ends or -1,
            }
            asked = self._run_loaded(functools.partial(models.ask, *of_all, **how))
            begun.append(self._sample_of(asked, ends, texts))
        return begun

    def logprobs(self, tokens: Sequence[int] | Tensor) -> list[float]:
        """Return the log-probability of each token of a prompt after the first."""
        where, most = "Sampler.logprobs", self._models.context
        prompt = checked_tokens(where, "tokens", tokens, self._models.vocabulary)
        require(len(prompt) <= most, where, "tokens", f"at most {most} tokens", len(prompt))
        action = functools.partial(self._models.prompt_logprobs, prompt.tolist(), self.adapter)
        return self._run_loaded(action)

    def _run_loaded(self, action: Callable[[], Any]) -> Any:
        """Run an action; if the pool does not contain the adapter, load it and try again."""
        for _ in range(_TRIES):
            try:
                return action()
            except UnknownAdapterError:
                if self._load is None:
                    raise
                with self._loading:
                    if self.adapter not in self._models.pool:
                        self._load()
        return action()

    def _stops(self, stop: Any) -> tuple[list[int], list[str]]:
        alone = isinstance(stop, str) or not isinstance(stop, Iterable)
        each = [stop] if alone else list(stop)
        ends = [] if isinstance(stop, list) and not stop else list(self._models.ends)
        texts = []
        for item in each:
            if isinstance(item, str):
                asked = self._models.tokenizer is not None and item != ""
                expected = "tokens or, with Service(tokenizer=), non-empty texts"
                require(asked, _ERROR, "stop", expected, repr(item))
                texts.append(item)
            else:
                most = self._models.vocabulary - 1
                ends.append(integer(_ERROR, "stop", item, 0, most, expected="tokens or texts"))
        return ends, texts

    def _sample_of(self, asked: _Asked, ends: list[int], texts: list[str]) -> Future[Sample]:
        future: Future[Sample] = Future()

        def tell(done: Future[Any]) -> None:
            try:
                tokens: list[int] = done.result()
                logprobs = [each.value for each in asked.logprobs.tokens]
                finite = all(map(math.isfinite, logprobs))
                expected = "finite values for the sampled tokens"
                require(finite, _ERROR, "logprobs", expected, "NaN: the adapter overflows")
                cut = self._cut(tokens, texts)
                kept = tokens[:cut]
                reason = "length" if cut is None and tokens[-1] not in ends else "stop"
                future.set_result(Sample(kept, logprobs[: len(kept)], reason))
            except BaseException as error:
                future.set_exception(error)

        asked.future.add_done_callback(tell)
        return future

    def _cut(self, tokens: list[int], texts: list[str]) -> int | None:
        """Return the number of tokens up to the end of the first stop text, or None without one."""

        def complete(count: int) -> bool:
            said = self._models.tokenizer.decode(tokens[:count], skip_special_tokens=False)
            return any(text in said for text in texts)

        if not texts or not complete(len(tokens)):
            return None
        # Bisection decodes only a few times, since one thread runs this for all tenants' samples.
        return bisect.bisect_left(range(len(tokens)), True, key=complete)


def forget(pool: AdapterPool, name: str) -> None:
    """Unload an adapter if the pool has it."""
    if name in pool:
        pool.unload(name)
