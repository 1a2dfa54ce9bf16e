"""``Service``, which owns the base model, and ``Tenant``, which trains one adapter on it."""

from __future__ import annotations

import functools
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal

from torch import nn

from lora_ext._checks import choice, instance, integer, renamed, require, require_flags
from lora_ext.adapter import LoraAdapter, check_base
from lora_ext.layers import LoraConfig, LoraLayer, unwrap

from ._batch import CAUSAL, BatchStep, Call
from ._data import Datum, Result, checked_data, checked_options
from ._live import LiveAdapter, Targets, checked_settings
from ._sampler import MAX_RANK, Sampler, SamplingModel, forget
from ._scheduler import QUANTUM, Scheduler
from ._store import Store

_SEEDS = (-(1 << 63), (1 << 63) - 1)
_MOST, _MOST_ADAPTERS = 1 << 31, 1 << 16


class Service:
    """Training for many tenants on one base model.

    A *step* is one forward and backward that computes waiting calls of several tenants. Each tenant
    has a separate adapter, optimizer, gradient and queue. The results of a tenant equal those of a
    service with only this tenant, up to the rounding of library products (``docs/tenants.md``). If
    a call fails, the calls of other tenants are not affected.

    Args:
        model: transformers model. The model is changed in place: its layers are wrapped, and it is
            frozen and set to evaluation mode. :meth:`close` restores it.
        max_tokens: maximum number of tokens of one step, and therefore of one :class:`Datum`.
        store: folder of all checkpoints, created if it does not exist; None disables saving.
        queue: maximum number of waiting calls of a tenant. In total, these calls may have at most
            ``queue * max_tokens`` tokens; a single waiting call may have more.
        tokenizer: tokenizer that decodes samples. A tokenizer is only needed if the argument
            ``stop`` of :meth:`Sampler.sample` contains texts.
        max_adapters: maximum number of adapters that are loaded for sampling at the same time.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_tokens: int = 4096,
        store: str | os.PathLike[str] | None = None,
        queue: int = 64,
        tokenizer: Any = None,
        max_adapters: int = 64,
    ):
        instance("Service", "model", model, nn.Module)
        check_base("Service", model)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        require(head is not None and not both, "Service", "model", CAUSAL, type(model).__name__)
        self.max_tokens = integer("Service", "max_tokens", max_tokens, 1, _MOST)
        size = integer("Service", "queue", queue, 1, _MOST)
        self.max_adapters = integer("Service", "max_adapters", max_adapters, 1, _MOST_ADAPTERS)
        decodes = tokenizer is None or callable(getattr(tokenizer, "decode", None))
        require(decodes, "Service", "tokenizer", "a tokenizer, or None", type(tokenizer).__name__)
        self.tokenizer = tokenizer
        self.store = Store(store)
        self.model = model
        self._was = model.training
        model.eval()
        try:
            self._step = BatchStep(model)
        except BaseException:
            model.train(self._was)
            raise
        self._scheduler = Scheduler(self._step, self.max_tokens, size)
        # This queue needs no limit, because each caller waits for the result of its item.
        self._own = self._scheduler.add(bounded=False)
        self._numbers, self._marks = itertools.count(), itertools.count(1)
        self._sampling: SamplingModel | None = None
        self._lock, self._closed = threading.Lock(), False
        self._tenants: weakref.WeakSet[Tenant] = weakref.WeakSet()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def counts(self) -> dict[str, int]:
        """Counters: ``steps``, ``parts`` in all steps, and ``most``, the parts in the largest step.

        A part is the data of one call that one step computes.
        """
        return dict(self._scheduler.counts)

    def create(
        self, rank: int, seed: int = 0, alpha: float = 32, targets: Targets = None
    ) -> Tenant:
        """Create a tenant with a new adapter.

        Args:
            rank: rank of the adapter, at most 512.
            seed: seed of the adapter's initial values.
            alpha: numerator of the scale ``alpha / rank`` of the adapter's update.
            targets: modules to adapt, as ``target_modules`` of :class:`lora_ext.LoraConfig`; None
                is "all-linear".

        Raises:
            ValueError: If an argument is invalid; the message names it.
        """
        integer("create", "rank", rank, 1, MAX_RANK)
        seed = integer("create", "seed", seed, *_SEEDS)
        with renamed("create", target_modules="targets", lora_alpha="alpha"):
            chosen = "all-linear" if targets is None else targets
            config = LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=chosen, task_type="CAUSAL_LM"
            )
            return self._wait("create", lambda: self._new(config, seed))

    def load(self, path: str | os.PathLike[str]) -> Tenant:
        """Create a tenant from a checkpoint, with its adapter and optimizer state.

        Args:
            path: path of the checkpoint, relative to the store.

        Raises:
            ValueError: If the path is invalid or the checkpoint is malformed.
        """
        return self._wait("load", functools.partial(self._load, path))

    def sampler(self, path: str | os.PathLike[str] | None = None) -> Sampler:
        """Return a sampler of the adapter in a checkpoint, or of the base model.

        Args:
            path: path of the checkpoint, relative to the store; None is the base model.

        Raises:
            ValueError: If the path is invalid or the checkpoint is malformed.
        """
        if path is None:
            return Sampler(self.sampling(), None)
        folder, saved = self.store.read("sampler", path)
        for name, factors in saved.modules.items():
            finite = bool(factors.a.isfinite().all() and factors.b.isfinite().all())
            require(finite, "sampler", f"{folder}: {name}", "finite factors", "NaN or infinity")
        return self._wait("sampler", lambda: self.sampled(f"save@{next(self._marks)}", saved))

    def sampled(self, name: str, source: Any) -> Sampler:
        """Load ``source`` into the sampling pool as adapter ``name``, and return its sampler."""
        models = self.sampling()
        models.pool.load(name, source)
        return Sampler(models, name, lambda: models.pool.load(name, source))

    def close(self) -> None:
        """Drop all waiting calls and restore the model.

        The futures of the dropped calls raise. A second call of this method does nothing.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._scheduler.stop()
        if self._sampling is not None:
            self._sampling.close()
        if any(isinstance(module, LoraLayer) for module in self.model.modules()):
            unwrap(self.model)
        self.model.train(self._was)

    # ---------------------------------------------------------------------------------------------
    # For tenants

    def sampling(self) -> SamplingModel:
        """Return the model that computes the samples of all samplers; the first call creates it."""
        with self._lock:
            if self._sampling is None:
                self._sampling = SamplingModel(
                    self.model, self.max_tokens, self.max_adapters, self.tokenizer
                )
            return self._sampling

    def _wait(self, where: str, action: Callable[[], Any]) -> Any:
        return self._scheduler.put(where, self._own, action).result()

    def _new(self, config: LoraConfig, seed: int) -> Tenant:
        name = f"tenant{next(self._numbers)}"
        return Tenant(self, LiveAdapter(self.model, name, config, seed))

    def _load(self, path: Any) -> Tenant:
        folder, saved = self.store.read("load", path)
        _check_trained("load", folder, saved)
        fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
        same: Any = {field: getattr(saved.config, field) for field in fields}
        config = LoraConfig(**same, target_modules=sorted(saved.modules), task_type="CAUSAL_LM")
        with renamed("load", target_modules="path"):
            tenant = self._new(config, 0)
        try:
            tenant.take(folder, saved, optimizer=True)
        except BaseException:
            tenant.adapter.delete()
            raise
        return tenant


