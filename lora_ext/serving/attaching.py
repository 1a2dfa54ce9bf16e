"""``attach`` and ``detach``: a pool's layers in somebody else's model. transformers itself is not
imported."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_ext._checks import require, require_flags
from lora_ext._torch import compiles
from lora_ext.adapter import ModelIndex, model_name
from lora_ext.layers import Swap, find_module, pack_linears, packed_layers, unpack
from lora_ext.pool import AdapterPool
from lora_ext.rows import (
    BASE,
    ERROR,
    Batch,
    Names,
    PoolLayer,
    UnknownAdapterError,
    attachments,
    forward_of,
    innermost,
    layouts,
    noted,
    of_call,
    pool_handle,
)
from lora_ext.serving.layers.multi_lora import MultiLoraLinear
from lora_ext.serving.layers.multi_lora_embedding import MultiLoraEmbedding
from lora_ext.serving.layers.multi_lora_experts import MultiLoraExperts
from lora_ext.serving.layers.siblings import introduce

from . import gate as gates
from .continuous import requests_of
from .gate import Gate
from .generate import hooks
from .media import has_media, media_hooks, media_noted
from .names import names_of_call, refuse_singular
from .pipelines import check_pipeline, watch_pipelines

Model = TypeVar("Model", bound=nn.Module)

_KEY = "_lora_ext_attachment"
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
_PACKED = ("read_index", "write_index", "block_table")

# Modules that see pairs of positions, or a learned prompt, and no sequences: of T5, MPNet, WavLM,
# SpeechT5 and MVP.
_SHARED = re.compile(
    r"(^|\.)(\w*relative_attention_bias|rel_attn_embed|distance_embedding|pe_k|"
    r"(self|cross)_attn_prompt\..*)$"
)


@dataclass(eq=False)
class _Attachment:
    """Kept on the attached model; a deep copy of the model is attached too."""

    pool: AdapterPool
    swap: Swap
    packed: bool
    fused: bool = False
    hooked: list[tuple[str, str]] = field(default_factory=list)  # module, method

    def __post_init__(self) -> None:
        attachments.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attachment:
        swap = copy.deepcopy(self.swap, memo)
        if self.fused:
            introduce(swap.placed)
        return _Attachment(self.pool, swap, self.packed, self.fused, list(self.hooked))


def attach(
    model: Model,
    pool: AdapterPool,
    default: str | None = None,
    *,
    pack_base: bool = False,
    fuse_siblings: bool = False,
) -> Model:
    """Put a :class:`MultiLoraLinear`, :class:`MultiLoraEmbedding` or :class:`MultiLoraExperts` in
    the place of every module that the pool may adapt.

    Works in place; :func:`detach` undoes it. Parameters, names and checkpoints stay what they are.
    A module that is registered under several names is replaced under its first, as PEFT does.
    Where the model can ``generate``, its rows keep their adapters through beams and returned
    sequences. ``generate`` and the call of a transformers model take PEFT's ``adapter_names=``,
    which is :func:`lora_ext.adapters` around them.

    Args:
        model: the model that the pool was made for, or one of the same shape.
        pool: where the adapters are.
        default: who serves a call outside every block and without ``adapter_names=``: None the
            base model, an adapter by its name, or "error" nobody, which raises RuntimeError.
        pack_base: keep a packed copy of the weight of every linear layer, which makes products of
            at most 32 rows on a CPU faster: :func:`lora_ext.nn.pack_linears` of the model. It costs
            the weights' bytes once more.
        fuse_siblings: compute the updates of layers of one parent that are called with the very
            same tensor (q, k, v; gate, up) in one op, which takes the launches of one layer on a
            GPU: :mod:`lora_ext.serving.layers.siblings`. The first of them calls the bases of the
            others too, a little earlier than the model does. The bits are the same. It holds on a
            GPU, outside gradients, autocast, ``torch.compile`` and ``torch.inference_mode``, beside
            plain linear bases without hooks and adapters without DoRA; elsewhere each layer
            computes its own.

    Returns:
        ``model``.

    Raises:
        TypeError: no module, no pool, or a flag that is neither True nor False.
            UnknownAdapterError: a default that the pool lacks. RuntimeError: the model, or a part
            of it, is attached or carries PEFT's layers. ValueError: a module of the pool is missing
            or has another size, or the model has one that the pool lacks; or what ``pack_linears``
            refuses. NotImplementedError: transformers' ``tp_plan`` has divided the weights. The
            model is unchanged then.
    """
    _check_module("attach", model)
    if not isinstance(pool, AdapterPool):
        raise TypeError(
            f"attach: pool: expected an AdapterPool of the model, found {type(pool).__name__}"
        )
    require_flags("attach", pack_base=pack_base, fuse_siblings=fuse_siblings)
    default = _checked_default(default, pool)
    if _KEY in model.__dict__:
        raise RuntimeError(
            "attach: expected a model that is not attached, found an attached one; detach it first"
        )
    parts = getattr(model, "_tp_size", None) or 1  # transformers' own mark
    if parts != 1:
        raise NotImplementedError(
            f"attach: model: expected one whose weights are whole, found one that tp_plan has "
            f"divided between {parts} processes"
        )
    for name, module in model.named_modules():
        if isinstance(module, PoolLayer) or type(module).__module__.startswith("peft."):
            raise RuntimeError(
                f"attach: expected a model without adapter layers, "
                f"found {type(module).__name__} at {name!r}"
            )
    layers: dict[str, PoolLayer] = {}
    for name in pool.modules:
        kind = MultiLoraEmbedding if name in pool.index.embedding else MultiLoraLinear
        layers[name] = kind(_module(model, name), pool, name)
        layers[name].shared = bool(_SHARED.search(name))
        layers[name].default = default
        layers[name].is_head = name == pool.index.output_head
    for name in pool.index.parameters:
        if any(parameter in pool.experts for parameter in pool.index.parameters[name]):
            layers[name] = MultiLoraExperts(_module(model, name), pool, name)
            layers[name].default = default
    _check_same_modules(model, pool)
    pool.base_models.meet("attach: model", model_name(model), stacklevel=2)
    if pack_base:
        pack_linears(model)
    if fuse_siblings:
        introduce(layers)
    attachment = _Attachment(pool, Swap(model, layers, "attach"), pack_base, fuse_siblings)
    layouts.tell(model)
    gate = Gate()
    for name, module in model.named_modules():
        replaced = hooks(pool, default) | media_hooks(type(module))
        for method, hook in replaced.items():
            # An instance with a method of its own is left alone, but for a repository's generate.
            free = method == "generate" or method not in module.__dict__
            if free and callable(getattr(type(module), method, None)):
                _replace(module, method, MethodType(hook, module))
                attachment.hooked.append((name, method))
        if hasattr(type(module), "get_input_embeddings") or (default is not None and not name):
            # A model of transformers swallows arguments that it does not know: names would be lost.
            _replace(
                module, "forward", MethodType(_forward(type(module), pool, default, gate), module)
            )
            attachment.hooked.append((name, "forward"))
    model.__dict__[_KEY] = attachment
    watch_pipelines()
    return model


def detach(model: Model) -> Model:
    """Put back the very module objects that :func:`attach` replaced.

    Returns:
        ``model``.

    Raises:
        TypeError: no module. RuntimeError: the model is not attached, a layer was replaced or
            offloaded since, or a manager of continuous batching runs. The model is unchanged then.
    """
    _check_module("detach", model)
    attachment: _Attachment | None = model.__dict__.get(_KEY)
    if attachment is None:
        raise RuntimeError("detach: expected an attached model, found one that is not")
    _check_offloading(model, attachment)
    managers = requests_of(model)
    if any(requests.manager.is_running() for requests in managers):
        raise RuntimeError(
            "detach: expected no manager of continuous batching that runs, found one; stop it first"
        )
    packed = packed_layers(model, "detach") if attachment.packed else []
    attachment.swap.restore(model, "detach")
    for requests in managers:
        requests.remove()
    for name, method in attachment.hooked:
        module = find_module(model, name)
        if module is not None:
            module.__dict__.pop(method, None)
            if _OWN + method in module.__dict__:
                module.__dict__[method] = module.__dict__.pop(_OWN + method)
    unpack(packed)
    del model.__dict__[_KEY]
    attachments.discard(attachment)
    return model


def _replace(module: nn.Module, method: str, hook: MethodType) -> None:
    """Keep what the instance has of its own: accelerate's forward, a repository's generate."""
    if method in module.__dict__:
        module.__dict__[_OWN + method] = module.__dict__[method]
    setattr(module, method, hook)


def _check_module(where: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model: expected a torch.nn.Module, found {type(model).__name__}")


def _checked_default(default: str | None, pool: AdapterPool) -> str | None:
    if default in (None, ERROR, BASE):
        return None if default == BASE else default
    if default not in pool:
        raise UnknownAdapterError(
            f"attach: default: expected None, 'error' or one of the adapters {pool.names!r:.200}, "
            f"found {default!r:.200}"
        )
    return default


def _check_offloading(model: nn.Module, attachment: _Attachment) -> None:
    """Refuse to take away what accelerate has put hooks on: weights would stay on meta."""
    for name, module in model.named_modules():
        old = getattr(module.__dict__.get("_old_forward"), "__func__", None)
        on_layer = name in attachment.swap.placed and "_hf_hook" in module.__dict__
        if on_layer or getattr(old, "of_attach", False):
            raise RuntimeError(
                f"detach: {name or 'model'}: expected modules as attach left them, found "
                "accelerate's hooks; call accelerate.hooks.remove_hook_from_submodules(model) "
                "first, or offload the model before attach"
            )


def _check_same_modules(model: nn.Module, pool: AdapterPool) -> None:
    """Refuse a larger model than the pool's: the layers beyond would serve the base in silence."""
    index = ModelIndex.build(model, pool.targets, device="cpu")
    more = [name for name in index.specs if name not in pool.index.specs]
    if more:
        raise ValueError(
            f"attach: pool: expected a pool of this model, found none of its pages for {len(more)} "
            f"modules of the model, {more[0]!r} first; make the pool of this model"
        )


