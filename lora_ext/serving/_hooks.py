"""The methods of an attached model that lora_ext stands in for, all of them on one object.

The rows of a block stay those of the batch through beams and returned sequences, ``adapter_names=``
reaches the layers, and what cannot be served is refused.
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

from lora_ext._checks import require_flags
from lora_ext._torch import compiles
from lora_ext.layers import find_module
from lora_ext.rows import (
    Batch,
    Names,
    PoolLayer,
    _context,
    activated_forward,
    activated_in,
    forward_of,
    generation_scope,
    has_activated,
    innermost,
    noted,
    prompt_known,
    refuse_singular,
    repeat_rows,
    select_rows,
)

from . import _continuous
from ._media import KINDS, has_media, media_noted, of_media
from ._names import CallNames, named_prompts

_Run = Callable[..., Any]
_OWN = "_lora_ext_own_"  # and the method that an instance has of its own

# What a model calls its tokens, and what transformers' continuous batching gives besides.
_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "labels",
    "pixel_values",
    "input_features",
)
_CACHES = ("cache", "past_key_values", "cache_params")  # transformers has renamed it
_PACKED = ("read_index", "write_index", "block_table")


class Hooks:
    """What stands in for methods of an attached model and of its parts.

    Each method here has the name of one of transformers', and is given the model, what it stands in
    for, and then the arguments of the call.

    Args:
        names: of the calls of the model.
    """

    def __init__(self, names: CallNames):
        self.names = names
        self._gate = _Gate()
        # Made here, as a decorator would import dynamo, which takes a second, with this file.
        self._uncompiled: Any = torch.compiler.disable(
            self._in_turn,
            reason="a manager of continuous batching runs, and a compiled forward would not wait; "
            "or the tokens have to tell whose images, videos or sounds there are, or where an "
            "activated adapter begins",
        )

    def put(self, model: nn.Module) -> list[tuple[str, str]]:
        """Stand in for the methods that a model has of these. Returns which: module and method."""
        done = []
        for name, module in model.named_modules():
            kind = type(module)
            found = {
                method: stand_in
                for method, stand_in in _STAND_INS.items()
                # An instance with a method of its own is left alone, but for a repository's
                # generate.
                if (method == "generate" or method not in module.__dict__)
                and callable(getattr(kind, method, None))
            }
            if hasattr(kind, "get_input_embeddings") or (
                self.names.default is not None and not name
            ):
                # A model of transformers swallows arguments that it does not know: names would be
                # lost.
                found["forward"] = Hooks.forward
            for method, stand_in in found.items():
                if method in module.__dict__:  # accelerate's forward, a repository's generate
                    module.__dict__[_OWN + method] = module.__dict__[method]
                hook = _hook(self, stand_in, kind, method)
                setattr(module, method, MethodType(hook, module))
                done.append((name, method))
        return done

    def forward(
        self,
        model: Any,
        own: _Run,
        /,
        *args: Any,
        adapter_names: Names = None,
        **kw: Any,
    ) -> Any:
        """With names, in turn with other forwards, and in a block that knows the batch."""
        refuse_singular("forward", kw)
        if not compiles():
            return self._in_turn(own, model, args, kw, adapter_names)
        # No graph waits, and none looks at the tokens: such a forward runs outside of it.
        if _continuous.managers or _context.any_activated or has_media(model, kw):
            return self._uncompiled(own, model, args, kw, adapter_names)
        with self.names.block(adapter_names):
            return _noted(own, model, args, kw)

    def _in_turn(
        self,
        own: _Run,
        model: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: Names,
    ) -> Any:
        _check_attention(model, kwargs)
        names = self.names.of_forward(names, nested=self._gate.inside)
        with self._gate.passed(alone=kwargs.get("is_causal") is not None), self.names.block(names):
            return _noted(own, model, args, kwargs)

    def generate(
        self,
        model: Any,
        own: _Run,
        /,
        *args: Any,
        adapter_names: Names = None,
        **kw: Any,
    ) -> Any:
        """With names, in a scope for what becomes of the rows."""
        refuse_singular("generate", kw)
        names = self.names.of_call(adapter_names)
        with self.names.block(names), generation_scope(), media_noted(model, args, kw):
            if has_activated():
                _check_guidance(model, kw)
                prompt_known(*_prompt(args, kw))
            return own(*args, **kw)

    def _prepare_encoder_decoder_kwargs_for_generation(
        self, _model: Any, own: _Run, /, *args: Any, **kwargs: Any
    ) -> Any:
        # The encoder runs once per input. Whisper generates several times in one call.
        repeat_rows(self.names.handle, 1)
        return own(*args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        _model: Any,
        own: _Run,
        /,
        expand_size: int = 1,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        expanded = own(expand_size, *args, **kwargs)
        repeat_rows(self.names.handle, expand_size)
        return expanded

    # Whisper repeats its inputs for returned sequences before the encoder, and drops the recordings
    # that have ended.

    def _expand_variables_for_generation(
        self, _model: Any, own: _Run, /, *args: Any, **kwargs: Any
    ) -> Any:
        batch = kwargs["batch_size"]
        expanded = own(*args, **kwargs)
        rows = expanded[1]
        select_rows([row * batch // rows for row in range(rows)], batch)
        return expanded

    def _maybe_reduce_batch(self, _model: Any, own: _Run, /, *args: Any, **kwargs: Any) -> Any:
        before = kwargs["batch_idx_map"]
        reduced = own(*args, **kwargs)
        repeat_rows(self.names.handle, 1)
        if len(reduced[2]) < len(before):
            select_rows([before.index(row) for row in reduced[2]], len(before))
        return reduced

    def init_continuous_batching(self, _model: Any, own: _Run, /, *args: Any, **kwargs: Any) -> Any:
        """A manager whose requests have adapters."""
        manager = own(*args, **kwargs)
        _continuous.follow(manager, self.names)
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
        **kwargs: Any,
    ) -> Any:
        """With a name for each request; ``allow_base``: the base model serves prompts without the
        invocation of their activated adapter, which raise ValueError otherwise."""
        refuse_singular("generate_batch", kwargs)
        require_flags("generate_batch", allow_base=allow_base)
        names = self.names.of_requests("generate_batch", adapter_names, len(inputs))
        # `generate` in pages has looked for the invocations, and warned.
        found = activated_in(self.names.handle) if adapter_names is None else None
        looked = found is not None and found.fixed
        prompts = named_prompts(inputs, names, allow_base or looked)
        self.names.check_invoked("generate_batch", prompts)
        results = own(prompts, *args, **kwargs)
        if prompts and prompts[0].errors:
            raise prompts[0].errors[0]
        return results

    def resize_token_embeddings(self, model: Any, own: _Run, /, *args: Any, **kwargs: Any) -> Any:
        """Refused where the embeddings are attached."""
        found = model.get_input_embeddings(), model.get_output_embeddings()
        if any(isinstance(embeddings, PoolLayer) for embeddings in found):
            raise RuntimeError(
                "resize_token_embeddings: expected embeddings that are not attached, found those "
                "of an attached model, which its pool knows by their sizes; detach the model, "
                "resize it, and make a new pool"
            )
        return own(*args, **kwargs)


_METHODS = (
    Hooks.generate,
    Hooks._prepare_encoder_decoder_kwargs_for_generation,
    Hooks._expand_inputs_for_generation,
    Hooks._expand_variables_for_generation,
    Hooks._maybe_reduce_batch,
    Hooks.init_continuous_batching,
    Hooks.generate_batch,
    Hooks.resize_token_embeddings,
)
_STAND_INS = {method.__name__: method for method in _METHODS} | {
    kind.method: functools.partial(of_media, kind) for kind in KINDS
}


def _hook(hooks: Hooks, stand_in: _Run, kind: type, method: str) -> Any:
    """A function that is a method of modules of this kind. It finds its model through ``self``, so
    that a copy of the model has hooks of its own."""
    original = getattr(kind, method)
    static = isinstance(inspect.getattr_static(kind, method), staticmethod)

    @functools.wraps(original)  # transformers reads the signatures
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__.get(_OWN + method)
        if own is None:
            own = original if static else functools.partial(original, self)
        return stand_in(hooks, self, own, *args, **kwargs)

    hook.of_attach = True  # pyright: ignore[reportAttributeAccessIssue]
    return hook


def is_hook(method: Any) -> bool:
    """Whether a bound method is one that :meth:`Hooks.put` has put on a module."""
    return getattr(getattr(method, "__func__", None), "of_attach", False)


def take_away(model: nn.Module, done: list[tuple[str, str]]) -> None:
    """Undo :meth:`Hooks.put`: give instances back what they had."""
    for name, method in done:
        module = find_module(model, name)
        if module is not None:
            module.__dict__.pop(method, None)
            if _OWN + method in module.__dict__:
                module.__dict__[method] = module.__dict__.pop(_OWN + method)


def _check_attention(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a manager's attention outside its steps: transformers makes no mask for it."""
    found = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if str(found).startswith("paged|") and not any(name in kwargs for name in _PACKED):
        raise RuntimeError(
            "attach: attention: expected one that hides the tokens to come, found "
            f"{found!r}, which a manager of continuous batching has set; stop the manager, or give "
            "the model 'sdpa', which serves both, with set_attn_implementation"
        )