class Tenant:
    """Tenant with one trainable adapter, created by :meth:`Service.create` or :meth:`Service.load`.

    The calls of a tenant run in order. ``forward_backward``, ``forward`` and ``optim_step`` return
    a future without waiting for the result; all other methods do so with ``wait=False``. A future
    cannot be cancelled, because later calls depend on it. :meth:`close` drops all waiting calls.
    """

    def __init__(self, service: Service, adapter: LiveAdapter):
        self.service, self.adapter = service, adapter
        self._queue = service._scheduler.add()
        self._inflight: str | None = None
        self._closing: Future[Any] | None = None

    @property
    def rank(self) -> int:
        """Rank of the adapter."""
        return self.adapter.config.r

    def forward_backward(
        self, data: Sequence[Datum], loss: str = "cross_entropy", config: Any = None
    ) -> Future[Result]:
        """Compute the gradient of a loss, summed over the data, and add the gradient to earlier
        gradients.

        The next :meth:`optim_step` uses the sum of all gradients since the previous step.

        Args:
            data: sequences of at most ``max_tokens`` tokens each.
            loss: "cross_entropy", "importance_sampling", "ppo" or "cispo";
                :data:`lora_ext.tenants.LOSSES` gives their formulas.
            config: options of the loss by name: ``clip_low_threshold`` and ``clip_high_threshold``
                for "ppo" and "cispo". None uses the defaults.

        Returns:
            A future of a :class:`Result` with the log-probabilities of the targets and the metric
            ``loss:sum``, the loss. If the loss or a gradient is not finite, the future raises
            ValueError, and no gradient of this call is added.

        Raises:
            ValueError: If an argument is invalid; the message names the field.
            QueueFullError: If the queue is full.
        """
        return self._call("forward_backward", data, loss, config, True)

    def forward(
        self, data: Sequence[Datum], loss: str = "cross_entropy", config: Any = None
    ) -> Future[Result]:
        """Return the same future as :meth:`forward_backward`, without computing gradients."""
        return self._call("forward", data, loss, config, False)

    def _call(self, where: str, data: Any, loss: Any, config: Any, backward: bool) -> Any:
        options = checked_options(where, loss, config)
        service = self.service
        checked = checked_data(where, data, loss, service._step.vocabulary, service.max_tokens)
        most = min(QUANTUM, service.max_tokens)
        call = Call(self.adapter, checked, loss, options, backward, most)
        return service._scheduler.put(where, self._queue, call)

    def optim_step(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> Future[Result]:
        """Take a step of AdamW with the sum of all gradients since the previous step.

        If no gradient has been accumulated since then, the step changes nothing.

        Args:
            lr: learning rate.
            betas: decay rates of the two moments, as in :class:`torch.optim.AdamW`.
            eps: term added to the denominator, above 0.
            weight_decay: coefficient of the decoupled weight decay.
            max_grad_norm: maximum norm of the gradient, to which it is clipped; None does not clip.

        Returns:
            A future of a :class:`Result` with the metric ``grad_norm:mean``, the norm of the
            gradient before clipping.
        """
        settings = checked_settings(lr, betas, eps, weight_decay, max_grad_norm)

        def step() -> Result:
            norm = self.adapter.optimizer.step(self.adapter.take(), **settings)
            if self._inflight is not None:
                self._follow(self._inflight)
            return Result([], {"grad_norm:mean": norm})

        return self._done("optim_step", step, wait=False)

    def save(self, path: str | os.PathLike[str], wait: bool = True) -> Any:
        """Save the adapter in PEFT's format, with the optimizer state, after all earlier calls.

        Args:
            path: path of the checkpoint, relative to the store; an existing one is replaced.
            wait: whether to wait until the adapter is saved. False returns a future.

        Returns:
            ``path``, or a future of it.

        Raises:
            ValueError: If the path is invalid.
        """
        require_flags("save", wait=wait)
        self.service.store.folder("save", path)

        def save() -> str:
            self.service.store.save("save", path, self.adapter)
            return os.fspath(path)

        return self._done("save", save, wait)

    def restore(
        self, path: str | os.PathLike[str], optimizer: bool = True, wait: bool = True
    ) -> Any:
        """Restore the adapter, and by default the optimizer state, from a checkpoint.

        The checkpoint must have the modules, ranks and scales of this adapter. Gradients since the
        last optimizer step are discarded.

        Args:
            path: path of the checkpoint, relative to the store.
            optimizer: whether to restore the optimizer state. False resets it.
            wait: whether to wait for the result. False returns a future.

        Returns:
            ``path``, or a future of it.
        """
        require_flags("restore", optimizer=optimizer, wait=wait)
        self.service.store.folder("restore", path)

        def restore() -> str:
            self.take(*self.service.store.read("restore", path), optimizer)
            return os.fspath(path)

        return self._done("restore", restore, wait)

    def take(self, folder: Any, saved: LoraAdapter, optimizer: bool) -> None:
        """Copy a checkpoint's values to this tenant; must be called on the service's thread."""
        _check_trained("restore", folder, saved)
        mine = {path: layer.r[self.adapter.name] for path, layer in self.adapter.layers.items()}
        theirs = {path: factors.a.shape[0] for path, factors in saved.modules.items()}
        expected = "the modules and ranks of this adapter"
        require(mine == theirs, "restore", "path", expected, f"{theirs!r:.200} in {folder}")
        for path, layer in self.adapter.layers.items():
            scaling = saved.modules[path].scaling
            same = abs(layer.scaling[self.adapter.name] - scaling) <= 1e-6 * abs(scaling)
            require(same, "restore", "path", f"scaling {layer.scaling[self.adapter.name]}", scaling)
        self.adapter.write(saved)
        self.service.store.restore(folder, self.adapter.optimizer, optimizer)
        self.adapter.take()

    def sampler(self, mode: Literal["snapshot", "inflight"] = "snapshot", wait: bool = True) -> Any:
        """Return a sampler of the adapter, after all earlier calls.

        Args:
            mode: "snapshot" always samples with a copy of the adapter's current values. "inflight"
                samples with the values after the latest optimizer step; a running sample keeps the
                values with which it began.
            wait: whether to wait for the sampler. False returns a future.

        Raises:
            ValueError: If a factor is not finite, since it could affect other rows of a batch.
        """
        require_flags("sampler", wait=wait)
        choice("sampler", "mode", mode, ("snapshot", "inflight"))
        return self._done("sampler", functools.partial(self._sampler, mode), wait)

    def _sampler(self, mode: str) -> Sampler:
        if mode == "inflight":
            name = f"{self.adapter.name}@inflight"
            self._follow(name)
            self._inflight = name
            again = functools.partial(self.service._wait, "sampler", lambda: self._follow(name))
            return Sampler(self.service.sampling(), name, again, kept=True)
        config, state = self._finite()
        kept = config, {key: tensor.detach().clone() for key, tensor in state.items()}
        return self.service.sampled(f"{self.adapter.name}@{next(self.service._marks)}", kept)

    def _follow(self, name: str) -> None:
        """Copy the current factors to the pool's adapter ``name``; load the adapter if the pool has
        evicted it."""
        pool = self.service.sampling().pool
        (pool.update if name in pool else pool.load)(name, self._finite())

    def _finite(self) -> Any:
        finite = self.adapter.finite()
        require(finite, "sampler", "adapter", "finite factors", "NaN or infinity")
        return self.adapter.source()

    def close(self, wait: bool = True, save_as: str | None = None) -> Any:
        """Drop all waiting calls and remove the adapter. A second call does nothing.

        Args:
            wait: whether to wait until the adapter is removed. False returns a future.
            save_as: path in the store to which the adapter is saved before it is removed; None does
                not save it.

        Raises:
            ValueError: If an argument is invalid; the tenant then remains open.
        """
        require_flags("close", wait=wait)
        if save_as is not None:
            self.service.store.folder("close", save_as, "save_as")

        def close() -> None:
            try:
                if save_as is not None:
                    self.service.store.save("save", save_as, self.adapter)
            finally:
                self.adapter.delete()
                if self._inflight is not None:
                    forget(self.service.sampling().pool, self._inflight)

        if self._closing is None:
            scheduler, why = self.service._scheduler, "the tenant is closed"
            self._closing = scheduler.close(self._queue, why, close)
        return self._closing.result() if wait else self._closing

    def _done(self, where: str, action: Callable[[], Any], wait: bool) -> Any:
        future = self.service._scheduler.put(where, self._queue, action)
        return future.result() if wait else future


def _check_trained(where: str, folder: Any, saved: LoraAdapter) -> None:
    """Raise ValueError if a checkpoint contains anything but LoRA factors.

    :class:`Tenant` cannot train other parts, for example a bias or scales of outputs, and would
    ignore them silently.
    """
    fields = ("lora_bias", "alora_invocation_tokens", "modules_to_save")
    more = [field for field in (*fields, "target_parameters") if getattr(saved.config, field)]
    kind = saved.config.kind
    more += [kind.when] if kind.when else []
    more += [f"peft_type={kind.name}"] if kind.name != "LORA" else []
    more += ["bias"] if saved.config.base_bias != "none" else []
    expected = "an adapter that only has LoRA factors"
    require(not more, where, "path", expected, f"{', '.join(more)} in {folder}")