def _module(model: nn.Module, name: str) -> nn.Module:
    require(name, "attach", "pool", "a module inside the model", "the model itself")
    module = find_module(model, name)
    if module is None:
        raise ValueError(
            f"attach: pool: expected a pool of this model, found {name!r}, which the model lacks"
        )
    return module


def _forward(kind: type[nn.Module], pool: AdapterPool, default: str | None, gate: Gate) -> Any:
    @functools.wraps(kind.forward)  # transformers reads the signature
    def forward(self: Any, *args: Any, adapter_names: Names = None, **kwargs: Any) -> Any:
        refuse_singular("forward", kwargs)
        run = self.__dict__.get(_OWN + "forward") or functools.partial(kind.forward, self)
        if compiles():
            serve = uncompiled if gates.managers or has_media(self, kwargs) else _in_block
        else:
            serve = in_turn
        return serve(run, self, args, kwargs, adapter_names, pool)

    def in_turn(
        run: Callable[..., Any],
        model: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: Names,
        pool: AdapterPool,
    ) -> Any:
        _check_attention(model, kwargs)
        names = names_of_call(names, pool, default)
        if names is None and not gate.inside:
            check_pipeline(pool_handle(pool))
        with gate.passed(alone=kwargs.get("is_causal") is not None):
            return _in_block(run, model, args, kwargs, names, pool)

    uncompiled: Any = torch.compiler.disable(
        in_turn,
        reason="a manager of continuous batching runs, and a compiled forward would not wait; "
        "or there are images, videos or sounds, whose sequences the tokens have to tell",
    )
    forward.of_attach = True  # pyright: ignore[reportAttributeAccessIssue]
    return forward


