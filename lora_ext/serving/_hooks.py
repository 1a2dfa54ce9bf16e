"""Replacements that ``attach`` sets for methods of a model and of its modules.

They are set on the instances, not on the classes. They pass ``adapter_names=`` to the layers,
repeat the adapters of a block for beams and returned sequences, and reject calls that the layers
cannot compute.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import require, require_flags
from lora_ext._torch import compiles
from lora_ext.layers import find_module
from lora_ext.rows import Batch, Names, PoolLayer, _context, _generation, _traced, refuse_singular

from . import _continuous
from ._media import KINDS, has_media, media_owners, of_media
from ._names import CallNames, named_prompts
from ._pipelines import report_lost_names

_Run = Callable[..., Any]

#: Prefix of the attribute that stores a replaced method if it was in the instance's ``__dict__``.
_OWN_PREFIX = "_lora_ext_own_"
#: Arguments of ``forward`` whose first dimension is the batch dimension.
_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "labels",
    "pixel_values",
    "input_features",
)
#: Names of the cache argument of ``forward`` in different versions of transformers.
_CACHES = ("cache", "past_key_values", "cache_params")
#: Arguments of ``forward`` that only a step of transformers' continuous batching passes.
_PACKED = ("read_index", "write_index", "block_table")


class Hooks:
    """Replacements of the methods of one attached model.

    Each method has the name of the transformers method that it replaces. It receives the model, the
    original method bound to the model (``own``), and the arguments of the call.

    Args:
        names: object that chooses the adapter names of each call.
    """

    def __init__(self, names: CallNames):
        self.names = names
        self._lock = _ForwardLock()
        # Dynamo does not trace this function: a compiled model has a graph break here, and the
        # forward runs eagerly. A decorator would import dynamo together with this file, which takes
        # a second.
        self._uncompiled: Any = torch.compiler.disable(
            self._locked_forward,
            reason="a manager of continuous batching runs, for which a compiled forward cannot "
            "wait; or token ids determine the sequences that contain images, videos or sounds, or "
            "the start of an aLoRA adapter",
        )

    def install(self, model: nn.Module) -> list[tuple[str, str]]:
        """Replace methods of a model and its modules.

        Returns:
            For each replaced method, the names of the module and of the method.
        """
        installed = []
        for name, module in model.named_modules():
            kind = type(module)
            found = {
                method: replacement
                for method, replacement in _REPLACEMENTS.items()
                # A method in the instance's __dict__ is kept, except for a Hub model's generate.
                if (method == "generate" or method not in module.__dict__)
                and callable(getattr(kind, method, None))
            }
            # A transformers model would ignore adapter_names= as an unknown argument.
            is_model = hasattr(kind, "get_input_embeddings")
            if is_model or (self.names.default is not None and not name):
                found["forward"] = Hooks.forward
            for method, replacement in found.items():
                if method in module.__dict__:  # for example a forward of accelerate
                    module.__dict__[_OWN_PREFIX + method] = module.__dict__[method]
                hook = _replacing_function(self, replacement, kind, method)
                setattr(module, method, MethodType(hook, module))
                installed.append((name, method))
        return installed

    def forward(
        self, model: Any, own: _Run, /, *args: Any, adapter_names: Names = None, **kw: Any
    ) -> Any:
        """Run a forward inside :func:`adapters` with ``adapter_names``.

        The method holds the model's forward lock, except while a graph is compiled or runs.
        """
        refuse_singular("forward", kw)
        if not compiles():
            return self._locked_forward(own, model, args, kw, adapter_names)
        # A graph cannot wait for the lock, which a running manager holds during its steps. It also
        # cannot read tokens, which determine the starts of activated adapters and the sequences
        # that contain images, videos or sounds. In these cases the forward is not compiled.
        if _continuous.running_managers or _context.any_activated or has_media(model, kw):
            return self._uncompiled(own, model, args, kw, adapter_names)
        with self.names.block(adapter_names):
            return _run_forward(own, model, args, kw)

    def _locked_forward(
        self, own: _Run, model: Any, args: tuple[Any, ...], kw: dict[str, Any], names: Names
    ) -> Any:
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if str(attention).startswith("paged|") and not any(name in kw for name in _PACKED):
            # transformers makes no mask for this attention outside the manager's steps.
            raise RuntimeError(
                f"attach: attention: expected a causal implementation, found {attention!r}, set by "
                "continuous batching; stop its manager or call set_attn_implementation('sdpa')"
            )
        names = self.names.of_call(names)
        if names is None and not self._lock.held:  # if held, an outer forward was checked
            report_lost_names(self.names.handle)
        exclusive = kw.get("is_causal") is not None
        with self._lock.hold(exclusive), self.names.block(names):
            return _run_forward(own, model, args, kw)

    def generate(
        self, model: Any, own: _Run, /, *args: Any, adapter_names: Names = None, **kw: Any
    ) -> Any:
        """Call the model's ``generate`` with the adapter names of the call.

        The repetition of rows for beams and returned sequences applies only to this call.
        """
        refuse_singular("generate", kw)
        names = self.names.of_call(adapter_names)
        with self.names.block(names), _generation.generation_scope(), media_owners(model, args, kw):
            if _generation.has_activated():
                config = kw.get("generation_config") or getattr(model, "generation_config", None)
                scale = kw.get("guidance_scale", getattr(config, "guidance_scale", None))
                if scale is not None and scale != 1:
                    raise NotImplementedError(
                        "generate: guidance_scale: expected None or 1 with an aLoRA adapter, found "
                        f"{scale}; the adapter has no known start in the unconditional prompt"
                    )
                _generation.prompt_known(*_prompt_and_past(args, kw))
            return own(*args, **kw)

    def _prepare_encoder_decoder_kwargs_for_generation(
        self, _model: Any, own: _Run, /, *args: Any, **kw: Any
    ) -> Any:
        # The encoder runs on the inputs before they are repeated. The number of repetitions is
        # reset to 1, because Whisper generates several times in one call.
        _generation.repeat_rows(self.names.handle, 1)
        return own(*args, **kw)

    def _expand_inputs_for_generation(
        self, _model: Any, own: _Run, /, expand_size: int = 1, *args: Any, **kw: Any
    ) -> Any:
        expanded = own(expand_size, *args, **kw)
        _generation.repeat_rows(self.names.handle, expand_size)
        return expanded

    # Whisper repeats its inputs for returned sequences before the encoder runs. It also removes
    # recordings that have ended from the batch.

    def _expand_variables_for_generation(
        self, _model: Any, own: _Run, /, *args: Any, **kw: Any
    ) -> Any:
        batch = kw["batch_size"]
        expanded = own(*args, **kw)
        rows = expanded[1]
        _generation.select_rows([row * batch // rows for row in range(rows)], batch)
        return expanded

    def _maybe_reduce_batch(self, _model: Any, own: _Run, /, *args: Any, **kw: Any) -> Any:
        before = kw["batch_idx_map"]
        reduced = own(*args, **kw)
        _generation.repeat_rows(self.names.handle, 1)
        if len(reduced[2]) < len(before):
            _generation.select_rows([before.index(row) for row in reduced[2]], len(before))
        return reduced

    def init_continuous_batching(self, _model: Any, own: _Run, /, *args: Any, **kw: Any) -> Any:
        """Return a manager that supports adapters per request."""
        manager = own(*args, **kw)
        _continuous.add_adapters_to(manager, self.names)
        return manager

    def generate_batch(
        self,
        _model: Any,
        own: _Run,
        /,
        inputs: Any,
        *args: Any,
        adapter_names: Names = None,
        allow_base: bool = False,
        **kw: Any,
    ) -> Any:
        """Call the model's ``generate_batch`` with one adapter name per request.

        If a prompt lacks the invocation of its activated adapter (aLoRA), it uses the base model if
        ``allow_base`` is True. Otherwise ValueError is raised.
        """
        refuse_singular("generate_batch", kw)
        require_flags("generate_batch", allow_base=allow_base)
        names = self.names.of_requests("generate_batch", adapter_names, len(inputs))
        # `generate` with a paged cache calls this method after it has searched the prompts for
        # invocations and warned.
        found = _generation.activated_in(self.names.handle) if adapter_names is None else None
        looked = found is not None and found.fixed
        prompts = named_prompts(inputs, names, allow_base or looked)
        self.names.check_invoked("generate_batch", prompts)
        results = own(prompts, *args, **kw)
        if prompts and prompts[0].errors:
            raise prompts[0].errors[0]
        return results

    def resize_token_embeddings(self, model: Any, own: _Run, /, *args: Any, **kw: Any) -> Any:
        """Raise RuntimeError if the embeddings are layers of the pool, which has fixed sizes."""
        found = model.get_input_embeddings(), model.get_output_embeddings()
        for embeddings in found:
            if isinstance(embeddings, PoolLayer):
                raise RuntimeError(
                    "resize_token_embeddings: expected embeddings that are not attached, found a "
                    f"{type(embeddings).__name__}; detach the model, resize it and create a pool"
                )
        return own(*args, **kw)


#: Replacements by method name, except :meth:`Hooks.forward`, which not every module needs.
_REPLACEMENTS: dict[str, _Run] = {
    method.__name__: method
    for method in (
        Hooks.generate,
        Hooks._prepare_encoder_decoder_kwargs_for_generation,
        Hooks._expand_inputs_for_generation,
        Hooks._expand_variables_for_generation,
        Hooks._maybe_reduce_batch,
        Hooks.init_continuous_batching,
        Hooks.generate_batch,
        Hooks.resize_token_embeddings,
    )
} | {kind.method: functools.partial(of_media, kind) for kind in KINDS}


def _replacing_function(hooks: Hooks, replacement: _Run, kind: type, method: str) -> Any:
    """Return a function that replaces ``method`` in modules of the class ``kind``.

    The function is bound to a module, as a method is, so it also works in a copied model.
    """
    original = getattr(kind, method)
    static = isinstance(inspect.getattr_static(kind, method), staticmethod)

    @functools.wraps(original)  # keeps the signature, which transformers inspects
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__.get(_OWN_PREFIX + method)
        if own is None:
            own = original if static else functools.partial(original, self)
        return replacement(hooks, self, own, *args, **kwargs)

    hook.of_attach = True  # pyright: ignore[reportAttributeAccessIssue]
    return hook


def is_hook(method: Any) -> bool:
    """Return whether a bound method is a replacement made by :meth:`Hooks.install`."""
    return getattr(getattr(method, "__func__", None), "of_attach", False)


def uninstall(model: nn.Module, installed: list[tuple[str, str]]) -> None:
    """Undo :meth:`Hooks.install`."""
    for name, method in installed:
        module = find_module(model, name)
        if module is not None:
            module.__dict__.pop(method, None)
            if _OWN_PREFIX + method in module.__dict__:
                module.__dict__[method] = module.__dict__.pop(_OWN_PREFIX + method)


def _run_forward(run: _Run, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a forward, with the state that its layers need to assign adapters to rows.

    This state is the shape of the batch, the sequences that contain images, videos or sounds, and,
    with aLoRA adapters, the adapter of each token. Outside of every block no state is stored. If
    dynamo traces the forward, only the shape is stored, because :meth:`Hooks.forward` does not
    compile forwards that need other state.

    Raises:
        NotImplementedError: If the forward is a step of a manager that does not support adapters,
            or is traced by torch.jit.trace.
    """
    if any(name in kwargs for name in _PACKED) and not getattr(
        _context.innermost(), "packed", False
    ):
        raise NotImplementedError(
            "attach: expected one row per sequence, found a step of a continuous-batching manager "
            "without adapters; use the attached model's init_continuous_batching or generate_batch"
        )
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise NotImplementedError(
            "attach: expected a model that is not recorded by torch.jit.trace, as the trace would "
            "keep the adapters of the current block; use torch.export or torch.compile instead"
        )
    traced = compiles()
    if not traced and _context.innermost() is None:
        return run(*args, **kwargs)
    # The first dimension of these inputs is the batch dimension. The size of the second one is
    # treated as a number of tokens, even if it is a number of channels or features.
    given = [*args[:1], *(kwargs.get(name) for name in _INPUTS)]
    tensors = [x for x in given if isinstance(x, Tensor) and x.dim() > 1]
    if not tensors:
        return run(*args, **kwargs)
    lengths = [x.shape[1] for x in tensors if x.dim() == 2 or x.is_floating_point()]
    sequences = tensors[0].shape[0]
    if traced:  # dynamo can trace attributes of `tracing`, but no ContextVar
        before, _traced.tracing.batch = _traced.tracing.batch, (sequences, *lengths)
        try:
            return run(*args, **kwargs)
        finally:
            _traced.tracing.batch = before
    with (
        _context.forward_of(Batch(sequences, frozenset(lengths))),
        media_owners(model, args, kwargs),
        _activation(model, args, kwargs),
    ):
        return run(*args, **kwargs)