def _noted(run: _Run, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a model's forward; what it is given tells its layers' rows, where it turns or flattens
    the batch."""
    if any(name in kwargs for name in _PACKED) and not getattr(innermost(), "packed", False):
        raise NotImplementedError(
            "attach: expected a batch with a row for each sequence, found transformers' continuous "
            "batching, which packs requests into one row, by a manager that knows no adapters; "
            "take the one of the attached model's init_continuous_batching or generate_batch"
        )
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise NotImplementedError(
            "attach: expected a model that is not recorded by torch.jit.trace, found a recording, "
            "which would serve the rows of this block, or the base model, at every later call; "
            "torch.export and torch.compile follow the blocks"
        )
    traces = compiles()
    if not traces and innermost() is None:
        return run(*args, **kwargs)
    given = [*args[:1], *(kwargs.get(name) for name in _INPUTS)]
    tensors = [x for x in given if isinstance(x, Tensor) and x.dim() > 1]
    if not tensors:
        return run(*args, **kwargs)
    lengths = [x.shape[1] for x in tensors if x.dim() == 2 or x.is_floating_point()]
    sequences = tensors[0].shape[0]
    if traces:  # dynamo traces no contextvar, but an attribute that it finds changed
        before, noted.batch = noted.batch, (sequences, *lengths)
        try:
            return run(*args, **kwargs)
        finally:
            noted.batch = before
    with (
        forward_of(Batch(sequences, frozenset(lengths))),
        media_noted(model, args, kwargs),
        _activated(model, args, kwargs),
    ):
        return run(*args, **kwargs)


def _activated(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> contextlib.AbstractContextManager[None]:
    """Around a forward: adapters that begin in mid-sequence, where its blocks have any."""
    if not has_activated():
        return contextlib.nullcontext()
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(
            "adapters: names: expected ordinary adapters on a model with encoder and decoder, "
            "found one that begins in mid-sequence (alora_invocation_tokens)"
        )
    given = dict(zip(_parameters(type(model)), args, strict=False)) | kwargs
    ids = given.get("input_ids")
    tokens = given.get("inputs_embeds") if ids is None else ids
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:  # of a tower, say
        return contextlib.nullcontext()
    past = next((given[name] for name in _CACHES if given.get(name) is not None), None)
    if past is not None and not hasattr(past, "get_seq_length"):
        raise NotImplementedError(
            "adapters: names: expected a cache that knows its length beside an activated adapter, "
            f"found a {type(past).__name__}"
        )
    length = 0 if past is None else int(past.get_seq_length())
    keep = given.get("logits_to_keep")
    rows, count = tokens.shape[:2]
    return activated_forward(ids, rows, count, length, 0 if keep is None else keep)


def _check_guidance(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuse classifier-free guidance, whose second prompt has places of its own."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    scale = kwargs.get("guidance_scale", getattr(config, "guidance_scale", None))
    if scale is not None and scale != 1:
        raise NotImplementedError(
            "generate: guidance_scale: expected none beside an activated adapter, found "
            f"{scale}: where it begins in the unconditional prompt is not known"
        )


@functools.cache
def _parameters(kind: type) -> tuple[str, ...]:
    """The arguments of a model's forward, in their order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]  # pyright: ignore


def _prompt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, int]:
    """The ids that ``generate`` is given, and how many tokens of a cache lie before them: of a
    prompt that a cache has begun, the mask is of the whole."""
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return None, 0
    embeds = kwargs.get("inputs_embeds")
    if embeds is not None and embeds.shape[1] != ids.shape[1]:
        return None, 0
    mask = kwargs.get("attention_mask")
    whole = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else ids.shape[1]
    return ids, max(0, whole - ids.shape[1])