def _in_block(
    run: Callable[..., Any],
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: Names,
    pool: AdapterPool,
) -> Any:
    if names is None:
        return _noted(run, model, args, kwargs)
    with of_call(names, pool=pool):
        return _noted(run, model, args, kwargs)


def _check_attention(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a manager's attention outside its steps: transformers makes no mask for it."""
    found = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if str(found).startswith("paged|") and not any(name in kwargs for name in _PACKED):
        raise RuntimeError(
            "attach: attention: expected one that hides the tokens to come, found "
            f"{found!r}, which a manager of continuous batching has set; stop the manager, or give "
            "the model 'sdpa', which serves both, with set_attn_implementation"
        )


def _check_packed() -> None:
    block = innermost()
    if block is None or not block.packed:
        raise NotImplementedError(
            "attach: expected a batch with a row for each sequence, found transformers' continuous "
            "batching, which packs requests into one row, by a manager that knows no adapters; "
            "take the one of the attached model's init_continuous_batching or generate_batch"
        )


def _noted(
    run: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a model's forward; what it is given tells its layers' rows, where it turns or flattens
    the batch."""
    if any(name in kwargs for name in _PACKED):
        _check_packed()
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
    if traces:
        before, noted.batch = noted.batch, (sequences, *lengths)
        try:
            return run(*args, **kwargs)
        finally:
            noted.batch = before
    with forward_of(Batch(sequences, frozenset(lengths))), media_noted(model, args, kwargs):
        return run(*args, **kwargs)