def _activation(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> contextlib.AbstractContextManager[None]:
    """Return a context manager in which activated adapters apply to the tokens of a forward."""
    if not _generation.has_activated():
        return contextlib.nullcontext()
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    expected = "ordinary adapters on an encoder-decoder model"
    found = "an aLoRA adapter (alora_invocation_tokens)"
    require(not encodes, "adapters", "names", expected, found, NotImplementedError)
    given = dict(zip(_parameters(type(model)), args, strict=False)) | kwargs
    ids = given.get("input_ids")
    tokens = given.get("inputs_embeds") if ids is None else ids
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:  # in a vision tower, for example
        return contextlib.nullcontext()
    past = next((given[name] for name in _CACHES if given.get(name) is not None), None)
    known, found = past is None or hasattr(past, "get_seq_length"), f"a {type(past).__name__}"
    expected = "a cache with get_seq_length for an activated adapter"
    require(known, "adapters", "names", expected, found, NotImplementedError)
    length = 0 if past is None else int(past.get_seq_length())
    keep = given.get("logits_to_keep")
    rows, count = tokens.shape[:2]
    return _generation.activated_forward(ids, rows, count, length, 0 if keep is None else keep)


@functools.cache
def _parameters(kind: type) -> tuple[str, ...]:
    """Return the names of the arguments of a model's forward, in their order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]  # pyright: ignore


def _prompt_and_past(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, int]:
    """Return the token ids passed to ``generate`` and the number of cached tokens before them.

    The ids are None if they are not given or do not contain the whole prompt. The number is known
    from ``attention_mask``, which also covers the cached tokens.
    """
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return None, 0
    embeds = kwargs.get("inputs_embeds")
    if embeds is not None and embeds.shape[1] != ids.shape[1]:
        return None, 0
    mask = kwargs.get("attention_mask")
    whole = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else ids.shape[1]
    return ids, max(0, whole - ids.shape[1])


class _ForwardLock:
    """Readers-writer lock of the forwards of one model, granted in order of arrival.

    During a call with ``is_causal=``, transformers stores this argument in the model's
    configuration, from which all threads compute their masks. Each step of continuous batching is
    such a call. A forward with ``is_causal=`` therefore holds the lock exclusively; other forwards
    share it.

    State: a forward holds ``_entrance`` while it acquires the lock, and an exclusive forward until
    it ends. ``_sharing`` is the number of forwards that share the lock, guarded by ``_changed``.
    ``_thread.held`` is True while the thread holds the lock; nested forwards of the thread do not
    acquire the lock again.
    """

    def __init__(self) -> None:
        self._entrance = threading.Lock()
        self._changed = threading.Condition()
        self._sharing = 0
        self._thread = threading.local()

    @property
    def held(self) -> bool:
        """True if the current thread holds the lock."""
        return getattr(self._thread, "held", False)

    @contextlib.contextmanager
    def hold(self, exclusive: bool) -> Iterator[None]:
        """Hold the lock inside the block, unless the thread holds it already."""
        if self.held:
            yield
            return
        self._thread.held = True
        try:
            with self._entrance:
                if exclusive:
                    with self._changed:
                        self._changed.wait_for(lambda: self._sharing == 0)
                    yield
                    return
                with self._changed:
                    self._sharing += 1
            try:
                yield
            finally:
                with self._changed:
                    self._sharing -= 1
                    self._changed.notify_all()
        finally:
            self._thread.held = False