class _Gate:
    """What the forwards of one model pass: many at once, or one alone. First come, first served.

    transformers writes the ``is_causal=`` of a call into the model's configuration and takes it out
    again when the call ends; masks of every thread are made by it. Each step of continuous batching
    is such a call. So a forward with ``is_causal=`` runs alone, and others run side by side.
    """

    def __init__(self) -> None:
        self._entrance = threading.Lock()
        self._left = threading.Condition()
        self._inside = 0
        self._thread = threading.local()

    @property
    def inside(self) -> bool:
        """Whether this thread is."""
        return getattr(self._thread, "inside", False)

    @contextlib.contextmanager
    def passed(self, alone: bool) -> Iterator[None]:
        """Wait, then be inside. A thread that is inside already stays so."""
        if self.inside:
            yield
            return
        self._thread.inside = True
        try:
            with self._alone() if alone else self._among_others():
                yield
        finally:
            self._thread.inside = False

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self._entrance:  # nobody else comes in
            with self._left:
                self._left.wait_for(lambda: self._inside == 0)
            yield

    @contextlib.contextmanager
    def _among_others(self) -> Iterator[None]:
        with self._entrance, self._left:
            self._inside += 1
        try:
            yield
        finally:
            with self._left:
                self._inside -= 1
                self._left.notify_all()
